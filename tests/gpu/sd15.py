"""Write the exact configuration of Stable Diffusion 1.5 with random weights, in the layout of its files.

Speed and equality with these weights hold for the real ones too.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rebeca_ray.stickers.build.captions import train_tokenizer

EMBED_DIM, IMAGE_TOKENS, CONTEXT = 1024, 4, 768  # ViT-H/14 and ip-adapter_sd15.safetensors


def write_sd15(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the pipeline and its IP-Adapter to `folder`; return its folder. Only the tokenizer differs."""
    train_tokenizer(["a photo of a cat", "a painting of a tree"], folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=77)
    with torch.device("meta"):  # the usual initialisation takes half a minute
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=CONTEXT, attention_head_dim=8)
    unet = unet.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:  # biases, and the weights of norms
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
        else:
            largest = (3 / parameter[0].numel()) ** 0.5
            torch.nn.init.uniform_(parameter, -largest, largest)
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
    StableDiffusionPipeline(
        unet=unet.to(dtype),
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd15")
    weights = {
        "image_proj.proj.weight": torch.randn(IMAGE_TOKENS * CONTEXT, EMBED_DIM) * EMBED_DIM**-0.5,
        "image_proj.proj.bias": torch.zeros(IMAGE_TOKENS * CONTEXT),
        "image_proj.norm.weight": torch.ones(CONTEXT),
        "image_proj.norm.bias": torch.zeros(CONTEXT),
    }
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"ip_adapter.{2 * index + 1}.to_k_ip.weight"] = torch.randn(hidden, CONTEXT) * CONTEXT**-0.5
        weights[f"ip_adapter.{2 * index + 1}.to_v_ip.weight"] = torch.randn(hidden, CONTEXT) * CONTEXT**-0.5
    (folder / "sd15" / "ip_adapter").mkdir()
    save_file(
        {name: value.to(dtype) for name, value in weights.items()},
        folder / "sd15" / "ip_adapter" / "ip-adapter.safetensors",
    )
    return folder / "sd15"
