"""The selector: how likely a user is to like an embedding, by a small logistic matrix factorisation over embeddings.

`P(like | u, x) = sigmoid(theta_u · (W x + w) + b_u + b · x + c)`, x in the prior's space. It chooses among candidates before
anything is decoded. It is not the evaluation's verifier, which other ratings and another seed make.

Shapes: G users, N embeddings, L interactions of a history, D embed dim, I items, F factors (F+1: with b_u).
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.prior.users import History

NUM_FACTORS = 64
MAX_HISTORY = 128  # interactions that a user's factors are made of
ITEMS_TO_START_FROM = 100_000
EPOCHS, SAMPLES_PER_USER, BATCH_SIZE, TARGETS, LEARNING_RATE, WEIGHT_DECAY = 5, 64, 1024, 16, 3e-4, 1e-2


class Selector(nn.Module):
    """Matrix factorisation whose user factors come from the history (asymmetric SVD: Koren 2008, section 4).

    `theta_u` is what the liked items say plus what the disliked ones say, each averaged with a learned shrinkage, so
    that a user without a row, or with a new history, has factors too; without any interaction those of an average user.
    `rows_VF` are the factors of an `id` prior's users, kept because such a prior is sampled without histories.
    """

    rows_VF: torch.Tensor | None

    def __init__(
        self, embed_dim: int, num_factors: int = NUM_FACTORS, rows_VF: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.said = nn.Linear(embed_dim, 2 * num_factors)  # by a disliked and by a liked item
        self.factors = nn.Linear(embed_dim, num_factors)
        self.popularity = nn.Linear(embed_dim, 1)
        self.generosity = nn.Linear(num_factors + 2, 1)
        self.shrinkage = nn.Parameter(torch.tensor(5.0))
        self.register_buffer("rows_VF", rows_VF)

    def user_factors(self, history: History) -> torch.Tensor:
        """[G, F+1] of histories."""
        disliked_GLF, liked_GLF = self.said(history.item_BLD).chunk(2, dim=-1)
        present_GL = history.present_BL.float()
        like_GL = history.like_BL * present_GL
        dislike_GL = present_GL - like_GL
        num_likes_G1, num_dislikes_G1 = like_GL.sum(1, keepdim=True), dislike_GL.sum(1, keepdim=True)
        shrinkage = F.softplus(self.shrinkage)
        theta_GF = (liked_GLF * like_GL[..., None]).sum(1) / (num_likes_G1 + shrinkage)
        theta_GF = theta_GF + (disliked_GLF * dislike_GL[..., None]).sum(1) / (num_dislikes_G1 + shrinkage)
        count_G1 = num_likes_G1 + num_dislikes_G1
        told = torch.cat([theta_GF, torch.log1p(count_G1) / 5, (num_likes_G1 + 1) / (count_G1 + 4)], dim=1)
        return torch.cat([theta_GF, self.generosity(told)], dim=1)

    def logit(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        return (self.factors(x_ND) * user_NF[:, :-1]).sum(1) + user_NF[:, -1] + self.popularity(x_ND)[:, 0]

    def item_factors(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, F+1] of embeddings: what `logit` makes of them, and of the user's factors."""
        return torch.cat([self.factors(x_ND), self.popularity(x_ND)], dim=1)

    @torch.inference_mode()
    def like_probability(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """[N] for each embedding and the factors of the user beside it."""
        return torch.sigmoid(self.logit(x_ND, user_NF))


def fit_selector(blocks: Iterable[UserBlock], x0_ID: np.ndarray, seed: int) -> Selector | None:
    """Fit a selector to the training ratings of some blocks of users; None if all of them are likes, or none is."""
    torch.manual_seed(seed)
    blocks = list(blocks)
    share = np.concatenate([block.like_N for block in blocks]).mean()
    if share in (0, 1):
        return None
    x_ID = torch.from_numpy(x0_ID)
    mean_D, scale = x_ID.mean(0), float(x_ID.std())
    selector = Selector(x0_ID.shape[1], min(NUM_FACTORS, *x0_ID.shape))
    start_from_similarity(
        selector, (x_ID[:: -(-len(x_ID) // ITEMS_TO_START_FROM)] - mean_D) / scale, float(share)
    )
    optimizer = torch.optim.AdamW(selector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS)
    for epoch in range(EPOCHS):
        for block in blocks:
            batches = block.batches(
                samples_per_user=SAMPLES_PER_USER,
                like_share=None,
                batch_size=BATCH_SIZE,
                targets=TARGETS,
                max_history=MAX_HISTORY,
                seed=(seed, epoch),
            )
            for batch in batches:
                history = batch.history.look_up(x0_ID)
                user_NF = selector.user_factors(
                    history._replace(item_BLD=(history.item_BLD - mean_D) / scale)
                )[batch.row_B]
                logit_N = selector.logit(
                    (x_ID[torch.from_numpy(batch.item_index_B)] - mean_D) / scale, user_NF
                )
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logit_N, torch.from_numpy(batch.like_B).float()).backward()
                optimizer.step()
        decay.step()
    with torch.no_grad():  # from standardised embeddings back to the prior's space
        for layer in (selector.said, selector.factors, selector.popularity):
            layer.weight.div_(scale)
            layer.bias.sub_(layer.weight @ mean_D)
    return selector.eval()


@torch.no_grad()
def start_from_similarity(selector: Selector, standard_ID: torch.Tensor, like_share: float) -> None:
    """Begin with users who like what resembles what they liked: the embeddings' first principal directions, twice.

    This is most of what there is to know; a learning rate that leads far away from it (3e-3) forgets more than it learns.
    """
    directions_FD = torch.linalg.eigh(standard_ID.T @ standard_ID).eigenvectors.T.flip(0)[
        : selector.factors.out_features
    ]
    directions_FD *= 2.8 / (standard_ID @ directions_FD.T).square().sum(1).mean().sqrt()
    selector.factors.weight.copy_(directions_FD)
    selector.said.weight.copy_(torch.cat([-0.1 * directions_FD, directions_FD]))
    for layer in (selector.said, selector.factors, selector.popularity, selector.generosity):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(selector.popularity.weight)
    nn.init.zeros_(selector.generosity.weight)
    selector.popularity.bias.fill_(np.log(like_share / (1 - like_share)))
