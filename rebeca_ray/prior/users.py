"""Encode users as *user tokens*: from a row of a table (`id`), or from their ratings (`history`).

Shapes: B batch, L interactions of a history, D embed dim, U user tokens, H width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from rebeca_ray.prior.attention import Attention


class History(NamedTuple):
    """The ratings of B users: at most L each, the latest first; `present_BL` marks the real ones."""

    item_BLD: torch.Tensor  # embeddings in the prior's space
    like_BL: torch.Tensor  # 0 or 1
    age_BL: torch.Tensor  # days before the user's last interaction
    present_BL: torch.Tensor  # bool

    def latest(self, max_history: int) -> "History":
        """Return the latest `max_history` interactions: the first columns."""
        return History(*(column[:, :max_history] for column in self))


@dataclass(frozen=True, kw_only=True)
class UserVectors:
    """Vectors of G users.

    `factor_GF` are the selector's factors; None without a selector or without ratings. `num_ratings_G` are
    the ratings that the tokens were made from; None if the tokens were learnt.
    """

    token_GUH: torch.Tensor
    factor_GF: torch.Tensor | None = None
    num_ratings_G: torch.Tensor | None = None

    def take(self, row: torch.Tensor) -> "UserVectors":
        """Return the vectors of some users."""
        return UserVectors(
            token_GUH=self.token_GUH[row],
            factor_GF=None if self.factor_GF is None else self.factor_GF[row],
            num_ratings_G=None if self.num_ratings_G is None else self.num_ratings_G[row],
        )


class HistoryEncoder(nn.Module):
    """Attention pooling over rated items, with rating and recency: `History` -> user tokens [B, U, H].

    It knows no user by name. A user unseen in training is served all the same, and taste follows the history
    without another training. Learned queries pool (Lee et al. 2019, Set Transformer, section 3.2).
    """

    def __init__(self, *, embed_dim: int, width: int, num_heads: int, num_user_tokens: int) -> None:
        super().__init__()
        self.norm_item = nn.LayerNorm(embed_dim, elementwise_affine=False)
        self.item = nn.Linear(embed_dim, 2 * width)  # one half if disliked, one if liked
        self.recency = nn.Linear(2, width)
        self.norm = nn.LayerNorm(width)
        self.query_UH = nn.Parameter(torch.randn(num_user_tokens, width))
        self.pool = Attention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(2 * width, width),
        )

    def forward(self, history: History) -> torch.Tensor:
        disliked_BLH, liked_BLH = self.item(self.norm_item(history.item_BLD)).chunk(2, dim=-1)
        # Two scales of recency: over a year, and over a month.
        recency_BL2 = torch.stack([torch.log1p(history.age_BL) / 6, torch.exp(-history.age_BL / 30)], dim=-1)
        x_BLH = torch.where(history.like_BL[..., None] == 1, liked_BLH, disliked_BLH) + self.recency(
            recency_BL2
        )
        # A softmax needs at least one position. An empty history keeps the first; `Prior.encode` discards the
        # result.
        nobody_B1 = ~history.present_BL.any(1, keepdim=True)
        mask_BL = history.present_BL | (nobody_B1 & (torch.arange(x_BLH.shape[1], device=x_BLH.device) == 0))
        query_BUH = self.query_UH.expand(len(x_BLH), -1, -1)
        pooled_BUH = self.pool(
            query_BUH, *self.pool.keys_values(self.norm(x_BLH)), mask=mask_BL[:, None, None, :]
        )
        return pooled_BUH + self.mlp(pooled_BUH)


class UserTable:
    """One row of user tokens per user of the training set, as published; updated row by row.

    The table is no module parameter. Its gradient, an optimizer's state over it, and a running average of it
    would each cost O(users) per step. A step touches the rows of its batch alone. Row-wise AdaGrad (Duchi et
    al. 2011, with one number per row) keeps 4 bytes of state per user. Every data-parallel worker holds the
    whole table. Workers exchange the gradients of touched rows by all-gather, so that all make the same
    update. With a `weight_decay`, AdamW updates every row at each step instead, as published.
    """

    def __init__(
        self,
        num_users: int,
        num_user_tokens: int,
        width: int,
        *,
        seed: int = 0,
        weight_decay: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.empty(num_users, num_user_tokens, width).normal_(generator=generator)
        self.rows_VUH = rows.to(device)
        self.squares_V = torch.zeros(num_users, device=device)
        self.adamw = None
        if weight_decay is not None:
            self.adamw = torch.optim.AdamW([self.rows_VUH], weight_decay=weight_decay)

    def __call__(self, user_index_B: torch.Tensor) -> torch.Tensor:
        """Return user tokens [B, U, H]."""
        return self.rows_VUH[user_index_B]

    @torch.no_grad()
    def update(self, user_index_B: torch.Tensor, gradient_BUH: torch.Tensor, learning_rate: float) -> None:
        """Make one step on the rows of `user_index_B`; a repeated row gets the sum of its gradients."""
        if dist.is_initialized() and (workers := dist.get_world_size()) > 1:
            indices = [torch.empty_like(user_index_B) for _ in range(workers)]
            gradients = [torch.empty_like(gradient_BUH) for _ in range(workers)]
            dist.all_gather(indices, user_index_B)
            dist.all_gather(gradients, gradient_BUH)
            user_index_B, gradient_BUH = torch.cat(indices), torch.cat(gradients) / workers
        touched, row_B = user_index_B.unique(return_inverse=True)
        gradient = torch.zeros(len(touched), *gradient_BUH.shape[1:], device=gradient_BUH.device)
        gradient.index_add_(0, row_B, gradient_BUH)
        if self.adamw is not None:
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.rows_VUH.grad = torch.zeros_like(self.rows_VUH).index_copy_(0, touched, gradient)
            self.adamw.step()
            return
        self.squares_V[touched] += gradient.square().mean((1, 2))
        scale = learning_rate / (self.squares_V[touched].sqrt() + 1e-10)
        self.rows_VUH[touched] -= scale[:, None, None] * gradient

    def state_dict(self) -> dict[str, Any]:
        adamw = self.adamw.state_dict() if self.adamw else None
        return {"rows": self.rows_VUH, "squares": self.squares_V, "adamw": adamw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows_VUH.copy_(state["rows"])
        self.squares_V.copy_(state["squares"])
        if self.adamw is not None:
            self.adamw.load_state_dict(state["adamw"])
