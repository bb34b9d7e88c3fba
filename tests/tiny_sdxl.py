"""A tiny Stable Diffusion XL with an IP-Adapter, in their official layouts."""

from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from tests.tiny_decoder import write_adapter

FIRST, SECOND, POOLED = 16, 24, 20  # widths of the two text encoders and of the pooled text
CONTEXT = FIRST + SECOND


def text_config(width: int, vocabulary: int) -> Any:
    """Return the configuration of a text encoder; the end token is the largest, as in SDXL's own files."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=POOLED,
        bos_token_id=0,
        eos_token_id=2,
    )


def write_tiny_sdxl(folder: Path, embed_dim: int) -> DecoderSettings:
    """Write Stable Diffusion XL and an IP-Adapter in their official layouts: random weights, 16 pixels."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from rebeca_ray.stickers.build.captions import train_tokenizer

    torch.manual_seed(2)
    train_tokenizer(["noto food pizza", "flat animal cat"], folder / "words")
    tokenizers = [
        CLIPTokenizer.from_pretrained(folder / "words", pad_token=pad) for pad in ("<|endoftext|>", "!")
    ]
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name or name.startswith("add_embedding"):
                parameter.mul_(4)  # so that a slip in the texts or time ids shows in the images
    StableDiffusionXLPipeline(
        unet=unet,
        vae=AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
            scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(text_config(FIRST, len(tokenizers[0]))),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND, len(tokenizers[1]))),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder / "sdxl")
    write_adapter(unet, CONTEXT, embed_dim, folder / "sdxl" / "ip_adapter" / "ip-adapter.safetensors")
    return DecoderSettings(
        model=str(folder / "sdxl"),
        num_inference_steps=3,
        batch_size=4,
        image_format="PNG",
        thumbnail_size=8,
        safety=SafetySettings(checker="none"),  # a check takes longer than 16 pixels do
    )
