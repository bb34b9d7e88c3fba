"""A tiny Stable Diffusion with an IP-Adapter, in their official layouts."""

from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings


def write_tiny_decoder(folder: Path, embed_dim: int) -> DecoderSettings:
    """Write Stable Diffusion and an IP-Adapter in their official layouts: random weights, 16 pixels."""
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from rebeca_ray.stickers.build.captions import train_tokenizer

    torch.manual_seed(1)
    train_tokenizer(["noto food pizza", "flat animal cat"], folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd")
    write_adapter(unet, 16, embed_dim, folder / "sd" / "ip_adapter" / "ip-adapter.safetensors")
    return DecoderSettings(
        model=str(folder / "sd"),
        num_inference_steps=3,
        batch_size=4,
        image_format="PNG",
        thumbnail_size=8,
        safety=SafetySettings(checker="none"),  # a check takes longer than 16 pixels do
    )


def write_adapter(unet: Any, context: int, embed_dim: int, file: Path) -> None:
    """Write an IP-Adapter of a UNet, with random weights."""
    from safetensors.torch import save_file

    weights = {
        "image_proj.proj.weight": torch.randn(4 * context, embed_dim),
        "image_proj.proj.bias": torch.randn(4 * context),
        "image_proj.norm.weight": torch.ones(context),
        "image_proj.norm.bias": torch.zeros(context),
    }
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"ip_adapter.{2 * index + 1}.to_k_ip.weight"] = torch.randn(hidden, context)
        weights[f"ip_adapter.{2 * index + 1}.to_v_ip.weight"] = torch.randn(hidden, context)
    file.parent.mkdir()
    save_file(weights, file)
