"""Who rated what: read and validate interactions, turn ratings into likes, choose users, split off a hold-out.

Works on numpy columns, because twenty million ratings fit easily and a per-user split needs them sorted once.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.validation import (
    MAX_EXAMPLES,
    check_columns,
    check_ids,
    check_rows,
    check_texts,
    plain,
    refuse,
    row_numbers,
)
from rebeca_ray.errors import InputError, UserError
from rebeca_ray.identity import hash128
from rebeca_ray.storage.parquet import read_table

FIRST_TIME, LAST_TIME = (
    np.datetime64("0001-01-01", "us").astype(int),
    np.datetime64("9999-12-31", "us").astype(int),
)


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """N validated interactions, sorted by user and time: `like` is 0/1, `user_index` counts kept users from 0."""

    user_id: np.ndarray  # [U] of the kept users, in the order of user_index
    user_index: np.ndarray  # [N] int32
    item_id: np.ndarray  # [N] str
    like: np.ndarray  # [N] int8
    timestamp: np.ndarray  # [N] int64, microseconds; 0 where nobody knows
    held_out: np.ndarray  # [N] bool, never trained on

    @property
    def num_users(self) -> int:
        return len(self.user_id)


def read_interactions(settings: InteractionSettings) -> Interactions:
    """Read, validate, filter and split the interactions of `settings.path`, all in memory.

    Raises UserError naming the defect, how many rows have it, and examples.
    """
    found = interactions_of(read_columns(settings.path), settings)
    if not found.num_users:
        raise no_users(settings)
    return found


def no_users(settings: InteractionSettings) -> UserError:
    return InputError(
        f"interactions {settings.path}: no user has {settings.min_likes} likes; lower interactions.min_likes or interactions.like_threshold"
    )


def interactions_of(table: pa.Table, settings: InteractionSettings) -> Interactions:
    """Validate, filter and split one table that holds all interactions of its users.

    The hold-out takes the same share of every user's interactions, chosen by a hash of user and item, so that it does
    not depend on the file's order.
    """
    table = validate(table, settings)
    user_id, item_id = (
        table[name].to_numpy(zero_copy_only=False).astype(str) for name in ("user_id", "item_id")
    )
    like = likes(table, settings.like_threshold)

    users, user_of = np.unique(user_id, return_inverse=True)
    kept = np.bincount(user_of, weights=like, minlength=len(users)) >= settings.min_likes
    new_index = np.cumsum(kept) - 1
    rows = np.flatnonzero(kept[user_of])
    timestamp = (
        table["timestamp"].fill_null(0).cast(pa.int64()).to_numpy()
        if "timestamp" in table.column_names
        else np.zeros(len(like), np.int64)
    )
    rows = rows[np.lexsort((item_id[rows], timestamp[rows], user_of[rows]))]
    user_index = new_index[user_of[rows]].astype(np.int32)
    return Interactions(
        user_id=users[kept],
        user_index=user_index,
        item_id=item_id[rows],
        like=like[rows],
        timestamp=timestamp[rows],
        held_out=hold_out(users[kept], user_index, item_id[rows], settings.hold_out),
    )


def read_columns(uri: str) -> pa.Table:
    """The interaction columns of `uri` in memory, as `check_columns` finds them."""
    return normalise(
        read_table(uri, "interactions", check_columns(uri, "interactions", schemas.INTERACTIONS)), uri
    )


def normalise(table: pa.Table, uri: str) -> pa.Table:
    """The ratings of `uri` in the types of `schemas.INTERACTIONS`, without impressions. Raises UserError for times that do not fit them."""
    table = only_ratings(table, uri)
    if "timestamp" in table.column_names:
        place = table.column_names.index("timestamp")
        options = pc.CastOptions(
            schemas.INTERACTIONS.field("timestamp").type, allow_time_truncate=True
        )  # below a microsecond nothing is lost
        try:
            table = table.set_column(place, "timestamp", pc.cast(plain(table["timestamp"]), options=options))
        except pa.ArrowInvalid:
            raise off_the_calendar(uri) from None
    if "rating" in table.column_names:  # one that is too large for the type is off the scale too
        table = table.set_column(
            table.column_names.index("rating"),
            "rating",
            plain(table["rating"]).cast(pa.float32(), safe=False),
        )
    return table.cast(
        pa.schema([schemas.INTERACTIONS.field(name).with_nullable(True) for name in table.column_names])
    )


def only_ratings(table: pa.Table, uri: str) -> pa.Table:
    """Without the rows that only say that something was shown, and without `event`. Raises UserError for an event of another name."""
    if "event" not in table.column_names:
        return table
    event = pc.fill_null(plain(table["event"]), "")
    check_texts(event, "interactions", uri, "event")
    bad = pc.invert(pc.is_in(event, value_set=pa.array(["", *schemas.EVENTS])))
    refuse(
        "interactions",
        uri,
        bad,
        "an event that is neither rating nor impression",
        row_numbers(bad),
        "name it so, or leave it null",
    )
    return table.filter(pc.not_equal(event, "impression")).drop_columns(["event"])


def off_the_calendar(uri: str) -> UserError:
    return InputError(
        f"interactions {uri}: column 'timestamp' leaves the years 1 to 9999; look at its unit, mend it or drop it"
    )


def validate(table: pa.Table, settings: InteractionSettings) -> pa.Table:
    """Refuse empty ids, ratings off the scale, and repeated (user, item) pairs, with counts and examples."""
    uri = settings.path
    check_rows(table, "interactions", uri)
    for name in ("user_id", "item_id"):
        check_ids(table[name], "interactions", uri, name)
    if "timestamp" in table.column_names:
        ends = pc.min_max(table["timestamp"].cast(pa.int64())).as_py()
        if ends["min"] is not None and (ends["min"] < FIRST_TIME or ends["max"] > LAST_TIME):
            raise off_the_calendar(uri)
    if "rating" in table.column_names:
        bad = pc.invert(pc.fill_null(pc.is_finite(table["rating"]), False))
        refuse(
            "interactions",
            uri,
            bad,
            "a rating that is null, NaN or infinite",
            examples(table, bad),
            "drop them, or drop the column if every row is a like",
        )
        low, high = settings.rating_scale
        bad = pc.or_(pc.less(table["rating"], low), pc.greater(table["rating"], high))
        refuse(
            "interactions",
            uri,
            bad,
            f"a rating outside {low:g} to {high:g}",
            examples(table, bad),
            "mend them, or set interactions.rating_scale and interactions.like_threshold to yours",
        )
    pair = pc.binary_join_element_wise(table["user_id"], table["item_id"], "\x1f")
    codes = pc.dictionary_encode(pair).combine_chunks()
    indices = codes.indices.to_numpy()
    repeated = np.ones(len(indices), bool)
    repeated[np.unique(indices, return_index=True)[1]] = False
    refuse(
        "interactions",
        uri,
        pa.array(repeated),
        "a (user_id, item_id) pair seen before",
        examples(table, pa.array(repeated)),
        "keep one rating a pair, the latest say",
    )
    return table


def examples(table: pa.Table, bad: pa.Array) -> str:
    rows = table.filter(bad).slice(0, MAX_EXAMPLES).select(["user_id", "item_id"]).to_pylist()
    return "; ".join(f"{row['user_id'][:40]} × {row['item_id'][:40]}" for row in rows)


def likes(table: pa.Table, threshold: float) -> np.ndarray:
    """1 where rating >= threshold (paper, section 4.1); all 1 if there is no rating column. [N] int8."""
    if "rating" not in table.column_names:
        return np.ones(table.num_rows, np.int8)
    return (table["rating"].to_numpy() >= threshold).astype(np.int8)


def hold_out(user_id: np.ndarray, user_index: np.ndarray, item_id: np.ndarray, share: float) -> np.ndarray:
    """True for `floor(share * count)` interactions of each user, those with the smallest hash of (user, item)."""
    pairs = zip(user_id[user_index], item_id, strict=True)
    keys = np.fromiter((int(hash128(user, item)[:16], 16) for user, item in pairs), np.uint64, len(item_id))
    order = np.lexsort((keys, user_index))
    counts = np.bincount(user_index, minlength=len(user_id))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(len(order)) - starts[user_index[order]]
    held = np.zeros(len(order), bool)
    held[order] = place < np.floor(share * counts)[user_index[order]]
    return held


def history_digests(interactions: Interactions) -> list[str]:
    """One digest a user of the whole history, times and hold-out included, to tell later whether it changed."""
    bounds = np.searchsorted(interactions.user_index, np.arange(interactions.num_users + 1))
    told = [
        f"{item}={like}@{at}"
        for item, like, at in zip(
            interactions.item_id, interactions.like, interactions.timestamp, strict=True
        )
    ]
    return [hash128(*told[start:stop]) for start, stop in pairwise(bounds)]
