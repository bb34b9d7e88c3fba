"""Load the vectors of users for planning: from their histories, or from the prior's table of users.

rows of decisions + histories of their buckets + embeddings of rated items -> user tokens, selector factors
rows of decisions with an item + embeddings of real items -> the given items

Shapes: G users, I items that may have been rated, D embed dim.
"""

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rebeca_ray.data.histories import Histories
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.sampling import USERS_PADDED_TO
from rebeca_ray.prior.selector import MAX_HISTORY
from rebeca_ray.prior.user_blocks import Rated, UserBlock
from rebeca_ray.prior.users import History, UserVectors
from rebeca_ray.prior.variants import Variants
from rebeca_ray.storage.parquet import read_table

ROWS_AT_ONCE = 50_000


class UserLoader:
    """Loads the vectors of some users at a time.

    `rated_ID` are the embeddings of all items that may have been rated: real ones, then generated ones.
    With `training_only`, the ratings that training held out are left out.
    """

    def __init__(
        self,
        prior: TrainedPrior,
        histories: Histories | None,
        rated_ID: np.ndarray | None,
        device: str,
        *,
        training_only: bool = False,
    ) -> None:
        self.prior, self.histories, self.device = prior, histories, device
        self.training_only = training_only
        self.scaled_ID = None if rated_ID is None else scaled(prior, rated_ID)  # once for all users
        user_ids = [] if prior.users is None else prior.users["user_id"].to_pylist()
        self.user_index = {user: index for index, user in enumerate(user_ids)}

    def load(self, users: pa.Table) -> UserVectors:
        """Return the vectors of rows of `schemas.DECISIONS`, followed by rows of padding."""
        # Matrix products of a few rows round differently, hence the padding.
        padding = -users.num_rows % USERS_PADDED_TO
        user_ids = users["user_id"].to_pylist()
        index_G = np.array([self.user_index.get(user, -1) for user in user_ids] + [-1] * padding)
        history = self.load_history(users, padding)
        latest = None if history is None else history.latest(self.prior.settings.max_history)
        token_GUH = self.prior.user_tokens(index_G, latest)
        return UserVectors(
            token_GUH=token_GUH,
            factor_GF=self.selector_factors(index_G, history),
            num_ratings_G=self.num_ratings(latest),
        )

    def load_variants(self, users: pa.Table, real_item_id: pa.Array | None) -> Variants | None:
        """Return the given items of rows of `schemas.DECISIONS`; None if there is none among them."""
        if self.scaled_ID is None or real_item_id is None or users["item_id"].null_count == users.num_rows:
            return None
        row_G = pc.index_in(users["item_id"], value_set=real_item_id).fill_null(-1).to_numpy()
        return Variants(
            row_G=row_G,
            item_GD=torch.from_numpy(self.scaled_ID[row_G]),
            strength_G=users["strength"].fill_null(1.0).to_numpy(),
        )

    def num_ratings(self, history: History | None) -> torch.Tensor | None:
        """Return the number of ratings [G] behind the tokens; None if the tokens do not come from ratings."""
        if history is None or self.prior.settings.user_encoder != "history":
            return None
        return history.present_BL.sum(1)

    def selector_factors(self, index_G: np.ndarray, history: History | None) -> torch.Tensor | None:
        """Return the selector's factors [G, F+1], from histories or the table; 0 for users without a row."""
        selector = self.prior.selector
        if selector is None:
            return None
        if history is not None:
            return selector.user_factors(history.latest(MAX_HISTORY))
        if selector.rows_VF is None:
            return None
        is_known_G1 = torch.from_numpy(index_G >= 0)[:, None].to(selector.rows_VF.device)
        return selector.rows_VF[index_G.clip(min=0)] * is_known_G1

    def load_history(self, users: pa.Table, padding: int) -> History | None:
        """Return the histories of `users` in the prior's space; cold-start users have empty ones."""
        if self.histories is None or self.scaled_ID is None:
            return None
        max_history = max(self.prior.settings.max_history, MAX_HISTORY)
        rated = Rated.nothing(users.num_rows + padding, max_history)
        user_ids, bucket_G = users["user_id"].to_pylist(), users["histories_bucket"].to_numpy()
        for bucket in np.unique(bucket_G).tolist():
            block, position_of = read_bucket(self.histories.file(bucket), self.training_only)
            rows = [row for row in np.flatnonzero(bucket_G == bucket) if user_ids[row] in position_of]
            if not rows:
                continue
            positions = np.array([position_of[user_ids[row]] for row in rows])
            for column, values in zip(rated, block.history(positions, max_history), strict=True):
                column[rows] = values
        return rated.look_up(self.scaled_ID, self.device)


def scaled(prior: TrainedPrior, embeds_ID: np.ndarray) -> np.ndarray:
    """Return embeddings in the prior's space. Temporary arrays hold a part of the rows alone."""
    scaled_ID = np.empty_like(embeds_ID)
    for start in range(0, len(embeds_ID), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        scaled_ID[rows] = prior.scaler.scale(torch.from_numpy(embeds_ID[rows])).numpy()
    return scaled_ID


@lru_cache(maxsize=2)
def read_bucket(uri: str, training_only: bool) -> tuple[UserBlock, dict[str, int]]:
    """Return the histories of one bucket, and the position of each of its users."""
    table = read_table(uri, "histories")
    first_user_index = np.zeros(table["bucket"][0].as_py() + 1 if table.num_rows else 1, int)
    positions = {user: position for position, user in enumerate(table["user_id"].to_pylist())}
    return UserBlock(table, first_user_index, training_only=training_only), positions
