"""Interactions: read and validate them, turn ratings into likes, select users, split off validation and test.

The columns are numpy arrays: twenty million ratings fit into memory, and a split per user needs one sort.
"""

import datetime
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
    refuse,
    row_numbers,
)
from rebeca_ray.errors import InputError
from rebeca_ray.identity import hash128, read_user_key
from rebeca_ray.schemas import TEST, TRAINING, VALIDATION
from rebeca_ray.storage.parquet import ParquetInput, open_table

FIRST_TIME, LAST_TIME = (
    np.datetime64("0001-01-01", "us").astype(int),
    np.datetime64("9999-12-31", "us").astype(int),
)


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """N validated interactions of U selected users, sorted by user and time."""

    user_id: np.ndarray  # [U] of str, in the order of user_index
    user_index: np.ndarray  # [N] int32, counts the selected users from 0
    item_id: np.ndarray  # [N] of str
    like: np.ndarray  # [N] int8, 0 or 1
    timestamp: np.ndarray  # [N] int64, microseconds; 0 for an unknown time
    split: np.ndarray  # [N] int8: TRAINING, VALIDATION or TEST

    @property
    def num_users(self) -> int:
        return len(self.user_id)


def read_interactions(settings: InteractionSettings) -> Interactions:
    """Read, validate, filter and split the interactions of `settings.path`, all in memory.

    Raises InputError, naming the defect, the number of rows that have it, and examples.
    """
    interactions = interactions_of(read_columns(open_interactions(settings)), settings)
    if not interactions.num_users:
        raise no_users(settings)
    return interactions


def no_users(settings: InteractionSettings) -> InputError:
    """Return the error for interactions without any user of enough likes."""
    return InputError(
        f"interactions {settings.path}: no user has at least {settings.min_likes} likes; "
        "lower interactions.min_likes or interactions.like_threshold"
    )


def interactions_of(table: pa.Table, settings: InteractionSettings) -> Interactions:
    """Validate, filter and split one table that holds all interactions of its users.

    The hold-out takes the same share of the interactions of every user. A hash of user and item selects them,
    so the order of the file does not matter.
    """
    table = recent(validate(table, settings), settings)
    users, user_of = sorted_values(table["user_id"])
    items, item_of = sorted_values(table["item_id"])
    like = likes(table, settings.like_threshold)

    # Users with too few likes go, and the others are counted from 0.
    selected = np.bincount(user_of, weights=like, minlength=len(users)) >= settings.min_likes
    new_index = np.cumsum(selected) - 1
    rows = np.flatnonzero(selected[user_of])
    timestamp = (
        table["timestamp"].fill_null(0).cast(pa.int64()).to_numpy()
        if "timestamp" in table.column_names
        else np.zeros(len(like), np.int64)
    )
    # By user, then by time. Between equal times a hash decides: a long history without times is cut to a
    # random sample, not to the items whose names come last.
    order, held_key = pair_hashes(users[user_of[rows]], items[item_of[rows]])
    by_time = np.lexsort((order, timestamp[rows], user_of[rows]))
    rows, held_key = rows[by_time], held_key[by_time]
    user_index = new_index[user_of[rows]].astype(np.int32)
    item_id = items[item_of[rows]]
    return Interactions(
        user_id=users[selected],
        user_index=user_index,
        item_id=item_id,
        like=like[rows],
        timestamp=timestamp[rows],
        split=split(held_key, user_index, int(selected.sum()), settings.hold_out, settings.test),
    )


def recent(table: pa.Table, settings: InteractionSettings) -> pa.Table:
    """Return the ratings that are young enough. Raises InputError for an age without a column of times."""
    since = settings.since()
    if since is None:
        return table
    if "timestamp" not in table.column_names:
        raise InputError(
            f"interactions {settings.path}: column 'timestamp' is missing, but interactions.max_age_days is "
            f"{settings.max_age_days}; give the times of the ratings, or set it to null"
        )
    first = pa.scalar(datetime.datetime.combine(since, datetime.time()), table["timestamp"].type)
    return table.filter(pc.fill_null(pc.greater_equal(table["timestamp"], first), False))


def sorted_values(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of texts, sorted and each once, and the position of each row's value.

    The values are Python objects: in an array of numpy's text, the longest would set the size of all.
    """
    encoded = column.dictionary_encode().combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    values = encoded.dictionary.take(pa.array(order)).to_numpy(zero_copy_only=False)
    return values, position[encoded.indices.to_numpy()]


def open_interactions(settings: InteractionSettings) -> ParquetInput:
    """Open the interactions, in Parquet or CSV files, with the settings' names of their columns.

    With `user_key`, every read gives pseudonyms for users.
    """
    return open_table(
        settings.path,
        "interactions",
        columns=settings.columns.model_dump(exclude_none=True),
        user_key=read_user_key(settings.user_key),
    )


def read_columns(interactions: ParquetInput) -> pa.Table:
    """Read the interaction columns of the input. Raises as `check_columns` and `normalise` do."""
    columns = check_columns(interactions, schemas.INTERACTIONS)
    return normalise(interactions.read(columns), interactions.uri)


def normalise(table: pa.Table, uri: str) -> pa.Table:
    """Return the ratings of `uri` in the types of `schemas.INTERACTIONS`, without impressions."""
    table = only_ratings(table, uri)
    # A rating too large for the type becomes infinite, and `validate` refuses it as off the scale.
    return table.cast(
        pa.schema([schemas.INTERACTIONS.field(name).with_nullable(True) for name in table.column_names]),
        safe=False,
    )


def only_ratings(table: pa.Table, uri: str) -> pa.Table:
    """Return a table without impressions and without `event`. Raises InputError for an unknown event."""
    if "event" not in table.column_names:
        return table
    event = pc.fill_null(table["event"], "")
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


def off_the_calendar(uri: str) -> InputError:
    """Return the error for times outside the years 1 to 9999."""
    return InputError(
        f"interactions {uri}: column 'timestamp' leaves the years 1 to 9999; "
        "check its unit, correct it or drop it"
    )


def validate(table: pa.Table, settings: InteractionSettings) -> pa.Table:
    """Return the table. Raises InputError for empty ids, ratings off the scale, and repeated pairs."""
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
            "correct them, or set interactions.rating_scale and interactions.like_threshold to yours",
        )

    # The first row of each pair is fine, and every later one repeats it.
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
        "keep one rating per pair, for example the latest",
    )
    return table


def examples(table: pa.Table, bad: pa.Array) -> str:
    """Return the items of the first bad rows, as an error shows them. Errors name no user."""
    items = table["item_id"].filter(bad).slice(0, MAX_EXAMPLES).to_pylist()
    return "of the items " + ", ".join(item[:40] for item in items)


def likes(table: pa.Table, threshold: float) -> np.ndarray:
    """Return [N] int8: 1 where rating >= threshold (paper, section 4.1), or all 1 without a rating column."""
    if "rating" not in table.column_names:
        return np.ones(table.num_rows, np.int8)
    return (table["rating"].to_numpy() >= threshold).astype(np.int8)


def pair_hashes(user_id: np.ndarray, item_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two independent hashes of each pair of user and item, each [N] uint64."""
    digests = (hash128(user, item) for user, item in zip(user_id, item_id, strict=True))
    halves = np.fromiter(
        (int(half, 16) for digest in digests for half in (digest[:16], digest[16:])),
        np.uint64,
        2 * len(item_id),
    )
    return halves[1::2], halves[::2]


def split(
    key: np.ndarray, user_index: np.ndarray, num_users: int, validation: float, test: float
) -> np.ndarray:
    """Return [N] int8: the split of each interaction.

    The `test` interactions of each user with the least keys are for the test, the following `validation` ones
    for validation. Each number is a fraction of the user's interactions, rounded down, or a whole number. At
    least one interaction of each user is left for training.
    """
    order = np.lexsort((key, user_index))
    counts = np.bincount(user_index, minlength=num_users)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    position = np.arange(len(order)) - starts[user_index[order]]
    num_test, num_validation = (
        np.floor(share * counts) if share < 1 else np.full(num_users, share) for share in (test, validation)
    )
    bounds = np.minimum(np.stack([num_test, num_test + num_validation]), counts - 1)[:, user_index[order]]
    of_row = np.empty(len(order), np.int8)
    of_row[order] = np.select(list(position < bounds), [TEST, VALIDATION], TRAINING)
    return of_row


def history_digests(interactions: Interactions) -> list[str]:
    """Return one digest per user. It changes with the items, likes and times of the history."""
    bounds = np.searchsorted(interactions.user_index, np.arange(interactions.num_users + 1))
    entries = [
        f"{item}={like}@{at}"
        for item, like, at in zip(
            interactions.item_id, interactions.like, interactions.timestamp, strict=True
        )
    ]
    return [hash128(*entries[start:stop]) for start, stop in pairwise(bounds)]
