"""The decoder: CLIP image embeddings become encoded images, row by row independent, whatever happens to one of them.

What goes in, what comes out, and who does it: this process (`local_decoder.py`) or Triton Inference Server (`triton.py`), to the
same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from rebeca_ray.config.decoder import DecoderSettings


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is to be drawn, a row an image. Guidance 1 means without; `ip_adapter_scale` is the weight of the embedding."""

    image_embeds_BD: np.ndarray
    seeds: Sequence[int]
    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    guidance_scale_B: np.ndarray
    ip_adapter_scale_B: np.ndarray

    @classmethod
    def of(
        cls,
        settings: DecoderSettings,
        image_embeds_BD: np.ndarray,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
    ) -> Self:
        """Rows with the guidance and image weight of the settings."""
        count = len(seeds)
        return cls(
            image_embeds_BD=image_embeds_BD,
            seeds=seeds,
            prompts=prompts or [""] * count,
            negative_prompts=negative_prompts or [""] * count,
            guidance_scale_B=np.full(count, settings.decoder_guidance_scale, np.float32),
            ip_adapter_scale_B=np.full(count, settings.ip_adapter_scale, np.float32),
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Rows]") -> Self:
        """One batch of several."""
        return cls(
            image_embeds_BD=np.concatenate([part.image_embeds_BD for part in parts]),
            seeds=[seed for part in parts for seed in part.seeds],
            prompts=[prompt for part in parts for prompt in part.prompts],
            negative_prompts=[prompt for part in parts for prompt in part.negative_prompts],
            guidance_scale_B=np.concatenate([part.guidance_scale_B for part in parts]),
            ip_adapter_scale_B=np.concatenate([part.ip_adapter_scale_B for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, index: Sequence[int] | np.ndarray) -> Self:
        """Some rows, in the order of `index`."""
        return type(self)(
            image_embeds_BD=self.image_embeds_BD[index],
            seeds=[self.seeds[i] for i in index],
            prompts=[self.prompts[i] for i in index],
            negative_prompts=[self.negative_prompts[i] for i in index],
            guidance_scale_B=self.guidance_scale_B[index],
            ip_adapter_scale_B=self.ip_adapter_scale_B[index],
        )


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """One row's outcome: an image, or the reason why there is none (`error`), or neither: it was not fit to be shown."""

    seed: int
    image: bytes | None = None
    thumbnail: bytes | None = None
    width: int | None = None
    height: int | None = None
    safety_probability: float | None = None  # that it is unsafe
    error: str | None = None


class Decoder(Protocol):
    """What rendering needs."""

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """One outcome a row, in order. Raises only for what no row is to blame for."""
        ...
