"""Facts about ratings: defects, repeats, likes per user, and the rows that stay.

`Source` -> one pass -> `Ratings` (21 bytes per row) -> likes.py, look.py

Users and items are numbers from the first batch on. Twenty million ratings fit into two gigabytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.data.first_look.columns import OPTIONAL, Column
from rebeca_ray.data.first_look.sources import (
    MILLISECONDS,
    ROWS_AT_ONCE,
    JsonLines,
    Source,
    batches,
    read_types,
)
from rebeca_ray.data.interactions import FIRST_TIME, LAST_TIME
from rebeca_ray.data.validation import MAX_ID_BYTES, check_columns, check_texts
from rebeca_ray.errors import InputError
from rebeca_ray.schemas import EVENTS

CHUNKS_AT_ONCE = 16  # of codes with dictionaries of their own
UNKNOWN_TIME = np.iinfo(np.int64).min
MAX_RATING = 1e6  # that a config takes
IMPRESSION = "an impression, which teaches nothing yet"
REPEATED = "an earlier rating of the same pair; the last is kept"


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """The rows of a source, and N that stay, in the order of the file.

    `users` [U] and `items` [I] are ids; the arrays count into them. `defects` has the rows by reason.
    """

    source: Source
    columns: Mapping[str, Column]
    types: pa.Schema
    stays: np.ndarray  # [rows] bool
    defects: dict[str, int]
    users: pa.Array
    items: pa.Array
    user: np.ndarray  # [N] int32
    item: np.ndarray  # [N] int32
    rating: np.ndarray | None  # [N] float32
    first_time: datetime | None = None
    last_time: datetime | None = None
    unknown_times: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.stays)


@dataclass
class Codes:
    """Texts as numbers, added chunk by chunk."""

    chunks: list[pa.DictionaryArray] = field(default_factory=list)

    def add(self, texts: pa.Array) -> None:
        self.chunks.append(texts.dictionary_encode())
        if len(self.chunks) > CHUNKS_AT_ONCE:
            self.fold()

    def fold(self) -> None:
        merged = pa.chunked_array(self.chunks).unify_dictionaries().combine_chunks()
        self.chunks = merged.chunks if isinstance(merged, pa.ChunkedArray) else [merged]

    def finish(self) -> tuple[np.ndarray, pa.Array]:
        """Return the number of each text, int32, and the texts."""
        self.fold()
        (merged,) = self.chunks
        return merged.indices.to_numpy(), merged.dictionary


def read_ratings(source: Source, columns: Mapping[str, Column]) -> Ratings:
    """Read all ratings once. Raises InputError for a file that cannot be read and for no rows."""
    source = replace(source, columns=renamed(columns))
    types = read_types(source, {declared: column.name for declared, column in columns.items()})
    users, items = Codes(), Codes()
    stays, rating, time = [], [], []
    defects: dict[str, int] = {}
    for batch in batches(source, types):
        good = np.ones(batch.num_rows, bool)
        for reason, bad in defects_of(batch, source.uri):
            rows = good & bad.fill_null(True).to_numpy(zero_copy_only=False)
            defects[reason] = defects.get(reason, 0) + int(rows.sum())
            good &= ~rows
        batch = batch.filter(pa.array(good))
        stays.append(good)
        users.add(batch["user_id"].combine_chunks())
        items.add(batch["item_id"].combine_chunks())
        if "rating" in types.names:
            rating.append(batch["rating"].to_numpy().astype(np.float32))
        if "timestamp" in types.names:
            time.append(batch["timestamp"].cast(pa.int64()).fill_null(UNKNOWN_TIME).to_numpy())
    defects = {reason: count for reason, count in defects.items() if count}
    require_some(source, columns, stays, defects)
    (user, user_id), (item, item_id) = users.finish(), items.finish()
    all_times = np.concatenate(time) if time else None
    last = last_of_pairs(user, item, len(item_id), all_times)
    if not last.all():
        defects[REPEATED] = int((~last).sum())
    stays_in_file = np.concatenate(stays)
    stays_in_file[np.flatnonzero(stays_in_file)] = last
    known = np.array([], np.int64) if all_times is None else all_times[last]
    known = known[known > UNKNOWN_TIME]
    first_time, last_time = span_of(known)
    return Ratings(
        source=source,
        columns=columns,
        types=types,
        stays=stays_in_file,
        defects=defects,
        users=user_id,
        items=item_id,
        user=user[last],
        item=item[last],
        rating=np.concatenate(rating)[last] if rating else None,
        first_time=first_time,
        last_time=last_time,
        unknown_times=int(last.sum()) - len(known) if all_times is not None else 0,
    )


def holds_number(source: Source, column: Column) -> bool:
    """Return whether any row has a number as rating in a column. Reads up to the first one."""
    columns = {"rating": column}
    types = read_types(source, {"rating": column.name})
    parts = batches(replace(source, columns=renamed(columns)), types)
    return any(part["rating"].null_count < part.num_rows for part in parts)


def span_of(micro: np.ndarray) -> tuple[datetime | None, datetime | None]:
    """Return the first and the last of some times in microseconds."""
    if not len(micro):
        return None, None
    first, last = np.array([micro.min(), micro.max()], "datetime64[us]").tolist()
    return first, last


def defects_of(batch: pa.Table, uri: str) -> list[tuple[str, pa.ChunkedArray]]:
    """Return the reasons to leave rows out, each with the rows that have it. A row counts once."""
    reasons: list[tuple[str, pa.ChunkedArray]] = []
    for name in ("user_id", "item_id"):
        column = batch[name]
        check_texts(column, "interactions", uri, name, max_bytes=2**31)  # raises if it is not UTF-8
        reasons += [
            (f"an empty {name}", pc.equal(pc.fill_null(column, ""), "")),
            (f"a control character in {name}", pc.match_substring_regex(column, "[\\x00-\\x1f]")),
            (
                f"a {name} of more than {MAX_ID_BYTES:,} bytes",
                pc.greater(pc.binary_length(column), MAX_ID_BYTES),
            ),
        ]
    if "event" in batch.column_names:
        event = pc.fill_null(batch["event"], "")
        reasons += [
            (IMPRESSION, pc.equal(event, "impression")),
            (
                "an event that is neither rating nor impression",
                pc.invert(pc.is_in(event, value_set=pa.array(["", *EVENTS]))),
            ),
        ]
    if "rating" in batch.column_names:
        size = pc.abs(batch["rating"])
        reasons += [
            ("a rating that is no finite number", pc.invert(pc.fill_null(pc.is_finite(size), False))),
            (f"a rating beyond {MAX_RATING:,.0f}", pc.greater(size, MAX_RATING)),
        ]
    return reasons


def require_some(
    source: Source, columns: Mapping[str, Column], stays: list[np.ndarray], defects: Mapping[str, int]
) -> None:
    """Raise InputError for a source without rows, and if no row stays."""
    rows = sum(map(len, stays))
    if not rows:
        raise InputError(f"interactions {source.uri}: has no rows; give at least one")
    if not any(part.any() for part in stays):
        reasons = ", ".join(f"{count:,} have {reason}" for reason, count in defects.items())
        named = ", ".join(f"{declared} from {column.name!r}" for declared, column in columns.items())
        empty = " or ".join(f"{declared}=" for declared in OPTIONAL if declared in columns)
        leave_out = f", or leave a column out by {empty}" if empty else ""
        raise InputError(
            f"interactions {source.uri}: none of {rows:,} rows can be used ({reasons}); "
            f"read as {named}; correct the file, or name the columns by user_id=NAME{leave_out}"
        )


def last_of_pairs(user: np.ndarray, item: np.ndarray, num_items: int, time: np.ndarray | None) -> np.ndarray:
    """Return [N] bool: whether a rating is the last of its pair, in time, then in the file."""
    pair = user.astype(np.int64) * num_items + item
    ordered = np.sort(pair)
    if not (ordered[1:] == ordered[:-1]).any():
        return np.ones(len(pair), bool)
    order = np.lexsort((pair,) if time is None else (time, pair))  # stable
    is_last = np.append(np.diff(pair[order]) != 0, True)
    last = np.zeros(len(pair), bool)
    last[order[is_last]] = True
    return last


def is_in_form(ratings: Ratings) -> bool:
    """Return whether the jobs can read the file as it is, with the settings for the names of its columns."""
    source = ratings.source
    if isinstance(source, JsonLines) or source.files[0].is_csv or set(ratings.defects) - {IMPRESSION}:
        return False
    if not all(name.isprintable() for name in source.columns.values()):  # which a config cannot hold
        return False
    if any(name in source.names and name not in ratings.columns for name in OPTIONAL):  # jobs would read it
        return False
    try:
        check_columns(source, schemas.INTERACTIONS)
    except InputError:
        return False
    return "timestamp" not in ratings.types.names or has_plain_times(ratings)


def renamed(columns: Mapping[str, Column]) -> dict[str, str]:
    """Return the names of the columns that differ from the declared ones."""
    return {declared: column.name for declared, column in columns.items() if column.name != declared}


def has_plain_times(ratings: Ratings) -> bool:
    """Return whether every time is on the calendar, where the jobs take a whole number for seconds."""
    types = pa.schema([ratings.types.field("timestamp")])
    low, high = (
        (-MILLISECONDS, MILLISECONDS) if pa.types.is_integer(types[0].type) else (FIRST_TIME, LAST_TIME)
    )
    columns = (batch["timestamp"] for batch in ratings.source.batches(types, ROWS_AT_ONCE))
    ends = [pc.min_max(column.cast(pa.int64())) for column in columns]
    return all(
        pc.fill_null(pc.and_(pc.greater(end["min"], low), pc.less(end["max"], high)), True).as_py()
        for end in ends
    )
