"""Scale CLIP embeddings to the prior's space, and back to the decoder's."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import ScalingSettings


@dataclass(frozen=True, kw_only=True)
class EmbedScaler:
    """L2-normalise, multiply by sqrt(D), clamp to ±`clamp`, multiply by `scale`.

    With the default `scale`, a coordinate then has a deviation of about 1, which is that of the noise. The
    way back gives every embedding the length `norm`: the mean length of the training embeddings, to which
    the decoder is used. Raw embeddings keep their length.
    """

    embed_dim: int
    norm: float
    normalise: bool = True
    clamp: float | None = 5.0
    scale_factor: float = 1.0
    clip: float | None = 5.0  # bound of `denoised` while sampling
    deviation: float = 1.0  # of the scaled training embeddings around their mean

    @classmethod
    def fit(cls, image_embeds: torch.Tensor, settings: ScalingSettings) -> "EmbedScaler":
        """Return a scaler with the mean length, and the deviation, of `image_embeds` [N, D]."""
        bound = None if settings.clamp is None else settings.clamp * settings.scale
        scaler = cls(
            embed_dim=image_embeds.shape[1],
            norm=float(image_embeds.norm(dim=1).mean()),
            normalise=settings.normalise,
            clamp=settings.clamp,
            scale_factor=settings.scale,
            clip=settings.clip_sample or bound,
        )
        deviation = scaler.scale(image_embeds).double().var(0, correction=0).mean().sqrt()
        return EmbedScaler(**{**asdict(scaler), "deviation": float(deviation) or settings.scale})

    def scale(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map CLIP embeddings [..., D] to the prior's space."""
        if self.normalise:
            image_embeds = F.normalize(image_embeds, dim=-1) * math.sqrt(self.embed_dim)
        if self.clamp is not None:
            image_embeds = image_embeds.clamp(-self.clamp, self.clamp)
        return image_embeds * self.scale_factor

    def unscale(self, x: torch.Tensor) -> torch.Tensor:
        """Map the prior's space [..., D] back to CLIP embeddings."""
        if not self.normalise:
            return x / self.scale_factor
        return F.normalize(x, dim=-1) * self.norm

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
