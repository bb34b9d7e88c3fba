"""Parquet files: open inputs once, read and write the tables of this package with checksums.

uri -> one listing -> the footer of each file, remembered for the process -> `ParquetInput`

A job asks for the same input in several places: to check it, to describe it, to read it. Each place opens it
by its address, and only the listing is repeated. A file that changed in between has another listing, so its
footer is read again.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, UserError, describe, did_you_mean
from rebeca_ray.storage.filesystem import arrow_filesystem, is_local, open_filesystem, unreadable
from rebeca_ray.storage.objects import HashingSink
from rebeca_ray.storage.store import classify, failure_types

PARQUET = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=True, page_checksum_verification=True
    )
)
THREADS = 16  # on S3 a footer takes a round trip or two
INPUTS_REMEMBERED = 8  # a job has three


class InputFile(NamedTuple):
    """A file as the listing shows it."""

    path: str
    size: int
    changed: str  # the time of the last change, as the file system gives it
    version: str  # differs after every change, even within one second on S3


class Footer(NamedTuple):
    """The footer of a file, and the Arrow schema it describes."""

    metadata: Any  # pq.FileMetaData
    schema: pa.Schema


@dataclass(frozen=True, kw_only=True)
class ParquetInput:
    """A table in one or several Parquet files, which were listed once, with every footer in memory.

    `what` names the table in errors. All files have the same columns, but their order and types may differ.
    """

    uri: str
    what: str
    listing: tuple[InputFile, ...]
    footers: tuple[Footer, ...]

    @property
    def files(self) -> list[str]:
        """Return the paths of the files in their file system, sorted."""
        return [file.path for file in self.listing]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """Return the schema of every file by its path."""
        return {path: footer.schema for path, footer in zip(self.files, self.footers, strict=True)}

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of the first file. `read` casts the others into it."""
        return self.footers[0].schema

    @property
    def num_rows(self) -> int:
        """Return the number of rows of all files together."""
        return sum(footer.metadata.num_rows for footer in self.footers)

    def digest(self) -> str:
        """Return a digest of the files by name, size and time of change."""
        record = [[file.path, file.size, file.changed] for file in self.listing]
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read columns of all files into memory, by default all. Raises InputError for a damaged file."""
        names = self.schema.names if columns is None else columns
        if missing := [name for name in names if name not in self.schema.names]:
            raise InputError(
                f"{self.what} {self.uri}: column {missing[0]!r} is missing; "
                f"{did_you_mean(missing[0], self.schema.names)}"
            )
        # Another file may hold nulls where the first declares none. The checks of the input name the rows.
        fields = [
            self.schema.field(name).with_nullable(
                any(file.schema.field(name).nullable for file in self.footers)
            )
            for name in names
        ]
        schema = pa.schema(fields, metadata=self.schema.metadata)

        def read_file(index: int) -> pa.Table:
            with self.open_file(index, pre_buffer=True) as file:
                return file.read(columns=names).select(names).cast(schema)

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return pa.concat_tables(pool.map(read_file, range(len(self.listing))))
        except (pa.ArrowException, *failure_types()) as error:
            raise self.failure(error) from None

    def batches(self, columns: list[str], rows: int) -> Iterator[pa.Table]:
        """Read at most `rows` rows at a time, in the order of `read`.

        A batch keeps the types of its file. Raises InputError for a damaged file.
        """
        try:
            for index in range(len(self.listing)):
                # With pre_buffer, Arrow would hold the columns of the whole file in memory.
                with self.open_file(index, pre_buffer=False) as file:
                    for batch in file.iter_batches(rows, columns=columns):
                        yield pa.Table.from_batches([batch]).select(columns)
        except (pa.ArrowException, *failure_types()) as error:
            raise self.failure(error) from None

    @contextmanager
    def open_file(self, index: int, *, pre_buffer: bool) -> Iterator[pq.ParquetFile]:
        """Open a file without reading its footer."""
        filesystem, _ = open_filesystem(self.uri)
        with arrow_filesystem(filesystem).open_input_file(self.listing[index].path) as source:
            yield pq.ParquetFile(
                source,
                metadata=self.footers[index].metadata,
                pre_buffer=pre_buffer,
                page_checksum_verification=True,
            )

    def failure(self, error: BaseException) -> UserError:
        """Return the error to raise for a failed read: a damaged file, or a store that does not answer."""
        if classify(error) is not Failure.DAMAGED:
            return unreadable(f"{self.what} {self.uri}", error)
        return InputError(
            f"{self.what} {self.uri}: not readable as Parquet ({describe(error)}); write it again"
        )


def open_parquet(uri: str, what: str, *, files: list[str] | None = None) -> ParquetInput:
    """Open a Parquet file or a folder of Parquet files, without reading a footer twice in this process.

    `files` are the addresses of all files, if its writer listed them. Raises InputError, naming `what`, if
    there is no file, or one that is not Parquet or repeats a column name. Files that differ in their columns
    are refused too: a reader would drop columns silently.
    """
    listing = list_parquet(uri, what, files)
    return ParquetInput(uri=uri, what=what, listing=listing, footers=remembered_footers(uri, what, listing))


def read_table(uri: str, what: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table that this package wrote. Raises as `open_parquet` and `ParquetInput.read` do.

    Its footers are not remembered: a run reads thousands of such tables, which would displace the inputs.
    """
    listing = list_parquet(uri, what)
    footers = read_footers(uri, what, listing)
    return ParquetInput(uri=uri, what=what, listing=listing, footers=footers).read(columns)


def list_parquet(uri: str, what: str, only: list[str] | None = None) -> tuple[InputFile, ...]:
    """Return the Parquet files of `uri` in the order of their paths. Raises InputError if there is none.

    `only` are the addresses of all files, if they are known. Raises InputError if one of them is missing.
    """
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    try:
        if only:
            infos = listed_files(filesystem, [open_filesystem(file)[1] for file in only], f"{what} {uri}")
        elif filesystem.isfile(path):
            infos = {path: filesystem.info(path)}
        else:
            infos = {
                name: info
                for name, info in filesystem.find(path, detail=True).items()
                if not is_hidden(str(name).removeprefix(path))
            }
        files = [
            listed(filesystem, str(name), info)
            for name, info in infos.items()
            if str(name).endswith(".parquet") or name == path
        ]
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None
    if not files:
        raise InputError(f"{what} {uri}: not found; give a Parquet file, or a folder that holds some")
    return tuple(sorted(files))


def listed_files(filesystem: AbstractFileSystem, paths: list[str], name: str) -> dict[str, dict[str, Any]]:
    """Return the entries of `paths` in one listing of their common folder."""
    entries = filesystem.find(posixpath.commonpath(map(posixpath.dirname, paths)), detail=True)
    if missing := [path for path in paths if path not in entries]:
        raise InputError(f"{name}: file {missing[0]} is missing; restore it, or write the table again")
    return {path: entries[path] for path in paths}


def is_hidden(path: str) -> bool:
    """Return whether a path below a folder is no data: one of its names begins with `_` or `.`."""
    return any(name.startswith(("_", ".")) for name in path.split("/"))


def listed(filesystem: AbstractFileSystem, path: str, info: dict[str, Any]) -> InputFile:
    """Return a file of a listing. Its version is its ETag or generation, and locally the time of change."""
    # S3 and local disks name the first two; adlfs names the third. gcsfs has both `mtime` and `generation`.
    changed = str(info.get("mtime") or info.get("LastModified") or info.get("last_modified"))
    tag = info.get("ETag") or info.get("etag") or info.get("generation")
    # `stat` follows symbolic links. The time of a link itself does not change with its target.
    version = str(Path(path).stat().st_mtime_ns) if is_local(filesystem) else str(tag)
    return InputFile(path, info["size"], changed, version)


def read_footers(uri: str, what: str, listing: tuple[InputFile, ...]) -> tuple[Footer, ...]:
    """Read the footers of all files in threads. Raises as `open_parquet` does."""
    filesystem, _ = open_filesystem(uri)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            footers = tuple(pool.map(lambda file: read_footer(filesystem, file.path, what, uri), listing))
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None

    first = footers[0].schema.names
    for file, footer in zip(listing, footers, strict=True):
        name, columns = Path(file.path).name, footer.schema.names
        if len({*columns}) < len(columns):
            repeated = next(column for column in columns if columns.count(column) > 1)
            raise InputError(
                f"{what} {uri}: {name} has column {repeated!r} more than once; rename or drop the others"
            )
        if different := sorted({*columns} ^ {*first}):
            raise InputError(
                f"{what} {uri}: {name} and {Path(listing[0].path).name} differ in their columns "
                f"({', '.join(different[:3])}); write all files with the same"
            )
    return footers


# The key holds the whole listing: a change in any file reads all footers again. Errors are not remembered.
remembered_footers = lru_cache(maxsize=INPUTS_REMEMBERED)(read_footers)


def read_footer(filesystem: AbstractFileSystem, path: str, what: str, uri: str) -> Footer:
    """Read the footer of a file. Raises InputError if the file is not Parquet."""
    try:
        with filesystem.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
        return Footer(metadata, metadata.schema.to_arrow_schema())
    except (pa.ArrowException, OSError) as error:
        if classify(error) is not Failure.DAMAGED:
            raise
        raise InputError(
            f"{what} {uri}: {Path(path).name} is not a readable Parquet file; write it again"
        ) from None


class WrittenTable(TypedDict):
    """The rows, size and checksum of a written Parquet file."""

    rows: int
    bytes: int
    sha256: str


def write_table(
    table: pa.Table, uri: str, *, row_group_size: int, embed_column: str | None = None
) -> WrittenTable:
    """Write one Parquet file and return its `rows`, `bytes` and `sha256`, hashed while writing.

    The embedding column is stored byte-stream-split, without a dictionary or statistics. Everything is
    compressed with zstd and has a checksum per page. Locally one rename makes the file appear, so a crash
    leaves no half-written file.
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
