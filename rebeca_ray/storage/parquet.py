"""Tables in Parquet files: open inputs once, read and write the tables of this package with checksums.

uri -> one listing -> the header of each file, remembered for the process -> `ParquetInput`

A job asks for the same input in several places: to check it, to describe it, to read it. Each place opens it
by its address, and only the listing is repeated. A file that changed in between has another listing, so its
header is read again.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypedDict

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from rebeca_ray.errors import InputError, did_you_mean
from rebeca_ray.identity import UserKey, hash128
from rebeca_ray.storage.data_file import DataFile, Header, read_header
from rebeca_ray.storage.filesystem import open_filesystem, unreadable
from rebeca_ray.storage.listing import (
    THREADS,
    InputFile,
    base_of,
    digest_of,
    folder_columns,
    list_data,
    list_named,
    logs_above,
    refuse_log,
)
from rebeca_ray.storage.objects import HashingSink
from rebeca_ray.storage.store import failure_types

PARQUET = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=True, page_checksum_verification=True
    )
)
ROWS_AT_ONCE = 200_000
IMAGE_COLUMNS = ("image", "thumbnail")
IMAGES_AT_ONCE = 16  # after which a page may end: a page of 100 images leaves the processor's cache
INPUTS_REMEMBERED = 8  # a job has three


@dataclass(frozen=True, kw_only=True)
class ParquetInput:
    """A table in one or several files, which were listed once, with every header in memory.

    `what` names the table in errors. `columns` maps declared names to those in the files, where they differ.
    Files may differ in the order and types of their columns: a read gives every column one type.
    """

    uri: str
    what: str
    listing: tuple[InputFile, ...]
    headers: tuple[Header, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()  # the addresses of all files, if their writer listed them
    user_key: UserKey | None = None  # every read gives pseudonyms for `user_id`

    @cached_property
    def files(self) -> list[DataFile]:
        """Return the files, sorted by path."""
        base = base_of(self.uri)
        return [
            DataFile(
                uri=self.uri,
                what=self.what,
                file=file,
                folders=() if self.only else tuple(folder_columns(base, file.path)),
                columns=dict(self.columns),
                is_only_one=len(self.listing) == 1,
                user_key=self.user_key,
            )
            for file in self.listing
        ]

    @property
    def names(self) -> list[str]:
        """Return the names of the columns in the first file, and in the names of its folders."""
        return [*self.headers[0].schema.names, *dict(self.files[0].folders)]

    @property
    def num_rows(self) -> int:
        """Return the number of rows of all files together, an estimate for CSV files."""
        return sum(header.num_rows for header in self.headers)

    def digest(self) -> str:
        """Return a digest of the files by name, size and time of change, and of the key of pseudonyms."""
        digest = digest_of(self.listing)
        return hash128(digest, self.user_key.fingerprint) if self.user_key else digest

    def require_unchanged(self, action: str) -> None:
        """Raise InputError if a file was replaced or removed since the input was opened; new files may come.

        `action` says in the error what was done meanwhile.
        """
        if self.only:
            now = list_named(self.what, self.uri, self.only)
        else:
            now = list_data(self.uri, self.what, csv=self.files[0].is_csv)
        if not {*self.listing} <= {*now}:
            raise replaced(self.what, self.uri, action)

    def read(self, schema: pa.Schema) -> pa.Table:
        """Read the columns of `schema` of all files into memory, in its types. Raises as `batches` does."""

        def read_file(file: DataFile, header: Header) -> pa.Table:
            batches = list(file.batches(schema, ROWS_AT_ONCE, header, pre_buffer=True))
            return pa.concat_tables(batches) if batches else schema.empty_table()

        with ThreadPoolExecutor(THREADS) as pool:
            return pa.concat_tables(pool.map(read_file, self.files, self.headers))

    def batches(self, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
        """Read at most `rows` rows at a time, in the order and the types of `read`.

        Raises InputError for a damaged file, and for a value that a type cannot hold.
        """
        for file, header in zip(self.files, self.headers, strict=True):
            yield from file.batches(schema, rows, header)


def replaced(what: str, uri: str, action: str) -> InputError:
    """Return the error for an input that changed while somebody worked from it."""
    return InputError(f"{what} {uri}: was replaced while {action}; run again")


def open_parquet(
    uri: str, what: str, *, files: list[str] | None = None, user_key: UserKey | None = None
) -> ParquetInput:
    """Open a Parquet file or a folder of Parquet files, without reading a footer twice in this process.

    `files` are the addresses of all files, if its writer listed them. With `user_key`, reads give pseudonyms.
    Raises InputError, naming `what`, if there is no file, one that is not Parquet or that is missing, or a
    table with a log.
    """
    return open_table(uri, what, columns={}, csv=False, only=tuple(files or ()), user_key=user_key)


def open_table(
    uri: str,
    what: str,
    *,
    columns: Mapping[str, str],
    csv: bool = True,
    only: tuple[str, ...] = (),
    user_key: UserKey | None = None,
) -> ParquetInput:
    """Open Parquet or CSV files as `open_parquet` does, with the names of some columns."""
    refuse_log(uri, what, logs_above(uri))
    listing = list_named(what, uri, only) if only else list_data(uri, what, csv=csv)
    headers = remembered_headers(uri, what, listing)
    return ParquetInput(
        uri=uri,
        what=what,
        listing=listing,
        headers=headers,
        columns=columns,
        only=only,
        user_key=user_key,
    )


def read_table(uri: str, what: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table that this package wrote, by default all columns, in the types of the first file.

    Its headers are not remembered: a run reads thousands of such tables, which would displace the inputs.
    Raises InputError for a missing column or a damaged file.
    """
    listing = list_data(uri, what)
    headers = read_headers(uri, what, listing)
    schema = headers[0].schema
    names = schema.names if columns is None else columns
    if missing := [name for name in names if name not in schema.names]:
        raise InputError(
            f"{what} {uri}: column {missing[0]!r} is missing; {did_you_mean(missing[0], schema.names)}"
        )
    schema = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
    return ParquetInput(uri=uri, what=what, listing=listing, headers=headers).read(schema)


def read_headers(uri: str, what: str, listing: tuple[InputFile, ...]) -> tuple[Header, ...]:
    """Read the headers of all files in threads. Raises as `open_parquet` does."""
    filesystem, _ = open_filesystem(uri)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return tuple(pool.map(lambda file: read_header(filesystem, file, what, uri), listing))
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None


# The key holds the whole listing: a change in any file reads all headers again. Errors are not remembered.
remembered_headers = lru_cache(maxsize=INPUTS_REMEMBERED)(read_headers)


class WrittenTable(TypedDict):
    """The rows, size and checksum of a written Parquet file."""

    rows: int
    bytes: int
    sha256: str


def write_table(
    table: pa.Table, uri: str, *, row_group_size: int, embed_column: str | None = None
) -> WrittenTable:
    """Write a table as one Parquet file, as `write_tables` does."""
    return write_tables([table], table.schema, uri, row_group_size=row_group_size, embed_column=embed_column)


def write_tables(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    uri: str,
    *,
    row_group_size: int,
    embed_column: str | None = None,
) -> WrittenTable:
    """Write tables of `schema` as one Parquet file, with one row group in memory at a time.

    Returns `rows`, `bytes` and `sha256` of the file, hashed while writing. The embedding column is stored
    byte-stream-split, without a dictionary or statistics. Everything but images, which are compressed
    already, is compressed with zstd. Each page has a checksum. Locally one rename makes the file appear, so a
    crash leaves no half-written file.
    """
    filesystem, path = open_filesystem(uri)
    plain = [field.name for field in schema if field.name not in (embed_column, *IMAGE_COLUMNS)]
    leaf = f"{embed_column}.list.element"
    sink = HashingSink(filesystem, path)
    with (
        sink,
        pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            schema,
            compression={
                leaf: "none" if field.name in IMAGE_COLUMNS else "zstd"
                for field in schema
                for leaf in leaves(field.name, field.type)
            },
            use_dictionary=[name for name in plain if pa.types.is_string(schema.field(name).type)],
            use_byte_stream_split=[leaf] if embed_column else False,
            write_statistics=plain,
            write_page_checksum=True,
            write_batch_size=IMAGES_AT_ONCE if {*IMAGE_COLUMNS} & {*schema.names} else None,
        ) as writer,
    ):
        rows = 0
        for group in joined(tables, row_group_size):
            writer.write_table(group, row_group_size=row_group_size)
            rows += group.num_rows
    return {"rows": rows, **sink.record()}


def leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the paths of the Parquet columns below a column."""
    if pa.types.is_struct(kind):
        for field in kind:
            yield from leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from leaves(f"{path}.list.element", kind.value_type)
    else:
        yield path


def joined(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield successive tables as one, as long as they have at most `rows` rows together."""
    pending: list[pa.Table] = []
    for table in tables:
        if pending and sum(part.num_rows for part in pending) + table.num_rows > rows:
            yield pa.concat_tables(pending)
            pending = []
        pending.append(table)
    if pending:
        yield pa.concat_tables(pending)
