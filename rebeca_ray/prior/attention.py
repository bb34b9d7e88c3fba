"""Multi-head attention with reusable keys and values, and the sinusoids of a timestep.

Shapes: B batch, K tokens, C context tokens, N heads, h width of a head, H width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class TimestepEmbedding(nn.Module):
    """Encode timesteps [B] as [B, H]: sinusoids, then a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies: torch.Tensor
        frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * (width // 2), width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep_B: torch.Tensor) -> torch.Tensor:
        angles = timestep_B.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Attention(nn.Module):
    """Multi-head attention of `x_BKH` to keys and values [B, N, C, h], made by `keys_values`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context_BCH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B, N, C, h] of a context."""
        keys, values = (self.split(part) for part in self.key_value(context_BCH).chunk(2, dim=-1))
        return keys, values

    def forward(
        self, x_BKH: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(self.split(self.query(x_BKH)), keys, values, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))

    def split(self, x_BKH: torch.Tensor) -> torch.Tensor:
        return x_BKH.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
