"""Pages of a snapshot's tables, each by few reads: some row groups of one file, and only the shown columns.

Rows are in the order of the files: bucket after bucket, and by user within a bucket.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.catalog.row_groups import complete, footer, open_parquet, read_slice

PAGE = 60  # users or items
GROUPS_PER_PAGE, FILES_PER_PAGE = 200, 1000  # row groups, and footers, that a page of a filter reads at most
READERS = ThreadPoolExecutor(16, "gallery")  # of files, for all searches together
FILES_AT_ONCE = 16  # of one search
LAST_CHARACTER = chr(0x10FFFF)


class TableFile(NamedTuple):
    """One file of a table, with the range of its users."""

    path: str
    bytes: int
    rows: int
    first_user: str | None
    last_user: str | None


class Position(NamedTuple):
    """Matches of a filter so far: all before a row group, and some in it.

    `file` counts the files of the table, `group` the row groups of the file.
    """

    file: int = 0
    group: int = 0
    matches: int = 0

    def __str__(self) -> str:
        return f"{self.file}.{self.group}.{self.matches}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Return the position that a link names, the first one for any other text."""
        numbers = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", text, re.ASCII)
        return cls(*map(int, numbers.groups())) if numbers else cls()


@dataclass(frozen=True)
class Filter:
    """A choice among the rows of `items`: a test of rows, and one of the statistics of a row group."""

    column: str
    matches: Callable[[pa.ChunkedArray], pa.ChunkedArray]
    may_match: Callable[[Any, Any], bool]  # the smallest and the largest value

    def may_be_in(self, metadata: pq.FileMetaData, group: int) -> bool:
        """Return whether a row group may hold a match; a column of nulls alone holds none."""
        statistics = statistics_of(metadata, group, self.column)
        if statistics is None:
            return True
        if not statistics.has_min_max:
            return not (statistics.has_null_count and statistics.num_values == 0)
        return self.may_match(statistics.min, statistics.max)


@dataclass(frozen=True)
class Matches:
    """Rows that match a filter, and where to look for more; None at the end of the table."""

    rows: pa.Table
    after: Position | None


class Tables:
    """The tables of one snapshot. Raises InputError for a file that is missing or damaged."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    @cached_property
    def files(self) -> dict[str, list[TableFile]]:
        """The files of every table, in order."""
        files: dict[str, list[TableFile]] = {}
        for row in self.snapshot.files.sort_by([("table", "ascending"), ("file", "ascending")]).to_pylist():
            files.setdefault(row["table"], []).append(
                TableFile(row["path"], row["bytes"], row["rows"], row["min_user_id"], row["max_user_id"])
            )
        return files

    @cached_property
    def changes(self) -> dict[str, int]:
        """The number of items that were added, removed or updated since the snapshot before."""
        counts = self.snapshot.table("changes", ["change"])["change"].value_counts().to_pylist()
        return {count["values"]: count["counts"] for count in counts}

    def num_rows(self, name: str) -> int:
        return sum(file.rows for file in self.files.get(name, []))

    def page(self, name: str, start: int, columns: list[str], count: int = PAGE) -> pa.Table:
        """Return some columns of `count` rows of a table, from row `start` on; fewer at its end."""
        tables, begin, stop = [], 0, start + count
        for file in self.files.get(name, []):
            end = begin + file.rows
            if begin < stop and start < end:
                tables.append(self.rows(name, file, max(0, start - begin), stop - begin, columns))
            begin = end
        return pa.concat_tables(tables) if tables else self.empty(name, columns)

    def rows(self, name: str, file: TableFile, start: int, stop: int, columns: list[str]) -> pa.Table:
        snapshot = self.snapshot
        stored = snapshot.stored_names(name, columns)
        assert stored is not None
        with explained(snapshot, file.path):
            table = read_slice(snapshot.root, file.path, file.bytes, start, stop, stored)
            return snapshot.renamed(name, complete(table, snapshot.stored_schema(name), stored))

    def empty(self, name: str, columns: list[str]) -> pa.Table:
        return self.snapshot.schema(name).empty_table().select(columns)

    def users_that_begin_with(self, text: str, columns: list[str], count: int = PAGE) -> pa.Table:
        """Return some users whose ids begin with a text, the user of exactly this id first."""
        exact = self.snapshot.table("users", columns, [text])
        others = islice(self.users_after(text, columns), count - exact.num_rows)
        return pa.concat_tables([exact, *others]).slice(0, count)

    def users_after(self, text: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield each user whose id begins with a text and is longer, as a table of one row."""
        last = text + LAST_CHARACTER
        files = [
            file
            for file in self.files.get("users", [])
            if file.first_user is not None
            and file.last_user is not None
            and file.first_user <= last
            and text <= file.last_user
        ]
        for begin in range(0, len(files), FILES_AT_ONCE):
            some = files[begin : begin + FILES_AT_ONCE]
            for table in READERS.map(lambda file: self.users_between(file, text, last, columns), some):
                yield from (table.slice(row, 1) for row in range(table.num_rows))

    def users_between(self, file: TableFile, text: str, last: str, columns: list[str]) -> pa.Table:
        """Return PAGE users of a file whose ids begin with a text, but for the text itself."""
        snapshot = self.snapshot
        with explained(snapshot, file.path):
            metadata = footer(snapshot.root, file.path, file.bytes)
        tables: list[pa.Table] = []
        begin = 0
        for group in range(metadata.num_row_groups):
            end = begin + metadata.row_group(group).num_rows
            statistics = statistics_of(metadata, group, "user_id")
            known = statistics is not None and statistics.has_min_max
            low, high = (statistics.min, statistics.max) if known else (text, last)
            if low <= last and text <= high and sum(table.num_rows for table in tables) < PAGE:
                read = [*dict.fromkeys([*columns, "user_id"])]
                table = self.rows("users", file, begin, end, read)
                chosen = pc.and_(
                    pc.starts_with(table["user_id"], pattern=text), pc.not_equal(table["user_id"], text)
                )
                tables.append(table.filter(chosen).select(columns))
            begin = end
        return pa.concat_tables(tables) if tables else self.empty("users", columns)

    def matching(self, chosen: Filter, columns: list[str], start: Position) -> Matches:
        """Return PAGE items that match, from a position on; fewer if GROUPS_PER_PAGE groups hold fewer."""
        tables: list[pa.Table] = []
        count, read, snapshot = 0, 0, self.snapshot
        files = self.files.get("items", [])
        for number in range(start.file, len(files)):
            if number - start.file >= FILES_PER_PAGE:
                return Matches(self.joined(tables, columns), Position(number))
            file = files[number]
            with explained(snapshot, file.path):
                metadata = footer(snapshot.root, file.path, file.bytes)
            first = start.group if number == start.file else 0
            for group in range(first, metadata.num_row_groups):
                if not chosen.may_be_in(metadata, group):
                    continue
                if count >= PAGE or read >= GROUPS_PER_PAGE:
                    return Matches(self.joined(tables, columns), Position(number, group))
                with explained(snapshot, file.path):
                    table = self.matches_in(file, group, metadata, chosen, columns)
                skipped = start.matches if (number, group) == start[:2] else 0
                tables.append(table.slice(skipped, PAGE - count))
                count, read = count + tables[-1].num_rows, read + 1
                if (shown := skipped + tables[-1].num_rows) < table.num_rows:
                    return Matches(self.joined(tables, columns), Position(number, group, shown))
        return Matches(self.joined(tables, columns), None)

    def matches_in(
        self, file: TableFile, group: int, metadata: pq.FileMetaData, chosen: Filter, columns: list[str]
    ) -> pa.Table:
        """Return the rows of one row group that match."""
        names = [*dict.fromkeys([*columns, chosen.column])]
        with open_parquet(self.snapshot.root, file.path, file.bytes, metadata) as parquet:
            table = parquet.read_row_group(group, columns=names, use_threads=False)
        return table.filter(chosen.matches(table[chosen.column])).select(columns)

    def joined(self, tables: list[pa.Table], columns: list[str]) -> pa.Table:
        return pa.concat_tables(tables) if tables else self.empty("items", columns)


def statistics_of(metadata: pq.FileMetaData, group: int, column: str) -> Any:
    """Return the statistics of a column in a row group, None if there are none."""
    row_group = metadata.row_group(group)
    for number in range(metadata.num_columns):
        if metadata.schema.column(number).path == column:
            return row_group.column(number).statistics
    return None
