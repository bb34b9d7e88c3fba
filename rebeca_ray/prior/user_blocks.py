"""Draw training samples from users' histories, the same number for every user.

Shapes: V users of a block, N their interactions, G draws of a batch, m targets per draw, B = G·m samples, L
history.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch

from rebeca_ray.prior.users import History
from rebeca_ray.schemas import TRAINING, VALIDATION

USERS_PER_BLOCK = 4096
TARGETS_PER_HISTORY = 8  # samples that share one pass through the history encoder
POOL_PER_TARGET = 2  # interactions to draw from for each different target of a draw
MICROSECONDS_PER_DAY = 86_400_000_000


class Rated(NamedTuple):
    """The histories of G users as row numbers of items, at most L each; `look_up` adds the embeddings."""

    item_index_GL: np.ndarray  # arbitrary where absent
    like_GL: np.ndarray
    age_GL: np.ndarray  # days before the user's last interaction
    present_GL: np.ndarray

    @classmethod
    def nothing(cls, num_users: int, max_history: int) -> Self:
        """Return empty histories."""
        kinds = (np.int32, np.int8, np.float32, bool)
        return cls(*(np.zeros((num_users, max_history), kind) for kind in kinds))

    def look_up(self, x0_ID: np.ndarray, device: torch.device | str = "cpu") -> History:
        """Return the histories with their items' embeddings."""
        return History(
            torch.from_numpy(x0_ID[self.item_index_GL]).to(device),
            torch.from_numpy(self.like_GL).long().to(device),
            torch.from_numpy(self.age_GL).to(device),
            torch.from_numpy(self.present_GL).to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """G draws of m interactions each: B = G·m samples, and their users."""

    user_index_G: np.ndarray
    item_index_B: np.ndarray
    like_B: np.ndarray
    row_B: np.ndarray  # the draw of each sample
    history: Rated  # one per draw, without its samples

    def take(self, sample: np.ndarray) -> Self:
        """Return some samples of a batch that has one sample per draw."""
        assert len(self.user_index_G) == len(self.item_index_B)
        return replace(
            self,
            user_index_G=self.user_index_G[sample],
            item_index_B=self.item_index_B[sample],
            like_B=self.like_B[sample],
            row_B=np.arange(len(sample)),
            history=Rated(*(column[sample] for column in self.history)),
        )


class UserBlock:
    """The interactions of V users, cut from a table of histories: for training, and for validation."""

    def __init__(self, table: pa.Table, first_user_index: np.ndarray, *, training_only: bool = True) -> None:
        table = table.combine_chunks()
        columns = {
            name: table[name].combine_chunks() for name in ("item_index", "like", "timestamp", "split")
        }
        lengths = np.diff(columns["item_index"].offsets.to_numpy())
        user = np.repeat(np.arange(len(lengths)), lengths)
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()}
        kept = flat["split"] == TRAINING if training_only else np.ones(len(user), bool)
        self.item_index_N, self.like_N, self.timestamp_N = (
            flat[name][kept] for name in ("item_index", "like", "timestamp")
        )
        self.counts_V = np.bincount(user[kept], minlength=len(lengths))
        self.starts_V = np.cumsum(self.counts_V) - self.counts_V
        self.user_index_V = first_user_index[table["bucket"].to_numpy()] + table["row"].to_numpy()
        held = flat["split"] == VALIDATION
        self.held_user, self.held_item_index, self.held_like = (
            user[held],
            flat["item_index"][held],
            flat["like"][held],
        )

    def part(self, kept_N: np.ndarray) -> "UserBlock":
        """Return the same users with the interactions that `kept_N` marks."""
        block = copy.copy(self)
        user_N = np.repeat(np.arange(len(self.counts_V)), self.counts_V)
        block.item_index_N, block.like_N, block.timestamp_N = (
            values[kept_N] for values in (self.item_index_N, self.like_N, self.timestamp_N)
        )
        block.counts_V = np.bincount(user_N[kept_N], minlength=len(self.counts_V))
        block.starts_V = np.cumsum(block.counts_V) - block.counts_V
        return block

    def rated_items(self, user_G: np.ndarray) -> list[np.ndarray]:
        """Return the item rows that each user rated, in order of time."""
        stop_V = self.starts_V + self.counts_V
        return [self.item_index_N[self.starts_V[user] : stop_V[user]] for user in user_G]

    def history(
        self,
        user_G: np.ndarray,
        max_history: int,
        but_Gm: np.ndarray | None = None,
        skip_G: np.ndarray | None = None,
    ) -> Rated:
        """Return the latest `max_history` interactions of each user, without rows `but_Gm`.

        `skip_G` of the latest ones are passed over.
        """
        first_G = (self.starts_V + self.counts_V)[user_G] - 1 - (0 if skip_G is None else skip_G)
        row_GL = first_G[:, None] - np.arange(max_history)
        present_GL = row_GL >= self.starts_V[user_G, None]
        if but_Gm is not None:
            present_GL &= (row_GL[:, :, None] != but_Gm[:, None, :]).all(2)
        row_GL = np.where(present_GL, row_GL, len(self.item_index_N) - 1)
        stamp_GL = self.timestamp_N[row_GL]
        last_G = np.where(present_GL, stamp_GL, np.iinfo(np.int64).min).max(1)
        age_GL = np.where(present_GL, (last_G[:, None] - stamp_GL) / MICROSECONDS_PER_DAY, 0)
        return Rated(self.item_index_N[row_GL], self.like_N[row_GL], age_GL.astype(np.float32), present_GL)

    def batches(
        self,
        *,
        samples_per_user: int,
        with_replacement: bool,
        like_share: float | None,
        batch_size: int,
        targets: int,
        max_history: int,
        seed: tuple[int, ...],
    ) -> Iterator[Batch]:
        """Yield `samples_per_user` samples of every user in random order (paper, appendix A.1).

        Numbers are rounded up to whole draws. With replacement, users with few interactions count as much as
        others. Without it, each interaction is drawn at most once, and `targets` must be 1. For a user with
        both likes and dislikes, a fraction `like_share` of the samples are likes; None draws from all
        interactions alike. The result is a pure function of block and seed.
        """
        random = np.random.default_rng((*seed, int(self.user_index_V[0])))
        most_V = samples_per_user if with_replacement else np.minimum(samples_per_user, self.counts_V)
        draws_V = np.where(self.counts_V > 0, -(-most_V // targets), 0)
        user_G = np.repeat(np.arange(len(draws_V)), draws_V)
        user_Gm = np.repeat(user_G[:, None], targets, axis=1)
        position_Gm = random.random(user_Gm.shape)
        if not with_replacement:
            assert targets == 1
            pool_Gm = self.counts_V[user_Gm]
            target_Gm = self.targets_once(user_Gm, draws_V, random)
        elif like_share is None:
            pool_Gm = self.counts_V[user_Gm]
            target_Gm = self.starts_V[user_Gm] + (position_Gm * pool_Gm).astype(np.int64)
        else:
            target_Gm, pool_Gm = self.targets_by_like(
                user_Gm, random.random(user_Gm.shape) < like_share, position_Gm
            )
        # A history lacks its draw's targets. Users with few interactions get few targets; else training would
        # never see a short history.
        distinct_G = (pool_Gm.min(1) // POOL_PER_TARGET).clip(1, targets)
        target_Gm = np.take_along_axis(target_Gm, np.arange(targets) % distinct_G[:, None], axis=1)
        order = random.permutation(len(user_G))
        # A long history is read from any point on, so that no rating is seen as a target only.
        skip_G = (random.random(len(user_G)) * (1 + (self.counts_V[user_G] - max_history).clip(0))).astype(
            int
        )
        for part in np.array_split(order, num_batches(len(user_G), targets, batch_size)):
            yield self.batch(user_G[part], target_Gm[part], max_history, skip_G[part])

    def targets_once(
        self, user_Gm: np.ndarray, draws_V: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Return rows of each user in random order, each at most once."""
        user_N = np.repeat(np.arange(len(self.counts_V)), self.counts_V)
        shuffled_N = np.lexsort((random.random(len(user_N)), user_N))
        number_G = np.arange(len(user_Gm)) - np.repeat(np.cumsum(draws_V) - draws_V, draws_V)
        return shuffled_N[self.starts_V[user_Gm] + number_G[:, None]]

    def targets_by_like(
        self, user_Gm: np.ndarray, like_Gm: np.ndarray, position_Gm: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of likes or dislikes, as `like_Gm` says, and the user's number of rows of that kind.

        `position_Gm` (0 to 1) is the relative position among the user's rows of that kind.
        """
        user_N = np.repeat(np.arange(len(self.counts_V)), self.counts_V)
        by_like = np.lexsort((self.like_N, user_N))  # within a user: dislikes, then likes
        num_likes_V = np.bincount(user_N, weights=self.like_N, minlength=len(self.counts_V)).astype(np.int64)
        num_dislikes_V = self.counts_V - num_likes_V
        like_Gm = np.where(
            num_likes_V[user_Gm] == 0, False, np.where(num_dislikes_V[user_Gm] == 0, True, like_Gm)
        )
        count_Gm = np.where(like_Gm, num_likes_V[user_Gm], num_dislikes_V[user_Gm])
        start_Gm = self.starts_V[user_Gm] + np.where(like_Gm, num_dislikes_V[user_Gm], 0)
        return by_like[start_Gm + (position_Gm * count_Gm).astype(np.int64)], count_Gm

    def batch(
        self, user_G: np.ndarray, target_Gm: np.ndarray, max_history: int, skip_G: np.ndarray | None = None
    ) -> Batch:
        """Return the draws of some users with these targets."""
        rows = target_Gm.ravel()
        return Batch(
            user_index_G=self.user_index_V[user_G],
            item_index_B=self.item_index_N[rows],
            like_B=self.like_N[rows],
            row_B=np.repeat(np.arange(len(user_G)), target_Gm.shape[1]),
            history=self.history(user_G, max_history, but_Gm=target_Gm, skip_G=skip_G),
        )

    def held_out(self, max_history: int, limit: int, *, likes_only: bool = False) -> Batch | None:
        """Return at most `limit` interactions of the validation, evenly spaced, with training histories."""
        chosen = np.flatnonzero(self.held_like) if likes_only else np.arange(len(self.held_user))
        chosen = chosen[:: max(1, -(-len(chosen) // limit))]
        if not len(chosen):
            return None
        return Batch(
            user_index_G=self.user_index_V[self.held_user[chosen]],
            item_index_B=self.held_item_index[chosen],
            like_B=self.held_like[chosen],
            row_B=np.arange(len(chosen)),
            history=self.history(self.held_user[chosen], max_history),
        )


def num_batches(draws: int, targets: int, batch_size: int) -> int:
    return max(1, round(draws * targets / batch_size))
