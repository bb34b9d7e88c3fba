"""Parts of one Parquet file: read its footer once, and then only the requested row groups and columns.

Files of a catalog never change, so a cached footer stays true. pyarrow checks pages against their checksums.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.storage.filesystem import join, open_filesystem

# Cached footers, about 60 kB each for 50 row groups. A parsed footer takes 535 kB. Parsing takes 0.5 ms.
FOOTERS = 2048
TAIL = 65_536  # bytes per first read, from a file's end


class EncodedImage(TypedDict):
    """An encoded image. The suffix of its `path` is the encoding."""

    bytes: bytes
    path: str


class StoredImage(TypedDict):
    """A row of an image file: an item and its image."""

    item_id: str
    image: EncodedImage


def read_users(root: str, path: str, size: int, users: list[str], columns: list[str] | None) -> pa.Table:
    """Return the rows of some users in one file: `user_id`, and those of `columns` that the file has.

    `users` are sorted. `size` is the file's size in bytes. Reads only row groups that may hold one of the
    users.
    """
    metadata = footer(root, path, size)
    groups = [group for group in range(metadata.num_row_groups) if may_hold(metadata, group, users)]
    read = None if columns is None else [*dict.fromkeys([*columns, "user_id"])]
    with open_parquet(root, path, size, metadata) as file:
        table = file.read_row_groups(groups, columns=read, use_threads=len(groups) > 1)
    return table.filter(pc.is_in(table["user_id"], value_set=pa.array(users, pa.string())))


def read_rows(root: str, path: str, size: int, rows: list[int]) -> list[StoredImage | None]:
    """Return rows of an image file, in the order of `rows`; None for a row that the file does not have."""
    metadata = footer(root, path, size)
    stored: dict[int, StoredImage] = {}
    with open_parquet(root, path, size, metadata) as file:
        start = 0
        for group in range(metadata.num_row_groups):
            stop = start + metadata.row_group(group).num_rows
            if inside := [row for row in rows if start <= row < stop]:
                table = file.read_row_group(group, columns=["item_id", "image"])
                values = table.take([row - start for row in inside]).to_pylist()
                stored |= dict(zip(inside, cast(list[StoredImage], values), strict=True))
            start = stop
    return [stored.get(row) for row in rows]


def read_slice(root: str, path: str, size: int, start: int, stop: int, columns: list[str]) -> pa.Table:
    """Return some columns of the rows from `start` to `stop` of a file, fewer where it ends before.

    Reads only the row groups that hold them.
    """
    metadata = footer(root, path, size)
    groups: list[int] = []
    first = end = 0
    for group in range(metadata.num_row_groups):
        begin, end = end, end + metadata.row_group(group).num_rows
        if begin < stop and start < end:
            first = first if groups else begin
            groups.append(group)
    with open_parquet(root, path, size, metadata) as file:
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
    return table.slice(start - first, stop - start)


def complete(table: pa.Table, schema: pa.Schema, columns: list[str] | None) -> pa.Table:
    """Return the columns of `schema`, in its order. A column that is younger than the file is null."""
    for name in schema.names if columns is None else columns:
        if name not in table.column_names:
            table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(schema.names if columns is None else columns)


def may_hold(metadata: pq.FileMetaData, group: int, users: list[str]) -> bool:
    """Return whether one of the sorted `users` is in the range of a row group; True without statistics."""
    row_group = metadata.row_group(group)
    statistics = row_group.column(user_id_column(metadata)).statistics
    if statistics is None or not statistics.has_min_max:
        return row_group.num_rows > 0
    first = bisect_left(users, statistics.min)
    return first < len(users) and users[first] <= statistics.max


def user_id_column(metadata: pq.FileMetaData) -> int:
    """Return the number of the column `user_id` among the leaves of the schema."""
    return next(
        number for number in range(metadata.num_columns) if metadata.schema.column(number).path == "user_id"
    )


def footer(root: str, path: str, size: int) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(footer_bytes(root, path, size)))


@lru_cache(maxsize=FOOTERS)
def footer_bytes(root: str, path: str, size: int) -> bytes:
    """Return the end of a file from its footer on. The last eight bytes are the footer's length and a mark.

    Raises an Arrow error for any other file.
    """
    with opened(root, path, size) as handle:
        handle.seek(max(0, size - TAIL))
        tail: bytes = handle.read(TAIL)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size and tail.endswith(b"PAR1"):
            handle.seek(size - length)
            tail = handle.read(length - len(tail)) + tail
    # Raises for a damaged footer, so that it is not cached: an operator may restore the file.
    pq.read_metadata(pa.BufferReader(tail[-length:]))
    return tail[-length:]


@contextmanager
def open_parquet(root: str, path: str, size: int, metadata: pq.FileMetaData) -> Iterator[pq.ParquetFile]:
    with opened(root, path, size) as handle:
        yield pq.ParquetFile(handle, metadata=metadata, pre_buffer=True, page_checksum_verification=True)


@contextmanager
def opened(root: str, path: str, size: int) -> Iterator[pa.PythonFile]:
    """Open a file of a known size, without a request for the size. Reads exactly the requested bytes."""
    filesystem, base = open_filesystem(root)
    with filesystem.open(join(base, path), "rb", cache_type="none", size=size) as handle:
        yield handle
