"""Fit the selector to training ratings.

Each rating is predicted from the user's other ratings. Their sums per user are computed once, and a step
takes the rating itself out of them. Where nobody dislikes anything, random items stand in as dislikes.

Shapes: V users, N ratings, B ratings of a step, I items, D embed dim, F factors.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.prior.selector import NUM_FACTORS, RatedSums, Selector
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.progress import counting

ITEMS_TO_START_FROM = 100_000
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 6, 4096, 6e-4, 1e-2
MOST_FORGOTTEN = 0.5  # of a history, so that short ones are learnt as well


def fit_selector(blocks: Iterable[UserBlock], x0_ID: np.ndarray, seed: int) -> Selector | None:
    """Return a selector fitted to the training ratings of some blocks; None unless they have likes.

    Without dislikes, it tells a user's likes from as many random items (Rendle et al. 2009 draw them so). A
    random item takes the place of a like: the history is the same for both, so its length tells nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    user_N, item_N, like_N = ratings_of(blocks)
    if not like_N.any():
        return None
    x_ID = torch.from_numpy(x0_ID)
    rated_item_N, rated_like_N = item_N, like_N  # of the rating that a step takes out of the sums
    sums_of = (user_N, item_N, like_N)
    if like_N.all():
        random_N = torch.randint(len(x_ID), item_N.shape, generator=generator)
        user_N, rated_item_N, rated_like_N = user_N.repeat(2), item_N.repeat(2), like_N.repeat(2)
        item_N, like_N = torch.cat([item_N, random_N]), torch.cat([like_N, torch.zeros_like(like_N)])
    share = float(like_N.mean())
    mean_D, scale = x_ID.mean(0), float(x_ID.std())
    standard_ID = (x_ID - mean_D) / scale
    torch.manual_seed(seed)
    selector = Selector(x0_ID.shape[1], min(NUM_FACTORS, *x0_ID.shape))
    start_from_similarity(selector, standard_ID[:: -(-len(x_ID) // ITEMS_TO_START_FROM)], share)
    sums = sums_by_user(*sums_of, standard_ID)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(user_N) // BATCH_SIZE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    with counting("fit a selector, in steps", steps) as counted:
        for _ in range(EPOCHS):
            for part in torch.randperm(len(user_N), generator=generator).split(BATCH_SIZE):
                x_BD, like_B = standard_ID[item_N[part]], like_N[part]
                others = without(sums.take(user_N[part]), standard_ID[rated_item_N[part]], rated_like_N[part])
                kept_B = 1 - MOST_FORGOTTEN * torch.rand(len(part), generator=generator)
                user_BF = selector.factors_from(others.shrunk(kept_B))
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(selector.logit(x_BD, user_BF), like_B).backward()
                optimizer.step()
                decay.step()
                counted.add()
    # Map the weights from standardised embeddings back to the prior's space.
    with torch.no_grad():
        for layer in (selector.said, selector.factors, selector.popularity):
            layer.weight.div_(scale)
            layer.bias.sub_(layer.weight @ mean_D)
    return selector.eval()


def ratings_of(blocks: Iterable[UserBlock]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the user (counted from 0 over all blocks), item row and like of every rating, each [N]."""
    users, items, likes, first = [], [], [], 0
    for block in blocks:
        users.append(first + np.repeat(np.arange(len(block.counts_V)), block.counts_V))
        items.append(block.item_index_N.astype(np.int64))
        likes.append(block.like_N.astype(np.float32))
        first += len(block.counts_V)
    user_N, item_N, like_N = (torch.from_numpy(np.concatenate(column)) for column in (users, items, likes))
    return user_N, item_N, like_N


def sums_by_user(
    user_N: torch.Tensor, item_N: torch.Tensor, like_N: torch.Tensor, x_ID: torch.Tensor
) -> RatedSums:
    """Return the sums of the embeddings that each user disliked and liked."""
    users = int(user_N.max()) + 1
    sum_V2D, count_V2 = torch.zeros(users, 2, x_ID.shape[1]), torch.zeros(users, 2)
    row_N = 2 * user_N + like_N.long()
    for part in torch.arange(len(user_N)).split(BATCH_SIZE):
        sum_V2D.view(-1, x_ID.shape[1]).index_add_(0, row_N[part], x_ID[item_N[part]])
    count_V2.view(-1).index_add_(0, row_N, torch.ones(len(row_N)))
    return RatedSums(sum_V2D, count_V2)


def without(sums: RatedSums, x_BD: torch.Tensor, like_B: torch.Tensor) -> RatedSums:
    """Return the sums [B] of users without one rating of each."""
    mark_B2 = torch.stack([1 - like_B, like_B], dim=1)
    return RatedSums(sums.sum_G2D - mark_B2[..., None] * x_BD[:, None], sums.count_G2 - mark_B2)


@torch.no_grad()
def start_from_similarity(selector: Selector, standard_ID: torch.Tensor, like_share: float) -> None:
    """Start from similarity: users like items that resemble their liked items.

    Item factors and user factors both begin as the embeddings' first principal directions. This start is most
    of the result: a learning rate that leads far away from it (3e-3) forgets more than it learns.
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
