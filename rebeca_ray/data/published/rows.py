"""The rows of a published file, checked: each error names the line and the value.

CSV file -> `read_csv` -> `Rows` of texts -> `texts`, `numbers` -> `without_repeats`
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.errors import Failure, InputError, describe, did_you_mean, shown
from rebeca_ray.storage.data_file import csv_reader
from rebeca_ray.storage.filesystem import open_filesystem, unreadable
from rebeca_ray.storage.store import classify, failure_types

MAX_COLUMNS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of the file `uri`, as texts. `name_of_row` says where a row stands, such as `line 3`."""

    uri: str
    table: pa.Table
    name_of_row: Callable[[int], str]

    def refuse(self, bad: pa.Array, column: str, problem: str, remedy: str) -> None:
        """Raise InputError if any row is `bad`, with the name and the value of the first such row."""
        rows = np.flatnonzero(np.asarray(pc.fill_null(bad, True).to_numpy(zero_copy_only=False)))
        if len(rows):
            value = self.table[column][int(rows[0])].as_py()
            more = f" (and {len(rows) - 1:,} more rows)" if len(rows) > 1 else ""
            raise InputError(
                f"{self.uri}: {self.name_of_row(int(rows[0]))} has {column} {shown(value)}{more}; "
                f"{problem}; {remedy}"
            )

    def texts(self, column: str) -> pa.Array:
        """Return a column of ids without the spaces around them. Raises InputError for an empty one."""
        values = pc.utf8_trim_whitespace(self.table[column].combine_chunks())
        self.refuse(
            pc.fill_null(pc.equal(values, ""), True), column, "expected an id", "fill it or drop the row"
        )
        return values

    def numbers(self, column: str, low: float, high: float, *, whole: bool = False) -> pa.Array:
        """Return a column of ratings from `low` to `high`. Raises InputError for any other value."""
        trimmed = pc.utf8_trim_whitespace(self.table[column].combine_chunks())
        is_number = pc.match_substring_regex(trimmed, r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        values = pc.if_else(is_number, trimmed, pa.scalar(None, pa.string())).cast(pa.float64())
        bad = pc.or_(pc.less(values, low), pc.greater(values, high))
        if whole:
            bad = pc.or_(bad, pc.not_equal(values, pc.floor(values)))
        kind = "a whole number" if whole else "a number"
        reach = "" if np.isinf(high) else f" from {low:g} to {high:g}"
        self.refuse(bad, column, f"expected {kind}{reach}", "correct it or drop the row")
        return values

    def without_repeats(self, ratings: pa.Table, *, keep_last: bool) -> pa.Table:
        """Return the ratings with one per user and item: the last in time, then in the file.

        The rows of `ratings` are those of this table. Without `keep_last`, raises InputError for repeats.
        """
        pair = pc.binary_join_element_wise(ratings["user_id"], ratings["item_id"], "\x1f")
        code = pc.dictionary_encode(pair).combine_chunks().indices.to_numpy()
        row = np.arange(len(code))
        if not keep_last:
            first = np.full(code.max(initial=-1) + 1, -1)
            first[code[::-1]] = row[::-1]
            repeated = np.flatnonzero(first[code] != row)
            if len(repeated):
                raise self.repeats(ratings, int(first[code[repeated[0]]]), int(repeated[0]), len(repeated))
            return ratings
        time = np.zeros(len(code), np.int64)
        if "timestamp" in ratings.column_names:
            time = ratings["timestamp"].cast(pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()
        order = np.lexsort((row, time, code))
        is_last = np.append(np.diff(code[order]) != 0, True)[: len(order)]
        return ratings.take(pa.array(np.sort(order[is_last])))

    def repeats(self, ratings: pa.Table, first: int, second: int, count: int) -> InputError:
        """Return the error for several ratings of one item by one user."""
        before, now = (ratings.slice(row, 1).to_pylist()[0] for row in (first, second))
        more = f" (and {count - 1:,} more repeats)" if count > 1 else ""
        return InputError(
            f"{self.uri}: {self.name_of_row(second)} rates {now['user_id']} × {now['item_id']} with "
            f"{now['rating']:g}, {self.name_of_row(first)} with {before['rating']:g}{more}; "
            "expected one rating per pair; remove one, or keep the last of each with --repeated last"
        )


def read_csv(uri: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """Read columns of a CSV file with a header line, as texts. The header's names may carry spaces.

    Raises InputError for a missing file, a missing or repeated column, a line of another length, and a file
    without rows.
    """
    filesystem, path = open_filesystem(uri)
    try:
        with csv_reader(filesystem, path, None) as reader:
            header = reader.schema.names
        names = {name.strip().strip("\ufeff"): name for name in header}
        check_header(uri, [name.strip() for name in header], columns)
        chosen = [name for name in (*columns, *optional) if name in names]
        with csv_reader(filesystem, path, [names[name] for name in chosen]) as reader:
            table = reader.read_all().rename_columns(chosen)
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is Failure.DAMAGED:
            raise InputError(
                f"{uri}: not readable as CSV ({describe(error)}); expected a header and rows of its length; "
                "get the file again"
            ) from None
        raise unreadable(uri, error) from None
    rows = Rows(uri=uri, table=table, name_of_row=lambda row: f"line {line_of(uri, row)}")
    if not table.num_rows:
        raise InputError(f"{uri}: has no rows below its header; expected at least one; get the file again")
    return rows


def check_header(uri: str, header: list[str], columns: Sequence[str]) -> None:
    """Raise InputError unless the header has each of `columns` once."""
    for name in columns:
        if (times := header.count(name)) != 1:
            listed = ", ".join(header[:MAX_COLUMNS_SHOWN]) + (" …" if len(header) > MAX_COLUMNS_SHOWN else "")
            problem = f"twice or more ({listed})" if times else f"missing ({listed})"
            raise InputError(
                f"{uri}: column {name!r} of the header is {problem}; expected {', '.join(columns)}; "
                f"{did_you_mean(name, header) if not times else 'rename the others'}"
            )


def line_of(uri: str, row: int) -> int:
    """Return the line of the file on which a row of `read_csv` ends. Only errors ask for it."""
    filesystem, path = open_filesystem(uri)
    with filesystem.open(path, "rb", compression="infer") as file:
        lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        rows = (lines.line_num for record in lines if record)
        next(rows)
        return next(line for index, line in enumerate(rows) if index == row)
