"""Build the exact configuration of Stable Diffusion 1.5 with random weights, on a device or as files.

Speed and equality with these weights hold for the real ones too.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rebeca_ray.stickers.build.captions import train_tokenizer

EMBED_DIM, IMAGE_TOKENS, CONTEXT = 1024, 4, 768  # ViT-H/14 and ip-adapter_sd15.safetensors


def build_sd15(device: str, dtype: torch.dtype = torch.float16) -> Any:
    """Return the pipeline without its IP-Adapter. Only the tokenizer differs."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a photo of a cat", "a painting of a tree"], Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    with torch.device("meta"):  # the usual initialisation takes half a minute
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=CONTEXT, attention_head_dim=8)
    unet = unet.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    # All layers share their random numbers, for a CPU draws 860 million of them in ten seconds.
    noise = torch.rand(max(parameter.numel() for parameter in unet.parameters()), device=device, dtype=dtype)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:  # biases, and the weights of norms
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
        else:
            largest = (3 / parameter[0].numel()) ** 0.5
            parameter.data = (2 * noise[: parameter.numel()] - 1).mul_(largest).view_as(parameter)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=CONTEXT, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_sd15(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the pipeline and its IP-Adapter to `folder`, in the layout of its files; return its folder."""
    pipeline = build_sd15("cpu", dtype)
    pipeline.save_pretrained(folder / "sd15")
    (folder / "sd15" / "ip_adapter").mkdir()
    save_file(
        adapter_weights(pipeline.unet, CONTEXT), folder / "sd15" / "ip_adapter" / "ip-adapter.safetensors"
    )
    return folder / "sd15"


def adapter_weights(unet: Any, context: int) -> dict[str, torch.Tensor]:
    """Return random weights of an IP-Adapter, by their names in its file. `context` is the token width."""
    with torch.device(unet.device):
        weights = {
            "image_proj.proj.weight": torch.randn(IMAGE_TOKENS * context, EMBED_DIM) * EMBED_DIM**-0.5,
            "image_proj.proj.bias": torch.zeros(IMAGE_TOKENS * context),
            "image_proj.norm.weight": torch.ones(context),
            "image_proj.norm.bias": torch.zeros(context),
        }
        names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        for index, name in enumerate(names):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{2 * index + 1}.{key}.weight"] = (
                    torch.randn(hidden, context) * context**-0.5
                )
    return {name: value.to(unet.dtype) for name, value in weights.items()}


def attach_adapter(pipeline: Any, context: int) -> None:
    """Load an IP-Adapter with random weights into a pipeline, without a file."""
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in adapter_weights(pipeline.unet, context).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    pipeline.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)
