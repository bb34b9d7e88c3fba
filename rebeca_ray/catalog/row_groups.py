"""Parts of one Parquet file: its footer is read once, and after that only the row groups and columns that are wanted.

Files of a catalog never change, so what was read of one stays true. Pages are checked against their checksums.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.storage.filesystem import join, open_filesystem

FOOTERS = 2048  # that are remembered, of some 60 kB each for 50 row groups; parsed, which takes half a millisecond, one would be 535 kB
TAIL = 65_536  # asked for at once, from a file's end


def read_users(root: str, path: str, size: int, users: list[str], columns: list[str] | None) -> pa.Table:
    """The rows of some users in one file, with `user_id` and those of `columns` that it has.

    `users` are sorted, `size` is the file's in bytes.
    Reads the row groups whose smallest and largest `user_id` have one of them in between.
    """
    metadata = footer(root, path, size)
    groups = [group for group in range(metadata.num_row_groups) if may_hold(metadata, group, users)]
    read = None if columns is None else [*dict.fromkeys([*columns, "user_id"])]
    with open_parquet(root, path, size, metadata) as file:
        table = file.read_row_groups(groups, columns=read, use_threads=len(groups) > 1)
    return table.filter(pc.is_in(table["user_id"], value_set=pa.array(users, pa.string())))


def read_rows(
    root: str, path: str, size: int, rows: list[int], columns: list[str]
) -> list[dict[str, Any] | None]:
    """Some rows of a file, in the order of `rows`; None for one that it does not have."""
    metadata = footer(root, path, size)
    found: dict[int, dict[str, Any]] = {}
    with open_parquet(root, path, size, metadata) as file:
        start = 0
        for group in range(metadata.num_row_groups):
            stop = start + metadata.row_group(group).num_rows
            if inside := [row for row in rows if start <= row < stop]:
                table = file.read_row_group(group, columns=columns).take([row - start for row in inside])
                found |= dict(zip(inside, table.to_pylist(), strict=True))
            start = stop
    return [found.get(row) for row in rows]


def complete(table: pa.Table, schema: pa.Schema, columns: list[str] | None) -> pa.Table:
    """Columns of `schema`, in its order; those that came after a file was written are null."""
    for name in schema.names if columns is None else columns:
        if name not in table.column_names:
            table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(schema.names if columns is None else columns)


def may_hold(metadata: pq.FileMetaData, group: int, users: list[str]) -> bool:
    """Whether any of the sorted `users` is between a row group's ends; yes if the file does not tell them."""
    row_group = metadata.row_group(group)
    statistics = row_group.column(user_id_column(metadata)).statistics
    if statistics is None or not statistics.has_min_max:
        return row_group.num_rows > 0
    place = bisect_left(users, statistics.min)
    return place < len(users) and users[place] <= statistics.max


def user_id_column(metadata: pq.FileMetaData) -> int:
    """The number of the column among the leaves of the schema."""
    return next(
        number for number in range(metadata.num_columns) if metadata.schema.column(number).path == "user_id"
    )


def footer(root: str, path: str, size: int) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(footer_bytes(root, path, size)))


@lru_cache(maxsize=FOOTERS)
def footer_bytes(root: str, path: str, size: int) -> bytes:
    """The end of a file, from where its footer begins: the last eight bytes are its length and a mark. Raises what Arrow does of others."""
    with opened(root, path, size) as handle:
        handle.seek(max(0, size - TAIL))
        tail: bytes = handle.read(TAIL)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size and tail.endswith(b"PAR1"):
            handle.seek(size - length)
            tail = handle.read(length - len(tail)) + tail
    pq.read_metadata(pa.BufferReader(tail[-length:]))  # a damaged one is not remembered: it may be restored
    return tail[-length:]


@contextmanager
def open_parquet(root: str, path: str, size: int, metadata: pq.FileMetaData) -> Iterator[pq.ParquetFile]:
    with opened(root, path, size) as handle:
        yield pq.ParquetFile(handle, metadata=metadata, pre_buffer=True, page_checksum_verification=True)


@contextmanager
def opened(root: str, path: str, size: int) -> Iterator[pa.PythonFile]:
    """A file whose size is known, so that nobody need ask; reads exactly what is asked for."""
    filesystem, base = open_filesystem(root)
    with filesystem.open(join(base, path), "rb", cache_type="none", size=size) as handle:
        yield handle
