"""Columns of inputs: the types that stand for a declared type, and their values in one type, without loss.

Each declared type is read as one type, whatever the files hold: every text as `string`, every whole number as
`int64`, every number as `float64`, every time as `timestamp[us]`. So no file decides the types of another.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.schemas import IMAGE

TIME = pa.timestamp("us")
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
    pa.types.is_fixed_size_list,
)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values: without a dictionary, run ends, or an extension such as a tensor's."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    return kind


def stands_for(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Return whether a column of type `actual` can be read as `expected` without a change of meaning."""
    if len(getattr(actual, "shape", [0])) != 1:  # a tensor of several dimensions is no embedding
        return False
    actual = plain_type(actual)
    if pa.types.is_string(expected):
        return is_any(actual, TEXTS)
    if pa.types.is_integer(expected):
        return pa.types.is_integer(actual) or (pa.types.is_decimal(actual) and actual.scale <= 0)
    if pa.types.is_floating(expected):
        return pa.types.is_floating(actual) or pa.types.is_integer(actual) or pa.types.is_decimal(actual)
    if pa.types.is_struct(expected):  # an image: its bytes are required, its path is not
        index = actual.get_field_index("bytes") if pa.types.is_struct(actual) else -1
        return index >= 0 and is_any(plain_type(actual[index].type), (*BINARIES, pa.types.is_null))
    if pa.types.is_fixed_size_list(expected):  # an embedding: the rows tell its size
        return is_any(actual, LISTS) and pa.types.is_floating(actual.value_type)
    # A whole number is a time in Unix seconds.
    return pa.types.is_timestamp(actual) or pa.types.is_date(actual) or pa.types.is_integer(actual)


def is_any(kind: pa.DataType, checks: Sequence[object]) -> bool:
    return any(check(kind) for check in checks)  # type: ignore[operator]


def type_of(expected: pa.DataType, actual: Sequence[pa.DataType]) -> pa.DataType:
    """Return the type in which a column is read that is declared as `expected` and stored as `actual`.

    Embeddings keep their size if all files declare the same one.
    """
    if pa.types.is_string(expected):
        return pa.string()
    if pa.types.is_integer(expected):
        return pa.int64()
    if pa.types.is_floating(expected):
        return pa.float64()
    if pa.types.is_struct(expected):
        return IMAGE
    if pa.types.is_fixed_size_list(expected):
        kinds = [plain_type(kind) for kind in actual]
        sizes = {kind.list_size if pa.types.is_fixed_size_list(kind) else None for kind in kinds}
        size = sizes.pop() if len(sizes) == 1 else None
        return pa.list_(pa.float32(), size) if size else pa.large_list(pa.float32())
    return TIME


def convert(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return a column as `kind`, a result of `type_of`. Finer digits of a time than microseconds are cut off.

    Raises an Arrow error for a value that `kind` cannot hold.
    """
    if column.type == kind:
        return column
    if isinstance(column, pa.ExtensionArray):
        return convert(column.storage, kind)
    if pa.types.is_dictionary(column.type):
        return convert(column.dictionary_decode(), kind)
    if pa.types.is_run_end_encoded(column.type):
        return convert(pc.run_end_decode(column), kind)
    if pa.types.is_floating(kind):  # a whole number beyond the exact ones is beyond every scale and bound too
        return column.cast(kind, safe=False)
    if pa.types.is_timestamp(kind) and pa.types.is_integer(column.type):
        column = column.cast(pa.int64()).cast(pa.timestamp("s"))
    if pa.types.is_struct(kind) and pa.types.is_struct(column.type):
        return image(column)
    return column.cast(options=pc.CastOptions(kind, allow_time_truncate=True))


def image(column: pa.StructArray) -> pa.StructArray:
    """Return images as `IMAGE`. Other fields of the struct are left out."""
    names = [field.name for field in column.type]
    parts = [
        convert(pc.struct_field(column, [field.name]), field.type)
        if field.name in names
        else pa.nulls(len(column), field.type)
        for field in IMAGE
    ]
    return pa.StructArray.from_arrays(parts, fields=list(IMAGE), mask=column.is_null())


def parse(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return texts, of a CSV file or a folder's name, as `kind`. Raises an Arrow error for any other text.

    A time is ISO 8601, with or without a zone, or a whole number of Unix seconds.
    """
    if not pa.types.is_timestamp(kind):
        return text.cast(kind)
    number = pc.match_substring_regex(text, r"^[-+]?\d+$")
    zoned = pc.match_substring_regex(text, r"(Z|[-+]\d\d(:?\d\d)?)$")
    zoned = pc.and_(zoned, pc.match_substring_regex(text, r"^\d+-\d\d-\d\d[ T]"))
    null = pa.scalar(None, pa.string())
    seconds = pc.if_else(number, text, null).cast(pa.int64())
    moments = pc.if_else(zoned, text, null).cast(pa.timestamp("us", "UTC"))
    local = pc.if_else(pc.or_(number, zoned), null, text).cast(kind)
    return pc.coalesce(convert(seconds, kind), moments.cast(kind), local)
