"""The progress of long work: a live bar on a terminal, elsewhere a line of the log at intervals.

A bar stays below the lines that the log and the workers write. It shows wherever the log shows lines of level
info, unless these are JSON. Standard output is left alone if it goes elsewhere.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rebeca_ray.log import current_settings

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.progress import Progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0
COLUMNS_FOR_BAR = 120  # of the terminal; a narrower one shows the figures alone


class Counted:
    """The rows of a stage that are done, and the number that failed. A change may write a line of the log."""

    def __init__(self, name: str, total: int, *, live: bool = False) -> None:
        self.name, self.total, self.live = name, total, live
        self.done, self.failed = 0, 0
        self.started = self.logged = time.monotonic()

    def add(self, rows: int = 1, *, failed: int = 0) -> None:
        """Count rows that are done, and those that failed."""
        self.done, self.failed = self.done + rows, self.failed + failed
        if not self.live and self.done and time.monotonic() - self.logged > SECONDS_BETWEEN_LINES:
            self.write_line()

    def reach(self, rows: int) -> None:
        """Count rows up to `rows`; fewer than before change nothing."""
        self.add(max(0, rows - self.done))

    def tables(self, tables: "Iterable[pa.Table]") -> "Iterator[pa.Table]":
        """Yield all tables, and count the rows of each once it was used."""
        for table in tables:
            yield table
            self.add(table.num_rows)

    def figures(self) -> str:
        """Return rows, rate, elapsed time, and the time to go at the mean rate."""
        seconds = time.monotonic() - self.started
        parts = [f"{self.done:,} of {self.total:,}"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.done:
            parts.append(f"{self.done / max(1e-9, seconds):,.1f} per second")
        parts.append(f"{timedelta(seconds=round(seconds))} elapsed")
        if self.done:
            to_go = max(0, self.total - self.done) * seconds / self.done
            parts.append(f"ETA {timedelta(seconds=round(to_go))}")
        return ", ".join(parts)

    def write_line(self) -> None:
        self.logged = time.monotonic()
        log.info(f"{self.name}: {self.figures()}")


def is_live() -> bool:
    """Return whether progress shows as a bar."""
    return sys.stderr.isatty() and not current_settings().json_lines and log.isEnabledFor(logging.INFO)


@contextmanager
def counting(name: str, total: int) -> Iterator[Counted]:
    """Show the progress of a stage of `total` rows in the block, which counts them."""
    counted = Counted(name, total, live=is_live())
    if counted.live:
        with bar_of(counted):
            yield counted
        return
    yield counted
    if counted.logged > counted.started:  # it took long, so its end is worth a line
        counted.write_line()


def bar_of(counted: Counted) -> "Progress":
    """Return a bar on standard error. While it is live, lines written there scroll above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            task.completed = counted.done
            return Text(counted.figures())

    console = Console(file=sys.stderr, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        Figures(table_column=Column(no_wrap=True)),
        *([BarColumn(20)] if console.width >= COLUMNS_FOR_BAR else []),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
    )
    bar.add_task(counted.name, total=counted.total)
    return bar
