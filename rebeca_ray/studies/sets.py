"""Read the sets of items that a study compares: one set per catalog, each item with its user.

Shapes: U users, N items of all users, S items of one user, D embed dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.evaluation import MIN_USERS
from rebeca_ray.errors import InputError

TrueLike = Callable[[list[str], list[bytes]], np.ndarray]  # (user of each image, encoded images) -> [N]

COLUMNS = ["user_id", "rank", "item_id", "image_embeds", "image_file", "image_row"]


@dataclass(frozen=True, kw_only=True)
class ItemSet:
    """Items for the users of a study, sorted by user and rank. All users have at least two items."""

    name: str
    description: str
    user_id: list[str]
    user_N: np.ndarray  # row of the user, rising
    item_id: list[str]
    embeds_ND: np.ndarray  # as they were planned
    encoded: list[bytes]

    def by_user(self, values_N: np.ndarray) -> list[np.ndarray]:
        """Return values of the items, split by user."""
        return np.split(values_N, np.flatnonzero(np.diff(self.user_N)) + 1)

    def mean_by_user(self, values_N: np.ndarray) -> np.ndarray:
        """Return the mean of a figure over each user's items [U]."""
        return np.bincount(self.user_N, values_N) / np.bincount(self.user_N)

    def of_users(self, chosen_U: Sequence[int]) -> "ItemSet":
        """Return the items of some users, whose rows are rising."""
        rows = np.flatnonzero(np.isin(self.user_N, chosen_U))
        return replace(
            self,
            user_id=[self.user_id[user] for user in chosen_U],
            user_N=np.searchsorted(chosen_U, self.user_N[rows]),
            item_id=[self.item_id[row] for row in rows.tolist()],
            embeds_ND=self.embeds_ND[rows],
            encoded=[self.encoded[row] for row in rows.tolist()],
        )

    def owners(self) -> list[str]:
        """Return the user of each item."""
        return [self.user_id[user] for user in self.user_N.tolist()]

    def rows_of(self, user: int) -> np.ndarray:
        """Return the rows of a user's items, best first."""
        return np.flatnonzero(self.user_N == user)


def users_of_snapshot(snapshot: Snapshot) -> set[str]:
    """Return the users with two items or more. The population pool is no user."""
    items = snapshot.items(["user_id"])
    counts = items["user_id"].value_counts()
    several = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    return set(several) - {POPULATION_USER}


def choose_users(snapshots: Sequence[Snapshot], judged: Sequence[str], most: int) -> list[str]:
    """Return users with items in every snapshot, among those whom the ratings can judge.

    More than `most` are thinned out evenly, in the order of their ids. Raises InputError for too few users.
    """
    shared = set.intersection(*(users_of_snapshot(snapshot) for snapshot in snapshots))
    users = sorted(shared & set(judged))
    if len(users) < MIN_USERS:
        roots = " and ".join(snapshot.root for snapshot in snapshots)
        raise InputError(
            f"catalog {roots}: {len(shared)} users with two items or more, {len(users)} of them with a liked "
            f"test rating and a rating for the verifier; expected at least {MIN_USERS}; generate for more "
            "users, or raise interactions.test"
        )
    return [users[row] for row in np.linspace(0, len(users) - 1, min(most, len(users))).astype(int)]


def read_set(name: str, snapshot: Snapshot, users: list[str]) -> ItemSet:
    """Return the items of some users of a snapshot, with their encoded images."""
    items = snapshot.items(COLUMNS, users).sort_by([("user_id", "ascending"), ("rank", "ascending")])
    column = items["image_embeds"].combine_chunks()
    manifest = snapshot.manifest
    return ItemSet(
        name=name,
        description=f"catalog {snapshot.root}, run {manifest.run_id} of {manifest.run_date}",
        user_id=users,
        user_N=pc.index_in(items["user_id"].combine_chunks(), value_set=pa.array(users)).to_numpy(),
        item_id=items["item_id"].to_pylist(),
        embeds_ND=column.flatten().to_numpy().reshape(len(column), -1).copy(),  # that torch may write to
        encoded=snapshot.images(items),
    )
