"""Scale CLIP embeddings to the prior's space, and back to the decoder's."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class EmbedScaler:
    """L2-normalise, multiply by sqrt(D), clamp to ±`clamp`, divide by `clamp` (the authors' setting: 5).

    A coordinate then has a standard deviation of about 1/clamp. The way back gives every embedding the length
    `norm`: the mean length of the training embeddings, to which the decoder is used.
    """

    embed_dim: int
    norm: float
    clamp: float = 5.0

    @classmethod
    def fit(cls, image_embeds: torch.Tensor, clamp: float = 5.0) -> "EmbedScaler":
        """Return a scaler with the mean length of `image_embeds` [N, D]."""
        return cls(embed_dim=image_embeds.shape[1], norm=float(image_embeds.norm(dim=1).mean()), clamp=clamp)

    def scale(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map CLIP embeddings [..., D] to the prior's space, in [-1, 1]."""
        unit = F.normalize(image_embeds, dim=-1)
        return (unit * math.sqrt(self.embed_dim)).clamp(-self.clamp, self.clamp) / self.clamp

    def unscale(self, x: torch.Tensor) -> torch.Tensor:
        """Map the prior's space [..., D] back to CLIP embeddings of length `norm`."""
        return F.normalize(x, dim=-1) * self.norm

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
