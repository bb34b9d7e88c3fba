"""Open, read and write Parquet files, with checksums."""

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

from rebeca_ray.errors import Failure, InputError, describe
from rebeca_ray.storage.filesystem import arrow_filesystem, open_filesystem, unreadable
from rebeca_ray.storage.objects import HashingSink
from rebeca_ray.storage.store import classify, failure_types

PARQUET = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=True, page_checksum_verification=True
    )
)


def open_table(uri: str, what: str) -> tuple[list[str], pa.Schema]:
    """Return the Parquet files of `uri` (a file or a folder), sorted, and the first one's schema.

    Raises as `read_schemas`.
    """
    schemas = read_schemas(uri, what)
    return list(schemas), next(iter(schemas.values()))


def read_schemas(uri: str, what: str) -> dict[str, pa.Schema]:
    """Return the schema of every Parquet file of `uri` (a file or a folder), in the order of the names.

    Raises UserError, naming `what`, if there is no file, if a file is not Parquet or has two columns of
    one name, or if the files differ in their columns. A reader would otherwise take the columns of the
    first file and drop the others silently.
    """
    filesystem, path = open_filesystem(uri)
    try:
        names = [path] if filesystem.isfile(path) else filesystem.find(path)
        files = sorted(str(name) for name in names if str(name).endswith(".parquet") or name == path)
        if not files:
            raise InputError(f"{what} {uri}: not found; give a Parquet file, or a folder that holds some")
        with ThreadPoolExecutor(16) as pool:  # on an object store, each takes a round trip or two
            schemas = list(pool.map(lambda name: read_schema(filesystem, name, what, uri), files))
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None

    for name, schema in zip(files, schemas, strict=True):
        if len({*schema.names}) < len(schema.names):
            twice = next(column for column in schema.names if schema.names.count(column) > 1)
            raise InputError(
                f"{what} {uri}: {Path(name).name} has column {twice!r} more than once; "
                "rename or drop the others"
            )
        if odd := sorted({*schema.names} ^ {*schemas[0].names}):
            raise InputError(
                f"{what} {uri}: {Path(name).name} and {Path(files[0]).name} differ in their columns "
                f"({', '.join(odd[:3])}); write all files with the same"
            )
    return dict(zip(files, schemas, strict=True))


def read_schema(filesystem: AbstractFileSystem, path: str, what: str, uri: str) -> pa.Schema:
    """Return the schema of one file. Raises InputError, naming `what`, if it is not Parquet."""
    try:
        with filesystem.open(path, "rb") as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        if classify(error) is not Failure.DAMAGED:
            raise
        raise InputError(
            f"{what} {uri}: {Path(path).name} is not a readable Parquet file; write it again"
        ) from None


def read_table(uri: str, what: str, columns: list[str] | None = None) -> pa.Table:
    """Return all rows of `uri`. Raises UserError, naming `what`, if it is unreadable."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    try:
        dataset = pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(filesystem), format=PARQUET)
        return dataset.to_table(columns=columns)
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is not Failure.DAMAGED:
            raise unreadable(f"{what} {uri}", error) from None
        raise InputError(
            f"{what} {uri}: not readable as Parquet ({describe(error)}); write it again"
        ) from None


def write_table(
    table: pa.Table, uri: str, *, row_group_size: int, embed_column: str | None = None
) -> dict[str, Any]:
    """Write one Parquet file and return its `rows`, `bytes` and `sha256`, hashed while writing.

    The embedding column is byte-stream-split, without a dictionary or statistics. Every column is
    compressed by zstd, with one checksum per page. A local file appears by one rename, so that a crash
    leaves no half-written file behind.
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
    """Return a digest of the Parquet files of `uri` by name, size and time of change."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    entries = [filesystem.info(name) for name in files]
    record = [[entry["name"], entry["size"], str(changed_at(entry))] for entry in entries]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]


def changed_at(entry: dict[str, Any]) -> Any:
    """Return the time of change of a file. fsspec's filesystems differ in the name of that key."""
    return entry.get("mtime") or entry.get("LastModified") or entry.get("last_modified")
