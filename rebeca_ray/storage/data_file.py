"""One file of a table, Parquet or CSV: its header, and its rows in batches of the declared types.

A file is read by itself, in any process: the header is read again where it did not travel along.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, UserError, describe
from rebeca_ray.identity import UserKey
from rebeca_ray.storage.columns import convert, parse
from rebeca_ray.storage.expansion import check_texts_fit, counted, most_bytes, most_rows
from rebeca_ray.storage.filesystem import arrow_filesystem, open_filesystem, unreadable
from rebeca_ray.storage.listing import CSV_NAME, InputFile
from rebeca_ray.storage.store import classify, failure_types

CSV_BYTES_PER_ROW = 20  # about; a compressed row takes a fourth
BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"(\xb5/\xfd": "zstd",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"ARROW1": "Arrow",
}


class Header(NamedTuple):
    """The columns of a file, and the number of its rows, which is an estimate for a CSV file."""

    schema: pa.Schema
    num_rows: int
    metadata: Any  # pq.FileMetaData, or None for a CSV file


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of the table `what` at `uri`.

    `folders` are the columns that the names of its folders give, as text. `columns` are the names in the file
    where they differ from the declared ones.
    """

    uri: str
    what: str
    file: InputFile
    folders: tuple[tuple[str, str | None], ...]
    columns: dict[str, str]
    is_only_one: bool  # of its table, so that errors need not name it
    user_key: UserKey | None = None  # of the pseudonyms that stand for `user_id`

    @property
    def name(self) -> str:
        return Path(self.file.path).name

    @property
    def is_csv(self) -> bool:
        return bool(CSV_NAME.search(self.file.path))

    @property
    def where(self) -> str:
        """Return the name of the file, as errors continue with it."""
        return "" if self.is_only_one else f" in {self.name}"

    def stored(self, name: str) -> str:
        """Return the name in the file of a declared column."""
        return self.columns.get(name, name)

    def batches(
        self, schema: pa.Schema, rows: int, header: Header | None = None, *, pre_buffer: bool = False
    ) -> Iterator[pa.Table]:
        """Read the columns of `schema` in its types, at most `rows` rows at a time. An absent column is null.

        With `pre_buffer`, the columns of the whole file are fetched at once, in few requests. Raises
        InputError for a damaged file, and for a value that a type cannot hold.
        """
        filesystem, _ = open_filesystem(self.uri)
        header = header or read_header(filesystem, self.file, self.what, self.uri)
        names = [self.stored(name) for name in schema.names]
        names = [*dict.fromkeys(name for name in names if name in header.schema.names)]
        count = 0
        try:
            batches = (
                csv_batches(filesystem, self.file, names, rows)
                if self.is_csv
                else parquet_batches(filesystem, self.file, header, names, rows, pre_buffer)
            )
            for batch in batches:
                columns = [self.column(batch, field) for field in schema]
                if self.user_key and "user_id" in schema.names:
                    index = schema.names.index("user_id")
                    columns[index] = self.pseudonymised(columns[index], self.user_key)
                yield pa.table(columns, schema=schema)
                count += batch.num_rows
        except (pa.ArrowException, *failure_types()) as error:
            raise self.failure(error) from None
        if not self.is_csv and count != header.num_rows:
            raise self.failure(pa.ArrowInvalid(f"{count:,} rows, its footer says {header.num_rows:,}"))

    def column(self, batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
        """Return one column of a batch. Raises InputError for a value that its type cannot hold."""
        name = self.stored(field.name)
        try:
            if name in (folders := dict(self.folders)):
                value = parse(pa.array([folders[name]], pa.string()), field.type)[0]
                return pa.repeat(value, batch.num_rows)
            if name not in batch.schema.names:
                return pa.nulls(batch.num_rows, field.type)
            column = batch.column(name)
            return parse(column, field.type) if self.is_csv else convert(column, field.type)
        except pa.ArrowException as error:
            actual = "text" if name not in batch.schema.names else batch.schema.field(name).type
            raise InputError(
                f"{self.what} {self.uri}: column {name!r} is {actual}{self.where}, with values that are no "
                f"{field.type} ({describe(error)}); check their form and unit, and write again"
            ) from None

    def pseudonymised(self, users: pa.Array, key: UserKey) -> pa.Array:
        """Return the pseudonyms of a column of users. Raises InputError for ids that are not UTF-8."""
        try:
            users.validate(full=True)
        except pa.ArrowInvalid:
            raise InputError(
                f"{self.what} {self.uri}: column {self.stored('user_id')!r} is not UTF-8 throughout"
                f"{self.where}; encode it and write again"
            ) from None
        users = users.dictionary_encode()  # ratings repeat their users
        return pa.array(key.pseudonyms(users.dictionary.to_pylist()), pa.string()).take(users.indices)

    def failure(self, error: BaseException) -> UserError:
        """Return the error to raise for a failed read: a damaged file, or a store that does not answer."""
        if classify(error) is not Failure.DAMAGED:
            return unreadable(f"{self.what} {self.uri}", error)
        kind = "CSV" if self.is_csv else "Parquet"
        return InputError(
            f"{self.what} {self.uri}: not readable as {kind}{self.where} ({describe(error)}); write it again"
        )


def parquet_batches(
    filesystem: AbstractFileSystem,
    file: InputFile,
    header: Header,
    names: list[str],
    rows: int,
    pre_buffer: bool,
) -> Iterator[pa.RecordBatch]:
    """Read columns of a Parquet file."""
    with arrow_filesystem(filesystem).open_input_file(file.path) as source:
        check_texts_fit(source, header.metadata, names, file.size)
        # By default Arrow reads an INT96 time in nanoseconds, which end in 2262.
        parquet = pq.ParquetFile(
            source,
            metadata=header.metadata,
            pre_buffer=pre_buffer,
            page_checksum_verification=True,
            coerce_int96_timestamp_unit="us",
        )
        yield from parquet.iter_batches(rows, columns=names)


def csv_batches(
    filesystem: AbstractFileSystem, file: InputFile, names: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """Read columns of a CSV file as text. An empty cell is null."""
    with csv_reader(filesystem, file.path, names) as reader:
        for batch in counted(reader, file.size):
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


@contextmanager
def csv_reader(filesystem: AbstractFileSystem, path: str, names: list[str] | None) -> Iterator[Any]:
    """Open a CSV file with a header line, plain or compressed."""
    source = arrow_filesystem(filesystem).open_input_stream(
        path, compression="gzip" if path.lower().endswith(".gz") else None
    )
    options = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names or [], pa.string()),
        include_columns=names,
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
    )
    with source:
        yield pyarrow.csv.open_csv(
            source,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=options,
        )


def read_header(filesystem: AbstractFileSystem, file: InputFile, what: str, uri: str) -> Header:
    """Read the header of a file. Raises InputError if the file is not readable, or if it claims too much."""
    name = Path(file.path).name
    try:
        if CSV_NAME.search(name):
            with csv_reader(filesystem, file.path, None) as reader:
                bytes_per_row = CSV_BYTES_PER_ROW / (4 if name.lower().endswith(".gz") else 1)
                return Header(named(reader.schema), int(file.size / bytes_per_row) + 1, None)
        with filesystem.open(file.path, "rb") as source:
            metadata = pq.read_metadata(source)
        header = Header(named(metadata.schema.to_arrow_schema()), metadata.num_rows, metadata)
        excess = excess_of(metadata, file.size)
    except (pa.ArrowException, OSError) as error:
        if classify(error) is not Failure.DAMAGED:
            raise
        if CSV_NAME.search(name):
            raise InputError(
                f"{what} {uri}: {name} is not a readable CSV file ({describe(error)}); write it again"
            ) from None
        raise InputError(
            f"{what} {uri}: {name} is not a readable Parquet file{guess(filesystem, file)}; write it again"
        ) from None
    if excess:
        raise InputError(
            f"{what} {uri}: {name} is damaged: its footer claims {excess}, but it has {file.size:,} bytes; "
            "write it again"
        )
    return header


def named(schema: pa.Schema) -> pa.Schema:
    """Return a schema. Raises ArrowInvalid if a name is not UTF-8: every use of the names would."""
    try:
        schema.names  # noqa: B018
    except UnicodeDecodeError:
        raise pa.ArrowInvalid("the names of its columns are not UTF-8") from None
    return schema


def guess(filesystem: AbstractFileSystem, file: InputFile) -> str:
    """Return the kind of a file that is no Parquet, as an error continues with it."""
    head = filesystem.cat_file(file.path, 0, 8) if file.size else b""
    kinds = [kind for beginning, kind in BEGINNINGS.items() if head.startswith(beginning)]
    return f" but {kinds[0]}" if kinds else ""


def excess_of(metadata: Any, size: int) -> str | None:
    """Return the claim of a footer that no file of `size` bytes can meet, or None."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        return f"{metadata.num_rows:,} rows in groups of {sum(rows):,}"
    if metadata.num_rows > most_rows(size):
        return f"{metadata.num_rows:,} rows"
    stored, bytes_of_column = 0, Counter[int]()
    for group in groups:
        columns = [group.column(index) for index in range(group.num_columns)]
        stored += sum(max(column.total_compressed_size, 0) for column in columns)
        if stored > size or min((column.total_compressed_size for column in columns), default=0) < 0:
            return f"{stored:,} bytes of columns"
        for index, column in enumerate(columns):
            bytes_of_column[index] += max(column.total_uncompressed_size, 0)
        largest = max(bytes_of_column.values(), default=0)
        if largest > most_bytes(size):
            return f"{largest:,} bytes of one column"
        if any(column.num_values < group.num_rows for column in columns):
            return f"{group.num_rows:,} rows of fewer values"
    return None
