"""Who rated what: read and validate interactions, turn ratings into likes, choose users, split off a hold-out.

Works on numpy columns, because twenty million ratings fit easily and a per-user split needs them sorted once.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.errors import UserError, did_you_mean
from rebeca_ray.identity import hash128
from rebeca_ray.schemas import compatible
from rebeca_ray.settings import InteractionSettings
from rebeca_ray.storage import open_table, read_table

MAX_EXAMPLES = 3


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
    return UserError(
        f"interactions {settings.path}: no user has {settings.min_likes} likes; lower interactions.min_likes or interactions.like_threshold"
    )


def interactions_of(table: pa.Table, settings: InteractionSettings) -> Interactions:
    """Validate, filter and split one table that holds all interactions of its users.

    The hold-out takes the same share of every user's interactions, chosen by a hash of user and item, so that it does
    not depend on the file's order.
    """
    table = validate(table, settings)
    user_id, item_id = (table[name].to_numpy(zero_copy_only=False).astype(str) for name in ("user_id", "item_id"))
    like = likes(table, settings.like_threshold)

    users, user_of = np.unique(user_id, return_inverse=True)
    kept = np.bincount(user_of, weights=like, minlength=len(users)) >= settings.min_likes
    new_index = np.cumsum(kept) - 1
    rows = np.flatnonzero(kept[user_of])
    timestamp = (
        table["timestamp"].fill_null(0).cast(pa.int64()).to_numpy() if "timestamp" in table.column_names else np.zeros(len(like), np.int64)
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
    return normalise(read_table(uri, "interactions", check_columns(uri)))


def check_columns(uri: str) -> list[str]:
    """The interaction columns that `uri` has, with a clear error for a missing or mistyped one."""
    _, found = open_table(uri, "interactions")
    columns = []
    for field in schemas.INTERACTIONS:
        if field.name not in found.names:
            if field.nullable:
                continue
            raise UserError(f"interactions {uri}: column {field.name!r} is missing; {did_you_mean(field.name, found.names)}")
        actual = found.field(field.name).type
        if not compatible(actual, field.type):
            raise UserError(f"interactions {uri}: column {field.name!r} is {actual}, expected {field.type}; cast it and write again")
        columns.append(field.name)
    return columns


def normalise(table: pa.Table) -> pa.Table:
    """Interaction columns in the types of `schemas.INTERACTIONS`."""
    if "timestamp" in table.column_names:  # below a microsecond nothing is lost that matters
        place = table.column_names.index("timestamp")
        table = table.set_column(place, "timestamp", table["timestamp"].cast(schemas.INTERACTIONS.field("timestamp").type, safe=False))
    return table.cast(pa.schema([schemas.INTERACTIONS.field(name).with_nullable(True) for name in table.column_names]))


def validate(table: pa.Table, settings: InteractionSettings) -> pa.Table:
    """Refuse empty ids, ratings off the scale, and repeated (user, item) pairs, with counts and examples."""
    uri = settings.path
    if table.num_rows == 0:
        raise UserError(f"interactions {uri}: has no rows; give at least one rating")
    for name in ("user_id", "item_id"):
        bad = pc.or_kleene(pc.is_null(table[name]), pc.equal(pc.fill_null(table[name], ""), ""))
        refuse(uri, bad, f"an empty {name}", row_numbers(bad), "drop or fill them")
    if "rating" in table.column_names:
        bad = pc.invert(pc.fill_null(pc.is_finite(table["rating"]), False))
        refuse(
            uri, bad, "a rating that is null, NaN or infinite", examples(table, bad), "drop them, or drop the column if every row is a like"
        )
        low, high = settings.rating_scale
        bad = pc.or_(pc.less(table["rating"], low), pc.greater(table["rating"], high))
        refuse(
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
        uri,
        pa.array(repeated),
        "a (user_id, item_id) pair seen before",
        examples(table, pa.array(repeated)),
        "keep one rating a pair, the latest say",
    )
    return table


def refuse(uri: str, bad: pa.Array, what: str, shown: str, remedy: str) -> None:
    count = pc.sum(bad).as_py() or 0
    if count:
        raise UserError(f"interactions {uri}: {count} of {len(bad)} rows have {what} ({shown}); {remedy}")


def row_numbers(bad: pa.Array) -> str:
    rows = np.flatnonzero(bad.to_numpy(zero_copy_only=False))[:MAX_EXAMPLES]
    return "rows " + ", ".join(str(row) for row in rows)


def examples(table: pa.Table, bad: pa.Array) -> str:
    rows = table.filter(bad).slice(0, MAX_EXAMPLES).select(["user_id", "item_id"]).to_pylist()
    return "; ".join(f"{row['user_id']} × {row['item_id']}" for row in rows)


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
    told = [f"{item}={like}@{at}" for item, like, at in zip(interactions.item_id, interactions.like, interactions.timestamp, strict=True)]
    return [hash128(*told[start:stop]) for start, stop in pairwise(bounds)]
