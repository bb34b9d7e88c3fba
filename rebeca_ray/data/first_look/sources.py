"""Ratings as people have them: Parquet, CSV or JSON lines, read in batches of the declared columns.

file or folder -> `open_source` -> `Source` -> `batches` -> user_id, item_id, rating, timestamp, event
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from rebeca_ray.data.interactions import FIRST_TIME, LAST_TIME
from rebeca_ray.errors import Failure, InputError, describe
from rebeca_ray.storage.columns import TEXTS, TIME, is_any, parse, plain_type
from rebeca_ray.storage.filesystem import arrow_filesystem, list_files, open_filesystem, unreadable
from rebeca_ray.storage.listing import is_visible
from rebeca_ray.storage.parquet import ParquetInput, open_table
from rebeca_ray.storage.store import classify, failure_types

ROWS_AT_ONCE = 200_000
BLOCK_BYTES = 2**24  # of JSON lines; a line is shorter
JSON_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?$", re.IGNORECASE)
NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
TIMES = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[-+]\d\d(:?\d\d)?)?)?$"
MILLISECONDS, MICROSECONDS, NANOSECONDS = 1e11, 1e14, 1e17  # numbers from here on have the unit


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Files of JSON objects, one per line. `schema` has every key, in the type of its first value."""

    uri: str
    files: list[str]
    schema: pa.Schema
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.schema.names)

    def batches(self, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
        """Read the columns of `schema` in its types. An absent value is null; `rows` is not kept exactly."""
        stored = [self.columns.get(name, name) for name in schema.names]
        explicit = pa.schema(
            [pa.field(name, column.type) for name, column in zip(stored, schema, strict=True)]
        )
        for file in self.files:
            yield from (
                pa.Table.from_batches([batch]).select(stored).rename_columns(schema.names)
                for batch in read_json_lines(file, explicit)
            )


Source = ParquetInput | JsonLines


def open_source(uri: str) -> Source:
    """Open ratings in Parquet, CSV or JSON lines: one file, or a folder of files of one kind."""
    files = [name for name in list_files(uri) if is_visible(name.removeprefix(uri).lstrip("/"))]
    if not files or not all(JSON_NAME.search(name) for name in files):
        return open_table(uri, "interactions", columns={})
    return JsonLines(uri=uri, files=files, schema=read_json_keys(files))


def kind_of(source: Source) -> str:
    """Return the name of the format."""
    if isinstance(source, JsonLines):
        return "JSON lines"
    return "CSV" if source.files[0].is_csv else "Parquet"


def read_json_keys(files: list[str]) -> pa.Schema:
    """Return every key of all files, in the type of its first value. Raises InputError."""
    types: dict[str, pa.DataType] = {}
    for file in files:
        with open_json(file) as stream:
            for block in whole_lines(stream):
                options = pyarrow.json.ReadOptions(block_size=len(block) + 1)
                for column in pyarrow.json.read_json(io.BytesIO(block), options).schema:
                    if pa.types.is_null(types.get(column.name, pa.null())):
                        types[column.name] = column.type
    return pa.schema(types.items())


def whole_lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """Yield a stream in blocks that end with a line. A line longer than a block is cut, and not JSON."""
    block = stream.read(BLOCK_BYTES)
    while more := stream.read(BLOCK_BYTES):
        lines, newline, rest = block.rpartition(b"\n")
        yield lines if newline else rest
        block = rest + more
    yield block


def read_json_lines(uri: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read the columns of `schema` of a file in blocks. Raises InputError."""
    with (
        open_json(uri) as stream,
        pyarrow.json.open_json(
            stream,
            read_options=pyarrow.json.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        ) as reader,
    ):
        yield from reader


@contextmanager
def open_json(uri: str) -> Iterator[pa.NativeFile]:
    """Open a file, unpacked. Raises InputError for a failure of the store or of Arrow in the block."""
    filesystem, path = open_filesystem(uri)
    try:
        with arrow_filesystem(filesystem).open_input_stream(
            path, compression="gzip" if path.lower().endswith(".gz") else None
        ) as stream:
            yield stream
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is not Failure.DAMAGED:
            raise unreadable(f"interactions {uri}", error) from None
        raise InputError(
            f"interactions {uri}: not readable as JSON lines ({describe(error)}); "
            "expected one object per line, with values of one type per key; write it again"
        ) from None


def read_types(source: Source, columns: Mapping[str, str]) -> pa.Schema:
    """Return the declared columns in the types to read them in: text, whole number, number or time."""
    fields = []
    for declared, name in columns.items():
        schema = source.schema if isinstance(source, JsonLines) else source.headers[0].schema
        is_text = kind_of(source) == "CSV" or name not in schema.names
        stored = pa.string() if is_text else plain_type(schema.field(name).type)
        fields.append(pa.field(declared, read_type(declared, stored, is_json=isinstance(source, JsonLines))))
    return pa.schema(fields)


def read_type(declared: str, stored: pa.DataType, *, is_json: bool) -> pa.DataType:
    is_number = declared in ("rating", "timestamp")
    if is_json and is_number and (pa.types.is_integer(stored) or pa.types.is_null(stored)):
        return pa.float64()  # later lines may hold fractions
    if pa.types.is_boolean(stored):
        return stored if is_json else pa.float64()
    if pa.types.is_integer(stored):
        return pa.int64()
    if pa.types.is_floating(stored) or pa.types.is_decimal(stored):
        return pa.float64() if is_number or is_json else pa.int64()
    # JSON has no times: a text that looks like one is a text.
    return TIME if declared == "timestamp" and not is_json and not is_any(stored, TEXTS) else pa.string()


def batches(source: Source, types: pa.Schema) -> Iterator[pa.Table]:
    """Yield the ratings: texts of users and items, `rating` float64, `timestamp` in microseconds.

    A rating or a time that cannot be read is null.
    """
    is_trimmed = kind_of(source) != "Parquet"
    for batch in source.batches(types, ROWS_AT_ONCE):
        columns = {}
        for name in batch.column_names:
            values = batch[name].combine_chunks()
            if name == "rating":
                columns[name] = numbers(values)
            elif name == "timestamp":
                columns[name] = times(values)
            else:
                text = values if pa.types.is_string(values.type) else whole(values).cast(pa.string())
                columns[name] = pc.utf8_trim_whitespace(text) if is_trimmed else text
        yield pa.table(columns)


def whole(values: pa.Array) -> pa.Array:
    """Return numbers as whole ones where nothing is lost: an id of 3.0 is 3."""
    if pa.types.is_floating(values.type) and pc.all(pc.equal(values, pc.floor(values))).as_py():
        return values.cast(pa.int64())
    return values


def numbers(values: pa.Array) -> pa.Array:
    """Return ratings as float64, of true and false as 1 and 0. Other texts are null."""
    if not pa.types.is_string(values.type):
        return values.cast(pa.float64(), safe=False)
    text = pc.utf8_lower(pc.utf8_trim_whitespace(values))
    text = pc.replace_substring_regex(text, "^true$", "1")
    text = pc.replace_substring_regex(text, "^false$", "0")
    is_number = pc.match_substring_regex(text, NUMBER)
    return pc.if_else(is_number, text, pa.scalar(None, pa.string())).cast(pa.float64())


def times(values: pa.Array) -> pa.Array:
    """Return times. Numbers are Unix times, and their size gives the unit. Other values are null."""
    if pa.types.is_timestamp(values.type):
        return within_calendar(values)
    if not pa.types.is_string(values.type):
        return within_calendar(moments(values))
    text = pc.utf8_trim_whitespace(values)
    null = pa.scalar(None, pa.string())
    try:
        written = parse(pc.if_else(pc.match_substring_regex(text, TIMES), text, null), TIME)
    except pa.ArrowException:  # such as a 31st of February
        dates = pd.to_datetime(text.to_pandas(), format="ISO8601", utc=True, errors="coerce")
        written = pa.array(dates.dt.tz_localize(None), TIME)
    return within_calendar(pc.coalesce(written, moments(numbers(text))))


def moments(values: pa.Array) -> pa.Array:
    """Return Unix times in seconds, milliseconds, microseconds or nanoseconds as times."""
    number = values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    size = np.abs(number)
    units = [size < MILLISECONDS, size < MICROSECONDS, size < NANOSECONDS]
    micro = np.select(units, [number * 1e6, number * 1e3, number], number / 1e3)
    with np.errstate(invalid="ignore"):
        known = np.abs(micro) < 2.0**62
    return pa.array(np.where(known, micro, 0).astype(np.int64), TIME, mask=~known)


def within_calendar(values: pa.Array) -> pa.Array:
    """Return times, without those outside the years 1 to 9999."""
    micro = values.cast(pa.int64())
    inside = pc.and_(pc.greater_equal(micro, FIRST_TIME), pc.less_equal(micro, LAST_TIME))
    return pc.if_else(inside, values, pa.scalar(None, TIME))
