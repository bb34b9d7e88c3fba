"""The two networks of the paper's authors, as they published them, with their bugs.

A prior of `paper_v1` or `paper_v2` repeats the authors' results. The project's own network is in
denoisers.py and has none of these bugs:

- `paper_v1` adds no norm after its last layer, although each layer norms its input.
- `paper_v2` loses its residual at cross-attention: the normalised tokens replace it.
- `paper_v2` encodes whole timesteps by frequencies from 1 to 10,000, most of which alias.

Shapes: B batch, C distinct conditions, K tokens of an embedding, D embed dim, U user tokens, H width.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import nn

from rebeca_ray.config.sections import NetworkSettings

NUM_FREQUENCIES = 128  # of paper_v2


class ConditionTokens(NamedTuple):
    """User tokens, then the rating's token, of each condition."""

    token_CPH: torch.Tensor

    @classmethod
    def of(cls, user_CUH: torch.Tensor, rating_CH: torch.Tensor) -> Self:
        """Return the tokens of C users and of the ratings beside them."""
        return cls(torch.cat([user_CUH, rating_CH[:, None]], dim=1))

    def expand(self, row_B: torch.Tensor) -> Self:
        """Return the same for a batch with condition `row_B[i]` in row i."""
        return self._replace(token_CPH=self.token_CPH[row_B])


class FirstDenoiser(nn.Module):
    """`paper_v1`: a transformer without a mask over user, rating, time and K image tokens.

    The image tokens are equal slices of the embedding, so H = D/K. Time has raw sinusoids. Only image tokens
    have a learned position. Dropout is 0.1, and the perceptron is 2048 wide.
    """

    def __init__(self, settings: NetworkSettings, embed_dim: int) -> None:
        super().__init__()
        width = settings.width
        self.num_tokens = settings.num_tokens
        self.rating = nn.Embedding(3, width)
        self.position_1KH = nn.Parameter(torch.zeros(1, self.num_tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, settings.num_heads, 2048, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.num_layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, width)

    def condition(self, user_CUH: torch.Tensor, rating_C: torch.Tensor) -> ConditionTokens:
        """Return the condition of C users and ratings."""
        return ConditionTokens.of(user_CUH, self.rating(rating_C))

    def forward(
        self, x_BD: torch.Tensor, timestep_T: torch.Tensor, condition: ConditionTokens
    ) -> torch.Tensor:
        rows, width = len(condition.token_CPH), condition.token_CPH.shape[-1]
        image_BKH = x_BD.unflatten(1, (self.num_tokens, -1)) + self.position_1KH
        last = math.log(10_000) / (width // 2 - 1)
        frequencies = torch.exp(-last * torch.arange(width // 2, device=x_BD.device))
        time_TH = sinusoids(timestep_T, frequencies)
        tokens = [
            condition.token_CPH,
            time_TH[:, None].expand(rows, -1, -1),
            image_BKH.repeat(rows // len(x_BD), 1, 1),
        ]
        x_BSH = self.layers(torch.cat(tokens, dim=1))
        return self.out(x_BSH[:, -self.num_tokens :]).flatten(1)


class SecondBlock(nn.Module):
    """Self-attention, gated cross-attention, perceptron; the condition modulates the norm before each."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.cross_gate = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for linear in (*self.modulation, self.mlp[-1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def normed(self, index: int, x_BKH: torch.Tensor, pooled_BH: torch.Tensor) -> torch.Tensor:
        """Return the tokens, normalised, then scaled and shifted by the pooled condition."""
        scale_B1H, shift_B1H = self.modulation[index](pooled_BH)[:, None].chunk(2, dim=-1)
        return self.norm(x_BKH) * (1 + scale_B1H) + shift_B1H

    def forward(
        self, x_BKH: torch.Tensor, pooled_BH: torch.Tensor, condition_BPH: torch.Tensor
    ) -> torch.Tensor:
        normed = self.normed(0, x_BKH, pooled_BH)
        x_BKH = x_BKH + self.self_attention(normed, normed, normed, need_weights=False)[0]
        # As published: the normalised tokens, not x, carry on.
        x_BKH = self.normed(1, x_BKH, pooled_BH)
        attended = self.cross_attention(x_BKH, condition_BPH, condition_BPH, need_weights=False)[0]
        x_BKH = x_BKH + self.cross_gate * attended
        return x_BKH + self.mlp(self.normed(2, x_BKH, pooled_BH))


class SecondDenoiser(nn.Module):
    """`paper_v2`: blocks of self-attention, gated cross-attention to user, rating and time, and perceptron.

    A learned linear map cuts the embedding into K tokens of D/K numbers, each lifted to width H. The pooled
    condition is the mean of the condition's tokens after a perceptron.
    """

    def __init__(self, settings: NetworkSettings, embed_dim: int) -> None:
        super().__init__()
        width = settings.width
        self.num_tokens, token_dim = settings.num_tokens, embed_dim // settings.num_tokens
        self.tokenizer, self.lift = nn.Linear(embed_dim, embed_dim), nn.Linear(token_dim, width)
        self.rating = nn.Embedding(3, width)
        self.time = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.pool = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            SecondBlock(width, settings.num_heads) for _ in range(settings.num_layers)
        )
        self.head, self.lower = nn.Linear(width, width), nn.Linear(width, token_dim)
        self.detokenizer = nn.Linear(embed_dim, embed_dim)

    def condition(self, user_CUH: torch.Tensor, rating_C: torch.Tensor) -> ConditionTokens:
        """Return the condition of C users and ratings."""
        return ConditionTokens.of(user_CUH, self.rating(rating_C))

    def forward(
        self, x_BD: torch.Tensor, timestep_T: torch.Tensor, condition: ConditionTokens
    ) -> torch.Tensor:
        rows = len(condition.token_CPH)
        # Angles reach 10^7, so the last bit of a frequency counts: logspace would give others.
        frequencies = torch.linspace(0, math.log(10_000), NUM_FREQUENCIES, device=x_BD.device).exp()
        time_TH = self.time(sinusoids(timestep_T, frequencies))
        condition_BPH = torch.cat([condition.token_CPH, time_TH[:, None].expand(rows, -1, -1)], dim=1)
        pooled_BH = self.pool(condition_BPH.mean(1))
        x_BKH = self.lift(self.tokenizer(x_BD).unflatten(1, (self.num_tokens, -1)))
        x_BKH = x_BKH.repeat(rows // len(x_BD), 1, 1)
        for block in self.blocks:
            x_BKH = block(x_BKH, pooled_BH, condition_BPH)
        return self.detokenizer(self.lower(self.head(x_BKH)).flatten(1))


def sinusoids(timestep_T: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Return the sines, then the cosines, of timesteps [T] at the frequencies [F]: [T, 2F]."""
    angles = timestep_T.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
