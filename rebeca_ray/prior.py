"""The prior network: a small transformer that denoises one CLIP embedding, given who rates and how.

Shapes: B batch, K tokens of an embedding, D embed dim, R token dim, H width, N heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, then a two-layer perceptron: [B] -> [B, H]."""

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
    """Multi-head attention of `x_BKH` to `context_BCH`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BKH: torch.Tensor, context_BCH: torch.Tensor) -> torch.Tensor:
        query = self.split(self.query(x_BKH))
        key, value = (self.split(part) for part in self.key_value(context_BCH).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))

    def split(self, x_BKH: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x_BKH.shape
        return x_BKH.view(batch, tokens, self.num_heads, width // self.num_heads).transpose(1, 2)


class Block(nn.Module):
    """AdaLN-zero self-attention, gated cross-attention to the condition tokens, AdaLN-zero perceptron.

    Every residual starts at zero (Peebles & Xie 2023, section 3.2), so that a new block changes nothing.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_cross = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.self_attention = Attention(width, num_heads)
        self.cross_attention = Attention(width, num_heads)
        self.cross_gate = nn.Parameter(torch.zeros(width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x_BKH: torch.Tensor, condition_BCH: torch.Tensor, pooled_BH: torch.Tensor) -> torch.Tensor:
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = self.modulation(pooled_BH)[:, None].chunk(6, dim=-1)
        normed = self.norm_self(x_BKH) * (1 + scale_self) + shift_self
        x_BKH = x_BKH + gate_self * self.self_attention(normed, normed)
        x_BKH = x_BKH + self.cross_gate * self.cross_attention(self.norm_cross(x_BKH), condition_BCH)
        normed = self.norm_mlp(x_BKH) * (1 + scale_mlp) + shift_mlp
        return x_BKH + gate_mlp * self.mlp(normed)


class Prior(nn.Module):
    """REBECA's denoiser `(x_t, t, user, rating) -> prediction`, the authors' later network.

    A learned linear map turns the embedding into K tokens of R = ceil(D/K) numbers, each lifted to width H; blocks
    see the pooled condition through AdaLN-zero and its three tokens (user, rating, time) through cross-attention; the
    inverse maps lead back to D. `null_user_index` and `null_rating_index` stand for "not told", which condition dropout
    teaches and classifier-free guidance needs.

    Args:
        embed_dim: D.
        num_users: rows of the user table, without the null user.
    """

    def __init__(self, *, embed_dim: int, num_users: int, num_layers: int, num_heads: int, width: int, num_tokens: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"network: width {width} is not divisible by num_heads {num_heads}; change one of them")
        self.embed_dim, self.num_tokens = embed_dim, num_tokens
        self.null_user_index, self.null_rating_index = num_users, 2
        token_dim = math.ceil(embed_dim / num_tokens)
        self.tokenizer = nn.Linear(embed_dim, num_tokens * token_dim)
        self.lift = nn.Linear(token_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.user = nn.Embedding(num_users + 1, width)
        self.rating = nn.Embedding(3, width)
        self.time = TimestepEmbedding(width)
        nn.init.normal_(self.user.weight, std=0.02)
        nn.init.normal_(self.rating.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.lower = nn.Linear(width, token_dim)
        self.detokenizer = nn.Linear(num_tokens * token_dim, embed_dim)
        nn.init.zeros_(self.detokenizer.weight)
        nn.init.zeros_(self.detokenizer.bias)

    def forward(self, x_BD: torch.Tensor, timestep_B: torch.Tensor, user_index_B: torch.Tensor, rating_B: torch.Tensor) -> torch.Tensor:
        """Prediction [B, D] for noisy `x_BD` at `timestep_B`; `rating_B` is 0 dislike, 1 like, 2 not told."""
        tokens = self.tokenizer(x_BD).view(len(x_BD), self.num_tokens, -1)
        x_BKH = self.lift(tokens) + self.position
        condition_BCH = torch.stack([self.user(user_index_B), self.rating(rating_B), self.time(timestep_B)], dim=1)
        pooled_BH = condition_BCH.sum(dim=1)
        for block in self.blocks:
            x_BKH = block(x_BKH, condition_BCH, pooled_BH)
        return self.detokenizer(self.lower(self.norm_out(x_BKH)).flatten(1))
