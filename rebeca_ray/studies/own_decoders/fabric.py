"""Attention to liked and disliked images in place of a prior: the baseline `fabric` (von Rütte et al. 2023).

At each step, the reference images get the noise of that step, and pass through the UNet. Their inputs to
self-attention then join the keys and values of the drawn images: those of liked images in the conditional
half of the batch, those of disliked ones in the other.

Shapes: B rows, R reference images, T tokens, C channels; latents [R, C, Y, X].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.networks import Tensors
from rebeca_ray.studies.own_decoders.lora import encode_latents

# The defaults of the authors' code: references weigh most in the middle third of the steps.
MIDDLE, MIDDLE_WEIGHT, OTHER_WEIGHT, DISLIKED_SHARE = (0.33, 0.66), 1.0, 0.1, 0.5


@dataclass
class Memory:
    """The reference images of the user at hand, and what their last pass left for self-attention."""

    liked: torch.Tensor | None = None
    disliked: torch.Tensor | None = None
    conditioning: Tensors = ()  # of the references: an empty prompt
    is_guided: bool = False  # the second half of a batch is unconditional
    weight: float = MIDDLE_WEIGHT  # of liked images beside a row's tokens; disliked ones have a share of it
    is_writing: bool = False
    states: dict[str, torch.Tensor] = field(default_factory=dict)  # by layer: [R, T, C], liked ones first


class ReferenceAttention(nn.Module):
    """Self-attention that remembers its inputs, or adds those of the references to its keys and values."""

    def __init__(self, name: str, memory: Memory) -> None:
        super().__init__()
        self.name, self.memory = name, memory

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> torch.Tensor:
        memory = self.memory
        if memory.is_writing:
            memory.states[self.name] = hidden_states
            return self.attend(attn, hidden_states, None)
        states = memory.states.get(self.name)
        num_liked = 0 if memory.liked is None else len(memory.liked)
        halves = hidden_states.chunk(2 if memory.is_guided else 1)
        references = (None, None) if states is None else (states[:num_liked], states[num_liked:])
        weights = (memory.weight, DISLIKED_SHARE * memory.weight)
        parts = zip(halves, references, weights, strict=False)
        return torch.cat([self.attend(attn, half, part, weight) for half, part, weight in parts])

    def attend(
        self, attn: Any, x_BTC: torch.Tensor, reference_RTC: torch.Tensor | None, weight: float = 1.0
    ) -> torch.Tensor:
        """Return self-attention of each row, with the weighted tokens of all references beside its own."""
        known = x_BTC
        bias = None
        if reference_RTC is not None and len(reference_RTC):
            others = reference_RTC.flatten(0, 1).expand(len(x_BTC), -1, -1)
            known = torch.cat([x_BTC, others], dim=1)
            bias = x_BTC.new_zeros(known.shape[1])
            bias[x_BTC.shape[1] :] = math.log(weight)
            bias = bias[None]

        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(attn.to_q(x_BTC)), heads(attn.to_k(known)), heads(attn.to_v(known)), attn_mask=bias
        )
        return attn.to_out[0](mixed.transpose(1, 2).flatten(-2))


class ReferenceUNet:
    """The UNet of a decoder whose self-attention sees the references of `memory`."""

    def __init__(
        self,
        conditioned: Any,
        memory: Memory,
        scheduler_config: Mapping[str, Any],
        tile_size: Callable[[], int],
        progress: Callable[[int], float],
    ) -> None:
        from diffusers import DDPMScheduler

        self.conditioned, self.memory = conditioned, memory
        self.tile_size, self.progress = tile_size, progress
        self.schedule = DDPMScheduler.from_config(scheduler_config)
        processors = dict(conditioned.unet.attn_processors)
        processors |= {
            name: ReferenceAttention(name, memory) for name in processors if name.endswith("attn1.processor")
        }
        conditioned.unet.set_attn_processor(processors)

    def __call__(
        self, latents_BCYX: torch.Tensor, timestep_B: torch.Tensor, *conditioning: torch.Tensor
    ) -> torch.Tensor:
        memory = self.memory
        memory.is_guided = len(latents_BCYX) > self.tile_size()
        parts = [part for part in (memory.liked, memory.disliked) if part is not None]
        if parts:
            references = torch.cat(parts)
            timestep = timestep_B[:1]
            noise = torch.randn(references.shape, generator=torch.Generator().manual_seed(int(timestep)))
            noisy = self.schedule.add_noise(references, noise.to(references), timestep)
            memory.is_writing = True
            self.conditioned(noisy.to(latents_BCYX.dtype), timestep.expand(len(noisy)), *memory.conditioning)
            memory.is_writing = False
            is_middle = MIDDLE[0] <= self.progress(int(timestep)) < MIDDLE[1]
            memory.weight = MIDDLE_WEIGHT if is_middle else OTHER_WEIGHT
        return self.conditioned(latents_BCYX, timestep_B, *conditioning)


class FabricDecoder:
    """The catalog's decoder with the reference images of one user at a time."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.decoder = LocalDecoder(settings.model_copy(update={"compile": False, "cache_interval": 1}))
        networks, self.memory = self.decoder.loop.networks, Memory()
        self.vae, self.size = networks.vae_decoder.vae, networks.image_size  # type: ignore[attr-defined]
        unet = ReferenceUNet(
            networks.unet,
            self.memory,
            networks.scheduler_config,
            lambda: self.decoder.batch_size,
            self.progress,
        )
        self.decoder.loop = DenoisingLoop(replace(networks, unet=unet), self.decoder.settings)

    def progress(self, timestep: int) -> float:
        """Return the share of the steps before a timestep."""
        timesteps = self.decoder.loop.scheduler.timesteps.tolist()
        return timesteps.index(timestep) / len(timesteps)

    def refer_to(self, liked: Sequence[bytes], disliked: Sequence[bytes]) -> None:
        """Set the encoded images to attend to."""
        self.memory.liked, self.memory.disliked = (
            encode_latents(self.vae, images, self.size) if images else None for images in (liked, disliked)
        )
        self.memory.states.clear()
        if count := len(liked) + len(disliked):
            networks = self.decoder.loop.networks
            rows = Rows(
                image_embeds_BD=np.zeros((count, networks.embed_dim), np.float32),
                seeds=[0] * count,
                prompts=[""] * count,
                negative_prompts=[""] * count,
                guidance_scale_B=np.ones(count, np.float32),
                ip_adapter_scale_B=np.zeros(count, np.float32),
            )
            with torch.no_grad():
                self.memory.conditioning = networks.condition(rows).in_order(networks.family.conditioning)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Return one outcome per row, in order. All rows are of the same user."""
        # Without padding: a user has few rows, and the references cost a pass in any case.
        self.decoder.batch_size = min(len(rows), self.decoder.settings.batch_size)
        return self.decoder.decode(rows)
