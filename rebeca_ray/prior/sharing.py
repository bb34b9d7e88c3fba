"""Share images: find the items whose users can show the image of another user's item instead.

embeddings, users (user and item factors) -> find_lenders -> for each item, the row of the item it shows

Embeddings are compared as doubles. The bound then divides the same pairs on every machine.

Shapes: N items, B items of a block, M items up to the end of a block, D embed dim, F factors of the selector.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rebeca_ray.prior.checkpoint import TrainedPrior

BLOCK = 128  # items that are compared at a time
MAX_COMPARED = 50_000  # items that are compared with one another: the work per item stays bounded
LARGEST_LOSS = 0.05  # of an item's like probability, relative, at which it still borrows an image


@dataclass(frozen=True, kw_only=True)
class Tastes:
    """The selector's factors of each item, and of its user beside it."""

    user_NF: np.ndarray
    item_NF: np.ndarray

    @classmethod
    def of(
        cls, prior: TrainedPrior, user_NF: np.ndarray, embeds_ND: np.ndarray, tile: int
    ) -> "Tastes | None":
        """Return the factors of published embeddings; None without a selector.

        Rows are padded to a multiple of `tile`, because products of a few rows round differently.
        """
        if prior.selector is None:
            return None
        padding = -len(embeds_ND) % tile
        x_ND = prior.scaler.scale(torch.from_numpy(np.pad(embeds_ND, ((0, padding), (0, 0)), mode="edge")))
        with torch.inference_mode():
            item_NF = prior.selector.item_factors(x_ND)[: len(embeds_ND)].numpy()
        return cls(user_NF=user_NF.astype(np.float64), item_NF=item_NF.astype(np.float64))

    def likes(self, users: slice, items: slice) -> np.ndarray:
        """Return the like probability [B, M] of the users of B items for M items."""
        user_BF, item_MF = self.user_NF[users], self.item_NF[items]
        return sigmoid(user_BF[:, :-1] @ item_MF[:, :-1].T + user_BF[:, -1:] + item_MF[:, -1])

    def like_of(self, lender_N: np.ndarray) -> np.ndarray:
        """Return the like probability of each item's user for the item of row `lender_N`."""
        item_NF = self.item_NF[lender_N]
        return sigmoid((self.user_NF[:, :-1] * item_NF[:, :-1]).sum(1) + self.user_NF[:, -1] + item_NF[:, -1])


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def find_lenders(
    unit_ND: np.ndarray, user_N: np.ndarray, share_within: float, tastes: Tastes | None = None
) -> np.ndarray:
    """Return for each item the row of the item whose image its user shows: its own row, or an earlier one.

    Items come in a total order. Each borrows from the nearest earlier item of another user that is nearer
    than the cosine distance `share_within`, that borrows nothing itself, and that the user does not show
    already. With `tastes`, no like probability falls by more than LARGEST_LOSS.
    """
    lender_N = np.arange(len(unit_ND))
    for start in range(0, len(unit_ND), MAX_COMPARED):
        part = slice(start, start + MAX_COMPARED)
        part_tastes = tastes and Tastes(user_NF=tastes.user_NF[part], item_NF=tastes.item_NF[part])
        lender_N[part] = start + lenders_among(
            unit_ND[part].astype(np.float64), user_N[part], share_within, part_tastes
        )
    return lender_N


def lenders_among(
    unit_ND: np.ndarray, user_N: np.ndarray, share_within: float, tastes: Tastes | None
) -> np.ndarray:
    """Return `find_lenders` of items that are all compared with one another."""
    lender_N = np.arange(len(unit_ND))
    lends_N = np.ones(len(unit_ND), bool)
    shown: set[tuple[int, int]] = set()  # pairs of user and lender
    own_like_N = None if tastes is None else tastes.like_of(lender_N)
    for start in range(0, len(unit_ND), BLOCK):
        block, earlier = slice(start, start + BLOCK), slice(0, start + BLOCK)
        distance_BM = 1 - unit_ND[block] @ unit_ND[earlier].T
        near_BM = (distance_BM < share_within) & (user_N[block, None] != user_N[earlier])
        if tastes is not None and own_like_N is not None:
            near_BM &= tastes.likes(block, earlier) >= (1 - LARGEST_LOSS) * own_like_N[block, None]
        for index in np.flatnonzero(near_BM.any(1)).tolist():
            row = start + index
            near = np.flatnonzero(near_BM[index, :row] & lends_N[:row])
            by_distance = near[np.argsort(distance_BM[index, near], kind="stable")]
            user = int(user_N[row])
            lender = next((other for other in by_distance.tolist() if (user, other) not in shown), None)
            if lender is not None:
                lender_N[row], lends_N[row] = lender, False
                shown.add((user, lender))
    return lender_N
