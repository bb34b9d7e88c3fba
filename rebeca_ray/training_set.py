"""What the prior trains on: interactions joined with item embeddings, and the sampler that gives every user the same say."""

from dataclasses import dataclass

import numpy as np

from rebeca_ray.errors import UserError
from rebeca_ray.interactions import Interactions


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """N interactions joined with I scaled item embeddings; shared by all workers through Ray's object store."""

    x0_ID: np.ndarray  # float32, the prior's space
    item_index: np.ndarray  # [N]
    user_index: np.ndarray  # [N], sorted
    like: np.ndarray  # [N]
    held_out: np.ndarray  # [N] bool
    num_users: int


class BalancedUserSampler:
    """Draws the same number of training interactions from every user each epoch (paper, appendix A.1).

    With replacement, so that users with fewer rows than that have as much say. A pure function of seed and epoch, so that a
    resumed run sees the same epochs, and every worker takes its own share of one common draw.
    """

    def __init__(self, user_index: np.ndarray, held_out: np.ndarray, num_users: int, samples_per_user: int, seed: int) -> None:
        self.rows = np.flatnonzero(~held_out)
        self.counts = np.bincount(user_index[self.rows], minlength=num_users)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.users = np.flatnonzero(self.counts)
        self.samples_per_user, self.seed = samples_per_user, seed

    def epoch(self, number: int) -> np.ndarray:
        """Shuffled row numbers of epoch `number`, `samples_per_user` of every user."""
        random = np.random.default_rng((self.seed, number))
        share = random.random((len(self.users), self.samples_per_user))
        place = (share * self.counts[self.users, None]).astype(np.int64)
        rows = self.rows[(self.starts[self.users, None] + place).ravel()]
        return random.permutation(rows)


def build_training_set(interactions: Interactions, item_id: np.ndarray, x0_ID: np.ndarray, uri: str) -> TrainingSet:
    """Join interactions with item embeddings. Raises UserError for rated items without an embedding."""
    order = np.argsort(item_id)
    place = np.minimum(np.searchsorted(item_id, interactions.item_id, sorter=order), len(order) - 1)
    item_index = order[place]
    missing = item_id[item_index] != interactions.item_id
    if missing.any():
        names = ", ".join(sorted(set(interactions.item_id[missing]))[:3])
        raise UserError(
            f"items {uri}: {int(missing.sum())} of {len(missing)} interactions rate an item that has no embedding there "
            f"({names}); embed those items with `rebeca embed`, or drop their ratings"
        )
    return TrainingSet(
        x0_ID=x0_ID,
        item_index=item_index.astype(np.int32),
        user_index=interactions.user_index,
        like=interactions.like,
        held_out=interactions.held_out,
        num_users=interactions.num_users,
    )
