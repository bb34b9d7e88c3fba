"""Retrieve real items: those that the selector likes most for a user, among the items the user has not rated.

Retrieval is the baseline of generation: the same selector, without a prior and without a decoder.

Shapes: G users, I items, D embed dim, F factors of the selector.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.prior.selection import choose
from rebeca_ray.prior.selector import Selector

LIKES_AT_ONCE = 2**26  # 256 MiB of like probabilities
MMR_ITEMS = 2048


@torch.inference_mode()
def retrieve(
    selector: Selector,
    factor_GF: torch.Tensor,
    x0_ID: np.ndarray,
    rated: Sequence[np.ndarray],
    num_items: int,
    diversity: float = 0.0,
) -> list[np.ndarray]:
    """Return the rows of each user's `num_items` best unseen items, best first; all if fewer are unseen.

    `x0_ID` are the items in the prior's space. `rated` holds the rows of the items that each user has rated.
    With `diversity`, the choice among the MMR_ITEMS most liked is by maximal marginal relevance (MMR), as
    planning chooses candidates.
    """
    gradient_GD, offset_G = selector.linear(factor_GF)
    x_ID = torch.from_numpy(x0_ID).to(gradient_GD.device)
    users_at_once = max(1, LIKES_AT_ONCE // len(x0_ID))
    retrieved = []
    for start in range(0, len(factor_GF), users_at_once):
        part = slice(start, start + users_at_once)
        like_GI = torch.sigmoid(gradient_GD[part] @ x_ID.T + offset_G[part, None]).cpu().numpy()
        for like_I, rated_rows in zip(like_GI, rated[part], strict=True):
            unseen = np.delete(np.arange(len(x0_ID)), rated_rows)
            best = unseen[np.argsort(-like_I[unseen], kind="stable")]
            if diversity:
                best = best[: max(MMR_ITEMS, num_items)]
                unit_CD = F.normalize(torch.from_numpy(x0_ID[best])).numpy()
                no_copy, count = np.zeros(len(best), bool), min(num_items, len(best))
                best = best[choose(unit_CD, like_I[best], no_copy, count, diversity)]
            retrieved.append(best[:num_items])
    return retrieved
