"""Read the ratings of a study: likes to compare with, and the ratings that a verifier may see.

Shapes: V users of the interactions, N ratings, I items, D embed dim.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.histories import histories_table, index_items, known_items
from rebeca_ray.data.interactions import (
    Interactions,
    interactions_of,
    no_users,
    open_interactions,
    read_columns,
)
from rebeca_ray.data.items import EmbeddedItems
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.independence import VerifierParts, ratings_for_verifier
from rebeca_ray.evaluation.verifier import Ratings
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.schemas import TEST, TRAINING


@dataclass(frozen=True, kw_only=True)
class StudyRatings:
    """All ratings of items with embeddings, sorted by user, and the parts of the verifier."""

    interactions: Interactions
    items: EmbeddedItems
    item_N: np.ndarray  # row of the item
    parts: VerifierParts

    def verifier_ratings(self, chosen_N: np.ndarray) -> Ratings:
        """Return some of the ratings in the form that the verifier takes."""
        return Ratings(
            self.interactions.user_index[chosen_N], self.item_N[chosen_N], self.interactions.like[chosen_N]
        )

    def block(self, chosen_N: np.ndarray) -> UserBlock:
        """Return all users with some of the ratings, in the form that training reads."""
        interactions = self.interactions
        chosen = Interactions(
            user_id=interactions.user_id,
            user_index=interactions.user_index[chosen_N],
            item_id=interactions.item_id[chosen_N],
            like=interactions.like[chosen_N],
            timestamp=interactions.timestamp[chosen_N],
            split=np.full(int(chosen_N.sum()), TRAINING, np.int8),
        )
        return UserBlock(histories_table(chosen, self.item_N[chosen_N], bucket=0), np.zeros(1, int))

    def rows_of(self, user: int, split: int | None = None, *, liked: bool = False) -> np.ndarray:
        """Return the item rows that a user rated, in one split or in all, or those they liked there."""
        start, stop = np.searchsorted(self.interactions.user_index, [user, user + 1])
        chosen = np.ones(stop - start, bool)
        if split is not None:
            chosen &= self.interactions.split[start:stop] == split
        if liked:
            chosen &= self.interactions.like[start:stop] == 1
        return self.item_N[start:stop][chosen]

    def likes_of_training(self, user: int) -> np.ndarray:
        """Return the item rows of a user's likes that the prior learned from."""
        return self.rows_of(user, TRAINING, liked=True)

    def likes_of_test(self, user: int) -> np.ndarray:
        """Return the item rows of a user's likes that neither the prior nor its selector saw."""
        return self.rows_of(user, TEST, liked=True)

    def test_ratings(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the item rows of a user's test ratings, and the likes beside them."""
        start, stop = np.searchsorted(self.interactions.user_index, [user, user + 1])
        chosen = self.interactions.split[start:stop] == TEST
        return self.item_N[start:stop][chosen], self.interactions.like[start:stop][chosen]


def read_ratings(settings: InteractionSettings, items: EmbeddedItems) -> StudyRatings:
    """Read the interactions of `settings` whose items have embeddings.

    Raises InputError without a test split, and as `read_interactions` does.
    """
    if not settings.test:
        raise InputError(
            f"interactions {settings.path}: interactions.test is 0; "
            "set it to the value of the training, to judge by ratings that the generator did not see"
        )
    item_id = pa.array(items.item_id, pa.string())
    interactions = interactions_of(
        known_items(read_columns(open_interactions(settings)), item_id, settings), settings
    )
    if not interactions.num_users:
        raise no_users(settings)
    item_N = index_items(interactions, item_id, settings.path)
    user_id_N = interactions.user_id[interactions.user_index]
    parts = ratings_for_verifier(interactions.split, user_id_N, interactions.item_id)
    return StudyRatings(interactions=interactions, items=items, item_N=item_N, parts=parts)
