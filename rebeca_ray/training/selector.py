"""Fit the selector to training ratings."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.prior.selector import MAX_HISTORY, NUM_FACTORS, Selector
from rebeca_ray.prior.user_blocks import UserBlock

ITEMS_TO_START_FROM = 100_000
EPOCHS, SAMPLES_PER_USER, BATCH_SIZE, TARGETS, LEARNING_RATE, WEIGHT_DECAY = 5, 64, 1024, 16, 3e-4, 1e-2


def fit_selector(blocks: Iterable[UserBlock], x0_ID: np.ndarray, seed: int) -> Selector | None:
    """Return a selector fitted to the training ratings of some blocks; None unless they have both ratings."""
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
    # Map the weights from standardised embeddings back to the prior's space.
    with torch.no_grad():
        for layer in (selector.said, selector.factors, selector.popularity):
            layer.weight.div_(scale)
            layer.bias.sub_(layer.weight @ mean_D)
    return selector.eval()


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
