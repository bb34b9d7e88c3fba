"""The selector: how likely a user is to like an embedding, by a small logistic matrix factorisation over embeddings.

`P(like | u, x) = sigmoid(theta_u · W x + b_u + b · x + c)`, x in the prior's space. It chooses among candidates before
anything is decoded. It is not the evaluation's verifier, which other ratings and another seed make.

Shapes: G users, N items or interactions, L interactions of a history, D embed dim, F factors (the last of F+1 is b_u).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.training_set import UserBlock
from rebeca_ray.users import History

NUM_FACTORS = 16
RIDGE = 1.0  # precision of a user's factors: a new user is an average one
EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 4096, 0.02
NEWTON_STEPS = 6
MAX_HISTORY = 256  # interactions that a user's factors are fitted on
MAX_INTERACTIONS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Selector:
    """W [F, D], b [D], c, and a row [F+1] for each user of an `id` prior."""

    factor_FD: torch.Tensor
    item_D: torch.Tensor
    constant: torch.Tensor
    rows_VF: torch.Tensor | None = None

    def features(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a user's factors are multiplied with, [..., F+1], and the part that is the same for all users, [...]."""
        factors = x_ND @ self.factor_FD.T
        return torch.cat([factors, torch.ones_like(factors[..., :1])], dim=-1), x_ND @ self.item_D + self.constant

    def fold_in(self, history: History) -> torch.Tensor:
        """The factors [G, F+1] that explain each history best: ridge-regularised logistic regression by Newton's method.

        It serves who has no row; without any interaction they are zero, the average user's.
        """
        x_GLF, offset_GL = self.features(history.item_BLD)
        present_GL, like_GL = history.present_BL.float(), history.like_BL.float()
        user_GF = torch.zeros(len(x_GLF), x_GLF.shape[2], device=x_GLF.device)
        ridge_FF = RIDGE * torch.eye(x_GLF.shape[2], device=x_GLF.device)
        for _ in range(NEWTON_STEPS):
            p_GL = torch.sigmoid((x_GLF @ user_GF[:, :, None])[:, :, 0] + offset_GL)
            gradient_GF = ((p_GL - like_GL) * present_GL)[:, None] @ x_GLF
            weight_GL = p_GL * (1 - p_GL) * present_GL
            hessian_GFF = x_GLF.transpose(1, 2) @ (weight_GL[:, :, None] * x_GLF) + ridge_FF
            step_GF = torch.linalg.solve(hessian_GFF, gradient_GF[:, 0] + RIDGE * user_GF)
            user_GF = user_GF - step_GF
        return user_GF

    def like_probability(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """[N] for each embedding and the factors of the user beside it."""
        x_NF, offset_N = self.features(x_ND)
        return torch.sigmoid((x_NF * user_NF).sum(-1) + offset_N)

    def state_dict(self) -> dict[str, torch.Tensor]:
        rows = {} if self.rows_VF is None else {"rows": self.rows_VF}
        return {"factor": self.factor_FD, "item": self.item_D, "constant": self.constant, **rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> "Selector":
        return cls(factor_FD=state["factor"], item_D=state["item"], constant=state["constant"], rows_VF=state.get("rows"))


def fit_selector(blocks: Iterator[UserBlock], x0_ID: np.ndarray, seed: int) -> Selector | None:
    """Fit W, b and c, with a row for every user seen, on training ratings; None if all of them are likes, or none is.

    Two million ratings are enough for so few numbers; `fold_in` gives the rest of the users theirs.
    """
    torch.manual_seed(seed)
    user, item, like = [], [], []
    count = users = 0
    for block in blocks:
        user.append(users + np.repeat(np.arange(len(block.counts_V)), block.counts_V))
        item.append(block.item_index_N)
        like.append(block.like_N)
        count, users = count + len(block.like_N), users + len(block.counts_V)
        if count >= MAX_INTERACTIONS:
            break
    user_N, item_N, like_N = (torch.from_numpy(np.concatenate(column)).long() for column in (user, item, like))
    if like_N.float().mean() in (0, 1):
        return None
    rows = nn.Parameter(0.1 * torch.randn(users, NUM_FACTORS + 1))
    factor = nn.Parameter(torch.randn(NUM_FACTORS, x0_ID.shape[1]) / x0_ID.std() / x0_ID.shape[1] ** 0.5)
    shared = nn.Parameter(torch.zeros(x0_ID.shape[1])), nn.Parameter(torch.logit(like_N.float().mean()))
    selector = Selector(factor_FD=factor, item_D=shared[0], constant=shared[1])
    optimizer = torch.optim.Adam([rows, factor, *shared], lr=LEARNING_RATE)
    steps = EPOCHS * -(-len(user_N) // BATCH_SIZE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(user_N)).split(BATCH_SIZE):
            x_NF, offset_N = selector.features(torch.from_numpy(x0_ID[item_N[part].numpy()]))
            user_NF = rows[user_N[part]]
            fit = F.binary_cross_entropy_with_logits((x_NF * user_NF).sum(1) + offset_N, like_N[part].float())
            share = len(part) / len(user_N)
            penalty = RIDGE * rows.square().sum() * share / len(part) / 2 + 1e-4 * (factor.square().sum() + shared[0].square().sum())
            optimizer.zero_grad()
            (fit + penalty).backward()
            optimizer.step()
            decay.step()
    return Selector(factor_FD=factor.detach(), item_D=shared[0].detach(), constant=shared[1].detach())
