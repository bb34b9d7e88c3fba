"""Votes: ratings that a person gives by hand, appended to a Parquet file of interactions.

votes -> the file with them, swapped for the file before -> the interactions of the next night
"""

import io
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import open_interactions
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError, StorageError, describe
from rebeca_ray.storage.columns import convert
from rebeca_ray.storage.filesystem import storage_errors
from rebeca_ray.storage.store import open_store

MAX_BYTES = 64 * 2**20  # of the file, which is read and written as a whole
ATTEMPTS = 5


def append_votes(
    uri: str,
    user_id: str,
    votes: Mapping[str, bool],
    settings: InteractionSettings,
    rated: Collection[str] = (),
) -> int:
    """Append a user's votes to the Parquet file `uri`, which may be new. Return the rows of the file.

    A like is the highest rating of the scale, a dislike the lowest one. A vote takes the place of an earlier
    row of the same user and item. `rated` are the items that the interactions hold of the user: among files
    of one folder, a rating stands in one file alone. Another writer's rows are kept: the file changes only
    from the version that was read. Raises InputError for a file that is too large, that holds no
    interactions, or cannot hold the votes, StorageError if others write to it all the time.
    """
    store = open_store(uri)
    for _ in range(ATTEMPTS):
        with storage_errors(uri, "read"):
            require_small(
                uri, store.filesystem.size(store.path) if store.filesystem.exists(store.path) else 0
            )
            before = store.read_versioned()
        data, version = before or (b"", None)
        table = read_file(uri, data, settings)
        sink = io.BytesIO()
        try:
            table = with_votes(table, uri, user_id, votes, settings, rated)
            pq.write_table(table, sink, compression="zstd")
        except pa.ArrowException as error:
            raise InputError(
                f"feedback {uri}: its columns cannot hold a rating ({describe(error)}); give another file"
            ) from None
        with storage_errors(uri):
            if store.compare_and_swap(sink.getvalue(), version):
                return table.num_rows
    raise StorageError(f"feedback {uri}: others write to it all the time; try again, or give another file")


def require_small(uri: str, size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(
            f"feedback {uri}: has {size // 2**20} MiB, expected at most {MAX_BYTES // 2**20}; "
            "give another file of the same folder"
        )


def read_file(uri: str, data: bytes, settings: InteractionSettings) -> pa.Table:
    """Return the rows of the file so far. A new one has the columns of the interactions, and no row."""
    if not data:
        names = settings.columns.model_dump(exclude_none=True)
        columns = check_columns(open_interactions(settings), schemas.INTERACTIONS)
        fields = [schemas.INTERACTIONS.field(name) for name in columns.names]
        renamed = [field.with_name(names.get(field.name, field.name)) for field in fields]
        return pa.schema(renamed).empty_table()
    try:
        return pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise InputError(
            f"feedback {uri}: is no Parquet file ({describe(error)}); give one, or a new name"
        ) from None


def with_votes(
    table: pa.Table,
    uri: str,
    user_id: str,
    votes: Mapping[str, bool],
    settings: InteractionSettings,
    rated: Collection[str],
) -> pa.Table:
    """Return the rows with the votes in place of earlier ones. Raises an Arrow error for unfit columns."""
    names = {name: name for name in schemas.INTERACTIONS.names}
    names |= settings.columns.model_dump(exclude_none=True)
    for name in ("user_id", "item_id"):
        if names[name] not in table.column_names:
            raise InputError(
                f"feedback {uri}: column {names[name]!r} is missing, there are "
                f"{', '.join(table.column_names)}; give a file of interactions"
            )
    if names["rating"] not in table.column_names and not all(votes.values()):
        raise InputError(
            f"feedback {uri}: has no ratings, each row is a like, so it cannot hold a dislike; "
            "save likes alone, or give a file with ratings"
        )
    user, item = (texts(table[names[name]]) for name in ("user_id", "item_id"))
    is_user = pc.fill_null(pc.equal(user, user_id), False)
    elsewhere = {*votes} & {*rated} - {*item.filter(is_user).to_pylist()}
    if elsewhere and is_among(uri, settings.path):
        raise InputError(
            f"feedback {uri}: another file of {settings.path} holds the user's rating of item "
            f"{min(elsewhere)}; remove that rating, or leave this vote out"
        )
    dislike, like = settings.rating_scale
    now = pa.array([datetime.now(UTC).replace(tzinfo=None, microsecond=0)] * len(votes), pa.timestamp("s"))
    values = {
        "user_id": pa.array([user_id] * len(votes)),
        "item_id": pa.array([*votes]),
        "rating": pa.array([like if liked else dislike for liked in votes.values()], pa.float64()),
        "timestamp": now,  # as a number, it counts seconds
        "event": pa.array(["rating"] * len(votes)),
    }
    column_of = {names[name]: column for name, column in values.items()}
    rows = [
        column_of[field.name].cast(field.type)
        if field.name in column_of
        else pa.nulls(len(votes), field.type)
        for field in table.schema
    ]
    is_voted = pc.is_in(item, value_set=pa.array(votes, pa.string()))
    repeated = pc.and_(is_user, is_voted)
    return pa.concat_tables([table.filter(pc.invert(repeated)), pa.table(rows, schema=table.schema)])


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of ids, of any type that the jobs read, as texts."""
    return pa.chunked_array([convert(chunk, pa.string()) for chunk in column.chunks], pa.string())


def is_among(uri: str, folder: str) -> bool:
    """Return whether a file is among those of the interactions."""
    return f"{uri}/".startswith(f"{folder.rstrip('/')}/")
