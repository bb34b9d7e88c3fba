"""Votes: ratings that a person gives by hand, appended to a Parquet file of interactions.

votes -> the file with them, swapped for the file before -> the interactions of the next night
"""

import io
from collections.abc import Mapping
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.errors import InputError, StorageError, describe
from rebeca_ray.storage.filesystem import storage_errors
from rebeca_ray.storage.store import open_store

MAX_BYTES = 64 * 2**20  # of the file, which is read and written as a whole
ATTEMPTS = 5
COLUMNS = ("user_id", "item_id", "rating", "timestamp")  # of a new file


def append_votes(uri: str, user_id: str, votes: Mapping[str, bool], settings: InteractionSettings) -> int:
    """Append a user's votes to the Parquet file `uri`, which may be new. Return the rows of the file.

    A like is the highest rating of the scale, a dislike the lowest one. A vote takes the place of an earlier
    row of the same user and item. Another writer's rows are kept: the file changes only from the version that
    was read. Raises InputError for a file that is too large or holds no interactions, StorageError if others
    write to it all the time.
    """
    store = open_store(uri)
    for _ in range(ATTEMPTS):
        with storage_errors(uri):
            before = store.read_versioned()
        data, version = before or (b"", None)
        table = with_votes(read_file(uri, data, settings), uri, user_id, votes, settings)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        with storage_errors(uri):
            if store.compare_and_swap(sink.getvalue(), version):
                return table.num_rows
    raise StorageError(f"feedback {uri}: others write to it all the time; try again, or give another file")


def read_file(uri: str, data: bytes, settings: InteractionSettings) -> pa.Table:
    """Return the rows of the file so far, none of a new one."""
    if not data:
        names = settings.columns.model_dump(exclude_none=True)
        fields = [schemas.INTERACTIONS.field(name) for name in COLUMNS]
        return pa.schema(
            [field.with_name(names.get(field.name, field.name)) for field in fields]
        ).empty_table()
    if len(data) > MAX_BYTES:
        raise InputError(
            f"feedback {uri}: has {len(data) // 2**20} MiB, expected at most {MAX_BYTES // 2**20}; "
            "give another file of the same folder"
        )
    try:
        return pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise InputError(
            f"feedback {uri}: is no Parquet file ({describe(error)}); give one, or a new name"
        ) from None


def with_votes(
    table: pa.Table, uri: str, user_id: str, votes: Mapping[str, bool], settings: InteractionSettings
) -> pa.Table:
    """Return the rows with the votes in place of earlier ones."""
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
    dislike, like = settings.rating_scale
    time = pa.array([datetime.now(UTC).replace(tzinfo=None)] * len(votes), pa.timestamp("us"))
    values = {
        "user_id": pa.array([user_id] * len(votes)),
        "item_id": pa.array([*votes]),
        "rating": pa.array([like if liked else dislike for liked in votes.values()], pa.float64()),
        "timestamp": time,
        "event": pa.array(["rating"] * len(votes)),
    }
    column_of = {names[name]: column for name, column in values.items()}
    try:
        rows = pa.table(
            [
                column_of[field.name].cast(field.type)
                if field.name in column_of
                else pa.nulls(len(votes), field.type)
                for field in table.schema
            ],
            schema=table.schema,
        )
    except pa.ArrowException as error:
        raise InputError(
            f"feedback {uri}: its columns cannot hold a rating ({describe(error)}); give another file"
        ) from None
    items = pa.array(votes, table.schema.field(names["item_id"]).type)
    repeated = pc.and_(
        pc.equal(table[names["user_id"]], user_id), pc.is_in(table[names["item_id"]], value_set=items)
    )
    return pa.concat_tables([table.filter(pc.invert(pc.fill_null(repeated, False))), rows])
