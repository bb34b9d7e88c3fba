"""Denoise one CLIP embedding with a small transformer, given a user and a rating.

A `Condition` depends on user and rating alone. It is computed once and used at every timestep.

Shapes: B batch, C distinct conditions, K tokens of an embedding, D embed dim, R token dim, U user tokens, H
width, N heads.
"""

import math
from typing import NamedTuple, Self, cast

import torch
from torch import nn

from rebeca_ray.config.sections import NetworkSettings
from rebeca_ray.prior.attention import Attention, TimestepEmbedding
from rebeca_ray.prior.published import ConditionTokens, FirstDenoiser, SecondDenoiser
from rebeca_ray.prior.users import History, HistoryEncoder

DISLIKE, LIKE, NULL_RATING = 0, 1, 2


class Condition(NamedTuple):
    """The work that depends on (user, rating) alone: keys and values per layer, and pooled tokens."""

    pooled_CH: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # per layer: [B, N, U+1, h] each
    row_B: torch.Tensor | None = None  # the condition of each row; None: row i has condition i

    def expand(self, row_B: torch.Tensor) -> Self:
        """Return the same for a batch with condition `row_B[i]` in row i.

        Small tensors keep one row per condition.
        """
        return self._replace(
            keys_values=[(keys[row_B], values[row_B]) for keys, values in self.keys_values], row_B=row_B
        )


class CrossAttentionBlock(nn.Module):
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
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(
        self, x_BKH: torch.Tensor, modulation_B1M: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = modulation_B1M.chunk(6, dim=-1)
        normed = torch.addcmul(shift_self, self.norm_self(x_BKH), 1 + scale_self)
        x_BKH = torch.addcmul(
            x_BKH, gate_self, self.self_attention(normed, *self.self_attention.keys_values(normed))
        )
        x_BKH = torch.addcmul(
            x_BKH, self.cross_gate, self.cross_attention(self.norm_cross(x_BKH), keys, values)
        )
        normed = torch.addcmul(shift_mlp, self.norm_mlp(x_BKH), 1 + scale_mlp)
        return torch.addcmul(x_BKH, gate_mlp, self.mlp(normed))


class CrossAttentionDenoiser(nn.Module):
    """The project's network, in the manner of the authors' later one without its bugs.

    A learned linear map cuts the embedding into K tokens of R = ceil(D/K) numbers, each lifted to width H.
    Blocks see the pooled condition through AdaLN-zero, and its tokens (user, rating, time) through
    cross-attention. The inverse maps lead back to D.
    """

    def __init__(self, settings: NetworkSettings, embed_dim: int) -> None:
        super().__init__()
        width = settings.width
        self.num_tokens = settings.num_tokens
        token_dim = math.ceil(embed_dim / self.num_tokens)
        # Fill whole vector registers: a row's last bits then do not depend on its position in a batch.
        while self.num_tokens * token_dim % 8:
            token_dim += 1
        self.tokenizer = nn.Linear(embed_dim, self.num_tokens * token_dim)
        self.lift = nn.Linear(token_dim, width)
        self.position_KH = nn.Parameter(0.02 * torch.randn(self.num_tokens, width))
        self.time = TimestepEmbedding(width)
        self.rating = nn.Embedding(3, width)
        modulation = nn.Linear(width, settings.num_layers * 6 * width)  # all layers at once
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, settings.num_heads) for _ in range(settings.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.lower = nn.Linear(width, token_dim)
        self.detokenizer = nn.Linear(self.num_tokens * token_dim, embed_dim)
        nn.init.zeros_(self.detokenizer.weight)
        nn.init.zeros_(self.detokenizer.bias)

    def condition(self, user_CUH: torch.Tensor, rating_C: torch.Tensor) -> Condition:
        """Return the condition of C users and ratings."""
        rating_CH = self.rating(rating_C)
        tokens = torch.cat([user_CUH, rating_CH[:, None]], dim=1)
        blocks = cast(list[CrossAttentionBlock], self.blocks)
        return Condition(
            user_CUH.mean(1) + rating_CH, [block.cross_attention.keys_values(tokens) for block in blocks]
        )

    def forward(self, x_BD: torch.Tensor, timestep_T: torch.Tensor, condition: Condition) -> torch.Tensor:
        time_TH = self.time(timestep_T)
        modulation = self.modulation(condition.pooled_CH + time_TH)
        if condition.row_B is not None:
            modulation = modulation[condition.row_B]
        x_BKH = self.lift(self.tokenizer(x_BD).unflatten(1, (self.num_tokens, -1))) + self.position_KH
        x_BKH = x_BKH.repeat(len(modulation) // len(x_BD), 1, 1)
        modulations = modulation[:, None].chunk(len(self.blocks), dim=-1)
        blocks = cast(list[CrossAttentionBlock], self.blocks)
        for block, modulation_B1M, (keys, values) in zip(
            blocks, modulations, condition.keys_values, strict=True
        ):
            time_keys, time_values = (
                part.expand(len(x_BKH), -1, -1, -1)
                for part in block.cross_attention.keys_values(time_TH[:, None])
            )
            x_BKH = block(
                x_BKH,
                modulation_B1M,
                torch.cat([keys, time_keys], dim=2),
                torch.cat([values, time_values], dim=2),
            )
        return self.detokenizer(self.lower(self.norm_out(x_BKH)).flatten(1))


Denoiser = CrossAttentionDenoiser | FirstDenoiser | SecondDenoiser
ARCHITECTURES: dict[str, type[Denoiser]] = {
    "cross_attention": CrossAttentionDenoiser,
    "paper_v1": FirstDenoiser,
    "paper_v2": SecondDenoiser,
}


class Prior(nn.Module):
    """REBECA's denoiser `(x_t, t, user, rating) -> prediction`, with an encoder of histories where needed.

    `null_user_UH` and `NULL_RATING` stand for an absent condition. Condition dropout teaches them, and
    classifier-free guidance needs them. The null user with a like gives the taste of the population. The
    table of an `id` prior is separate (`UserTable`).
    """

    def __init__(self, settings: NetworkSettings, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.denoiser: Denoiser = ARCHITECTURES[settings.architecture](settings, embed_dim)
        self.null_user_UH = nn.Parameter(torch.randn(settings.num_user_tokens, settings.width))
        self.history_encoder: HistoryEncoder | None = None
        if settings.user_encoder == "history":
            self.history_encoder = HistoryEncoder(
                embed_dim=embed_dim,
                width=settings.width,
                num_heads=settings.num_heads,
                num_user_tokens=settings.num_user_tokens,
            )

    def encode(self, history: History) -> torch.Tensor:
        """Return user tokens [B, U, H] of histories; an empty history gives the null user's."""
        assert self.history_encoder is not None
        known_B = history.present_BL.any(1)
        return torch.where(known_B[:, None, None], self.history_encoder(history), self.null_user_UH)

    def condition(self, user_CUH: torch.Tensor, rating_C: torch.Tensor) -> Condition | ConditionTokens:
        """Return the condition of users and ratings (0 dislike, 1 like, 2 absent), for every timestep."""
        return self.denoiser.condition(user_CUH, rating_C)

    def forward(
        self, x_BD: torch.Tensor, timestep_T: torch.Tensor, condition: Condition | ConditionTokens
    ) -> torch.Tensor:
        """Return the prediction for noisy `x_BD` at `timestep_T` (one for all, or one per row).

        A condition expanded to n·B rows gives n·B predictions, B for each n-th of it.
        """
        return self.denoiser(x_BD, timestep_T, condition)
