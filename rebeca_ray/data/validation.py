"""Input tables: columns, ids, texts and numbers checked against `schemas.py`, before any stage uses them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.errors import InputError, did_you_mean
from rebeca_ray.schemas import may_be_missing
from rebeca_ray.storage.columns import stands_for, type_of
from rebeca_ray.storage.data_file import DataFile, Header
from rebeca_ray.storage.parquet import ParquetInput

MAX_ID_BYTES, MAX_TEXT_BYTES = 1000, 10_000
MAX_EXAMPLES = 3
MAX_NUMBER = 2.0**24  # float32 holds every whole number up to here


def check_columns(
    table: ParquetInput, expected: pa.Schema, *, instead: dict[str, str] | None = None
) -> pa.Schema:
    """Return the columns of `expected` that the input has, in the types that `ParquetInput.read` gives them.

    Optional columns may be missing. A nullable column of type null is a missing one. Other columns of the
    input are never read or compared. Raises InputError for a missing column, with the advice of `instead`
    where the input has that other column, for a column of another type in any file, and for a column that
    some files lack.
    """
    fields = []
    for field in expected:
        types = [
            type_in(file, header, field) for file, header in zip(table.files, table.headers, strict=True)
        ]
        if all(kind is None for kind in types):
            named = table.columns.get(field.name)
            if not may_be_missing(field) or (named is not None and named not in table.names):
                raise missing_column(table, field.name, instead or {})
            continue
        check_type(table, field, types)
        fields.append(pa.field(field.name, type_of(field.type, [kind for kind in types if kind is not None])))
    return pa.schema(fields)


def type_in(file: DataFile, header: Header, field: pa.Field) -> pa.DataType | None:
    """Return the type of a declared column in one file, None if the file lacks it.

    Text in a CSV file or in the name of a folder has the declared type. Raises InputError for a column that
    is there twice.
    """
    name, schema = file.stored(field.name), header.schema
    folders = [folder for folder, _ in file.folders]
    if [*schema.names, *folders].count(name) > 1:
        also = "also in the name of its folder" if name in folders else "more than once"
        raise InputError(
            f"{file.what} {file.uri}: {file.name} has column {name!r} {also}; rename or drop the others"
        )
    if name in folders or (name in schema.names and file.is_csv):
        return field.type
    if name in schema.names and pa.types.is_null(schema.field(name).type) and header.num_rows == 0:
        return field.type  # pandas writes an empty table so
    if name not in schema.names or (field.nullable and pa.types.is_null(schema.field(name).type)):
        return None
    return schema.field(name).type


def check_type(table: ParquetInput, field: pa.Field, types: list[pa.DataType | None]) -> None:
    """Raise InputError if a file has a declared column in another type, or lacks it where another has it."""
    name = table.columns.get(field.name, field.name)
    has_it = [
        kind is not None or name in header.schema.names
        for kind, header in zip(types, table.headers, strict=True)
    ]
    if not all(has_it):
        other = table.files[has_it.index(not has_it[0])]
        raise InputError(
            f"{table.what} {table.uri}: {other.name} and {table.files[0].name} differ in their columns "
            f"({name}); write all files with the same"
        )
    for file, kind in zip(table.files, types, strict=True):
        is_nested_text = pa.types.is_nested(field.type) and name in dict(file.folders)
        if kind is not None and (is_nested_text or not stands_for(kind, field.type)):
            actual = "in the name of a folder" if is_nested_text else kind
            raise InputError(
                f"{table.what} {table.uri}: column {name!r} is {actual}{file.where}, "
                f"expected {field.type}; {remedy(kind, field)}"
            )


def remedy(kind: pa.DataType, field: pa.Field) -> str:
    """Return the advice for a column of another type."""
    if pa.types.is_struct(field.type) and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return "read the file of each path, and write its bytes"
    return "cast it and write again"


def missing_column(table: ParquetInput, name: str, instead: dict[str, str]) -> InputError:
    """Return the error for a missing column."""
    stored = table.columns.get(name, name)
    advice = [text for other, text in instead.items() if other in table.names]
    return InputError(
        f"{table.what} {table.uri}: column {stored!r} is missing; "
        f"{(advice or [did_you_mean(stored, table.names)])[0]}"
    )


def check_rows(table: pa.Table, what: str, uri: str) -> None:
    """Raise InputError for a table without rows."""
    if table.num_rows == 0:
        raise InputError(f"{what} {uri}: has no rows; give at least one")


def check_ids(column: pa.ChunkedArray, what: str, uri: str, name: str, *, unique: str | None = None) -> None:
    """Raise InputError for ids that are null, empty, very long, not UTF-8, or hold a control character.

    The error has numbers of rows and no id, because errors go to logs, and the id may be that of a person.
    `unique` is the remedy for repeated ids. Without it ids may repeat.
    """
    bad = pc.or_kleene(pc.is_null(column), pc.equal(pc.fill_null(column, ""), ""))
    refuse(what, uri, bad, f"an empty {name}", row_numbers(bad), "drop or fill them")
    check_texts(column, what, uri, name, max_bytes=MAX_ID_BYTES)
    # numpy takes "a" and "a\0" for the same, and \x1f separates the names in a hash.
    bad = pc.match_substring_regex(column, "[\\x00-\\x1f]")
    refuse(what, uri, bad, f"a control character in {name}", row_numbers(bad), "take them out")
    if unique and (repeated := len(column) - pc.count_distinct(column).as_py()):
        codes = column.combine_chunks().dictionary_encode().indices.to_numpy()
        again = np.ones(len(codes), bool)  # all rows but the first of each id
        again[np.unique(codes, return_index=True)[1]] = False
        raise InputError(
            f"{what} {uri}: {repeated} {name}s are repeated ({row_numbers(pa.array(again))}); {unique}"
        )


def check_texts(
    column: pa.ChunkedArray, what: str, uri: str, name: str, *, max_bytes: int = MAX_TEXT_BYTES
) -> None:
    """Raise InputError for texts that are very long or not UTF-8. Null and "" pass."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raise InputError(
            f"{what} {uri}: column {name!r} is not UTF-8 throughout; encode it and write again"
        ) from None
    bad = pc.fill_null(pc.greater(pc.binary_length(column), max_bytes), False)
    refuse(what, uri, bad, f"a {name} of more than {max_bytes:,} bytes", row_numbers(bad), "shorten them")


def check_numbers(column: pa.ChunkedArray, what: str, uri: str, name: str) -> None:
    """Raise InputError for numbers that are not finite or very large. Null passes."""
    size = pc.abs(column.cast(pa.float64(), safe=False))
    bad = pc.fill_null(pc.invert(pc.less(size, MAX_NUMBER)), False)
    refuse(
        what,
        uri,
        bad,
        f"a {name} that is not below {MAX_NUMBER:g}",
        row_numbers(bad),
        "give smaller numbers, or null",
    )


def refuse(what: str, uri: str, bad: pa.ChunkedArray, defect: str, examples: str, remedy: str) -> None:
    """Raise InputError if any row is `bad`."""
    count = pc.sum(bad).as_py() or 0
    if count:
        raise InputError(f"{what} {uri}: {count} of {len(bad)} rows have {defect} ({examples}); {remedy}")


def row_numbers(bad: pa.ChunkedArray) -> str:
    """Return the numbers of the first bad rows, as an error shows them."""
    rows = np.flatnonzero(bad.to_numpy(zero_copy_only=False))[:MAX_EXAMPLES]
    return "rows " + ", ".join(str(row) for row in rows)
