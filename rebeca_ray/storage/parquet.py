"""Parquet files: opened, read and written with checksums."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import InputError, describe
from rebeca_ray.storage.filesystem import (
    UNREACHABLE,
    arrow_filesystem,
    is_damage,
    open_filesystem,
    unreadable,
)
from rebeca_ray.storage.objects import HashingSink

PARQUET = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=True, page_checksum_verification=True
    )
)


def open_table(uri: str, what: str) -> tuple[list[str], pa.Schema]:
    """The Parquet files of `uri` (a file or a folder of files), sorted, and the schema of the first. Raises as `read_schemas`."""
    found = read_schemas(uri, what)
    return list(found), next(iter(found.values()))


def read_schemas(uri: str, what: str) -> dict[str, pa.Schema]:
    """The schema of every Parquet file of `uri` (a file or a folder of files), in the order of their names.

    Raises UserError, naming `what`, if there is nothing there, a file is not Parquet, has two columns of one name, or the
    files differ in their columns: a reader would take the first file's and drop the rest without a word.
    """
    filesystem, path = open_filesystem(uri)
    try:
        found = [path] if filesystem.isfile(path) else filesystem.find(path)
        files = sorted(str(name) for name in found if str(name).endswith(".parquet") or name == path)
        if not files:
            raise InputError(f"{what} {uri}: not found; give a Parquet file, or a folder that holds some")
        with ThreadPoolExecutor(16) as pool:  # on S3 each takes a round trip or two
            schemas = list(pool.map(lambda name: read_schema(filesystem, name, what, uri), files))
    except UNREACHABLE as error:
        raise unreadable(f"{what} {uri}", error) from None

    for name, schema in zip(files, schemas, strict=True):
        if len({*schema.names}) < len(schema.names):
            twice = next(column for column in schema.names if schema.names.count(column) > 1)
            raise InputError(
                f"{what} {uri}: {Path(name).name} has column {twice!r} more than once; rename or drop the others"
            )
        if odd := sorted({*schema.names} ^ {*schemas[0].names}):
            raise InputError(
                f"{what} {uri}: {Path(name).name} and {Path(files[0]).name} differ in their columns ({', '.join(odd[:3])}); "
                "write all files with the same"
            )
    return dict(zip(files, schemas, strict=True))


def read_schema(filesystem: AbstractFileSystem, path: str, what: str, uri: str) -> pa.Schema:
    try:
        with filesystem.open(path, "rb") as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise InputError(
            f"{what} {uri}: {Path(path).name} is not a readable Parquet file; write it again"
        ) from None


def read_table(uri: str, what: str, columns: list[str] | None = None) -> pa.Table:
    """All of `uri` in memory. Raises UserError, naming `what`, for anything unreadable."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    try:
        dataset = pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(filesystem), format=PARQUET)
        return dataset.to_table(columns=columns)
    except (pa.ArrowException, *UNREACHABLE) as error:
        if not is_damage(error):
            raise unreadable(f"{what} {uri}", error) from None
        raise InputError(
            f"{what} {uri}: not readable as Parquet ({describe(error)}); write it again"
        ) from None


def write_table(
    table: pa.Table, uri: str, *, row_group_size: int, embed_column: str | None = None
) -> dict[str, Any]:
    """Write one Parquet file and return its `rows`, `bytes` and `sha256`, hashed while writing.

    The embedding column is stored byte-stream-split without a dictionary or statistics, everything with zstd and a checksum a page.
    Locally the file appears by one rename, so that a crash leaves no half-written file behind.
    """
    filesystem, path = open_filesystem(uri)
    plain = [field.name for field in table.schema if field.name not in (embed_column, "image", "thumbnail")]
    leaf = f"{embed_column}.list.element"
    sink = HashingSink(filesystem, path)
    with (
        sink,
        pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            table.schema,
            compression="zstd",
            use_dictionary=[name for name in plain if pa.types.is_string(table.schema.field(name).type)],
            use_byte_stream_split=[leaf] if embed_column else False,
            write_statistics=plain,
            write_page_checksum=True,
        ) as writer,
    ):
        writer.write_table(table, row_group_size=row_group_size)
    return {"rows": table.num_rows, **sink.record()}


def describe_files(uri: str, what: str) -> str:
    """A digest of the Parquet files of `uri` by name, size and time of change."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    found = [filesystem.info(name) for name in files]
    told = [
        [info["name"], info["size"], str(info.get("mtime") or info.get("LastModified"))] for info in found
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
