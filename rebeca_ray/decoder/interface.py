"""The decoder's interface: CLIP image embeddings become encoded images. Any row may fail alone.

`local.py` implements it in this process, `triton_client.py` on Triton Inference Server, with equal results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from rebeca_ray.config.decoder import DecoderSettings


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The input of a decoder, one row per image.

    Guidance 1 means none; `ip_adapter_scale` is the weight of the embedding.
    """

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
        """Return rows with the guidance and image weight of the settings."""
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
        """Return the rows of all parts as one batch."""
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
        """Return some rows, in the order of `index`."""
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
    """The outcome of one row: an image, or an `error`, or neither if the safety policy dropped the image."""

    seed: int
    image: bytes | None = None
    thumbnail: bytes | None = None
    width: int | None = None
    height: int | None = None
    safety_probability: float | None = None  # the checker's probability that it is unsafe
    error: str | None = None


class Decoder(Protocol):
    """The decoder as rendering sees it."""

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Return one outcome per row, in order. Raises only errors that no row caused."""
        ...
