"""Input tables: columns, ids, texts and numbers checked against `schemas.py`, before any stage uses them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.errors import InputError, did_you_mean, shown
from rebeca_ray.schemas import compatible, may_be_missing
from rebeca_ray.storage.parquet import ParquetInput

MAX_ID_BYTES, MAX_TEXT_BYTES = 1000, 10_000
MAX_EXAMPLES = 3
MAX_NUMBER = 2.0**24  # float32 holds every whole number up to here


def check_columns(
    table: ParquetInput, expected: pa.Schema, *, instead: dict[str, str] | None = None
) -> list[str]:
    """Return the columns of `expected` that the input has. Optional columns may be missing.

    Raises InputError for a missing column, with the advice of `instead` where the input has that other
    column. Raises InputError too for a column of another type in any of the files.
    """
    names = table.schema.names
    columns = [field.name for field in expected if field.name in names]
    for field in expected:
        if field.name not in names and not may_be_missing(field):
            advice = [remedy for other, remedy in (instead or {}).items() if other in names]
            raise InputError(
                f"{table.what} {table.uri}: column {field.name!r} is missing; "
                f"{(advice or [did_you_mean(field.name, names)])[0]}"
            )
    for name in columns:
        for file, schema in table.schemas.items():
            actual = schema.field(name).type
            if not compatible(actual, expected.field(name).type):
                where = f" in {file.rsplit('/', 1)[-1]}" if len(table.files) > 1 else ""
                raise InputError(
                    f"{table.what} {table.uri}: column {name!r} is {actual}{where}, "
                    f"expected {expected.field(name).type}; cast it and write again"
                )
    return columns


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its dictionary, if it has one."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def check_rows(table: pa.Table, what: str, uri: str) -> None:
    """Raise InputError for a table without rows."""
    if table.num_rows == 0:
        raise InputError(f"{what} {uri}: has no rows; give at least one")


def check_ids(column: pa.ChunkedArray, what: str, uri: str, name: str, *, unique: str | None = None) -> None:
    """Raise InputError for ids that are null, empty, very long, not UTF-8, or hold a control character.

    `unique` is the remedy for repeated ids. Without it ids may repeat.
    """
    column = plain(column)
    bad = pc.or_kleene(pc.is_null(column), pc.equal(pc.fill_null(column, ""), ""))
    refuse(what, uri, bad, f"an empty {name}", row_numbers(bad), "drop or fill them")
    check_texts(column, what, uri, name, max_bytes=MAX_ID_BYTES)
    # numpy takes "a" and "a\0" for the same, and \x1f separates the names in a hash.
    bad = pc.match_substring_regex(column, "[\\x00-\\x1f]")
    refuse(what, uri, bad, f"a control character in {name}", row_numbers(bad), "take them out")
    if unique and (repeated := len(column) - pc.count_distinct(column).as_py()):
        counted = pc.value_counts(column)
        often = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")[:MAX_EXAMPLES]
        raise InputError(
            f"{what} {uri}: {repeated} {name}s are repeated ({', '.join(map(shown, often.to_pylist()))}); "
            f"{unique}"
        )


def check_texts(
    column: pa.ChunkedArray, what: str, uri: str, name: str, *, max_bytes: int = MAX_TEXT_BYTES
) -> None:
    """Raise InputError for texts that are very long or not UTF-8. Null and "" pass."""
    column = plain(column)
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
    size = pc.abs(plain(column).cast(pa.float64(), safe=False))
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
