"""The four networks of a decoder, as plain functions of tensors: the same to PyTorch, ONNX Runtime and TensorRT.

    text_encoder      input_ids_BL                                         -> text_BLH
    image_projection  image_embeds_BD                                      -> image_BKH
    unet              latents_BCYX, timestep_B, text_BLH, image_BKH, scale_B -> predicted_BCYX
    vae_decoder       latents_BCYX                                         -> pixels_BRYX in [-1, 1]

Shapes: B batch, D embed dim, L text tokens, K image tokens, H context width, C latent channels, R red green blue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_decoder
from rebeca_ray.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What the denoising loop calls, and what it must know to call it."""

    text_encoder: Callable[[torch.Tensor], torch.Tensor]
    image_projection: Callable[[torch.Tensor], torch.Tensor]
    unet: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    vae_decoder: Callable[[torch.Tensor], torch.Tensor]
    tokenizer: Any
    scheduler_config: dict[str, Any]
    embed_dim: int
    latent_channels: int
    image_size: int  # pixels a side
    vae_scale_factor: int
    device: str
    dtype: torch.dtype


class TextEncoder(nn.Module):
    """CLIP's text model, the last hidden state of every token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids_BL, return_dict=False)[0]


class ImageAttention(nn.Module):
    """Decoupled cross-attention (IP-Adapter, Ye et al. 2023, eq. 5): text and image tokens each in a softmax of their own.

    diffusers' processor, but for the weight of the image: a tensor with a row an image, so that rows may differ and an exported
    graph has it as an input.
    """

    def __init__(self, to_k_ip: nn.Linear, to_v_ip: nn.Linear) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        attention_mask: None = None,
    ) -> torch.Tensor:
        text_BLH, image_BKH, scale_B = encoder_hidden_states

        def heads(x_BTH: torch.Tensor) -> torch.Tensor:
            return x_BTH.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        text = F.scaled_dot_product_attention(query, heads(attn.to_k(text_BLH)), heads(attn.to_v(text_BLH)))
        image = F.scaled_dot_product_attention(
            query, heads(self.to_k_ip(image_BKH)), heads(self.to_v_ip(image_BKH))
        )
        mixed = text + scale_B[:, None, None, None] * image
        return attn.to_out[0](mixed.transpose(1, 2).flatten(-2))


class ConditionedUNet(nn.Module):
    """The UNet with everything that conditions it as an input: text tokens, image tokens and the weight of the image."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        processors = dict(unet.attn_processors)
        for name, processor in processors.items():
            if hasattr(processor, "to_k_ip"):
                processors[name] = ImageAttention(processor.to_k_ip[0], processor.to_v_ip[0])
        unet.set_attn_processor(processors)
        unet.encoder_hid_proj = (
            None  # the projection is a network of its own: what it gives is the same at every step
        )
        self.unet = unet

    def forward(
        self,
        latents_BCYX: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLH: torch.Tensor,
        image_BKH: torch.Tensor,
        scale_B: torch.Tensor,
    ) -> torch.Tensor:
        return self.unet(latents_BCYX, timestep_B, (text_BLH, image_BKH, scale_B), return_dict=False)[0]


class VaeDecoder(nn.Module):
    """The autoencoder's decoder, latents as the UNet has them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents_BCYX: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents_BCYX / self.vae.config.scaling_factor, return_dict=False)[0]


def load_torch_networks(settings: DecoderSettings) -> Networks:
    """A diffusers Stable Diffusion 1.x/2.x directory or hub id, an IP-Adapter that reads one global embedding, run by PyTorch."""
    from diffusers import AutoModel, StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    files, dtype = find_decoder(settings), DTYPES[settings.dtype]
    parts: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    try:
        if files.vae:
            parts["vae"] = AutoModel.from_pretrained(str(files.vae), dtype=dtype, use_safetensors=True)
        pipeline: Any = StableDiffusionPipeline.from_pretrained(
            files.model, dtype=dtype, use_safetensors=True, **parts
        )
        if files.lora:
            pipeline.load_lora_weights(str(files.lora.parent), weight_name=files.lora.name)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        adapter = files.ip_adapter
        pipeline.load_ip_adapter(
            str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"decoder {settings.model}: cannot be loaded ({' '.join(str(error).split())[:300]})"
        ) from None
    (projection,) = pipeline.unet.encoder_hid_proj.image_projection_layers

    def ready(module: nn.Module) -> Any:
        module = module.to(settings.device, dtype).eval().requires_grad_(False)
        return module.to(memory_format=torch.channels_last) if settings.device == "cuda" else module

    unet = ready(ConditionedUNet(pipeline.unet))
    return Networks(
        text_encoder=ready(TextEncoder(pipeline.text_encoder)),
        image_projection=ready(projection),
        unet=torch.compile(unet, mode="reduce-overhead") if settings.compile else unet,
        vae_decoder=ready(VaeDecoder(pipeline.vae)),
        tokenizer=pipeline.tokenizer,
        scheduler_config=dict(pipeline.scheduler.config),
        embed_dim=projection.image_embeds.in_features,
        latent_channels=pipeline.unet.config.in_channels,
        image_size=settings.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        vae_scale_factor=pipeline.vae_scale_factor,
        device=settings.device,
        dtype=dtype,
    )
