"""Build the exact configuration of Stable Diffusion XL with random weights, on a device and without files."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rebeca_ray.stickers.build.captions import train_tokenizer
from tests.gpu.sd15 import attach_adapter

CONTEXT = 2048


def sdxl_unet(device: str) -> Any:
    """Return SDXL's UNet; on the device `meta` it takes no memory."""
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=CONTEXT,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def sdxl_parts(device: str) -> dict[str, nn.Module]:
    """Return SDXL's networks by the names of their folders."""
    first = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.13025,
        )
        encoders = {
            "text_encoder": CLIPTextModel(first),
            "text_encoder_2": CLIPTextModelWithProjection(second),
        }
    return {"unet": sdxl_unet(device), "vae": vae, **encoders}


def build_sdxl(device: str, dtype: torch.dtype = torch.float16) -> Any:
    """Return the pipeline with its IP-Adapter. Only the tokenizers differ."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a photo of a cat", "a painting of a tree"], Path(folder))
        tokenizers = [
            CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad)
            for pad in ("<|endoftext|>", "!")
        ]
    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline(
        **{name: part.to(dtype) for name, part in sdxl_parts(device).items()},
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    attach_adapter(pipeline, CONTEXT)
    return pipeline
