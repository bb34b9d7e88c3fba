"""Files written from inside a graph. The content decides the name of a file, and a record follows each.

A file without a record does not exist: a killed attempt left it. A task that Ray retries writes over its own
file.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.identity import hash128
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import write_record

# Shards that nothing is rendered for.
NOT_RENDERED = -1  # of a rescored item, which has its image already
SHARED = -2  # of a borrowed item: its lender's shard renders the image
BUSY = "busy_seconds"  # the column in which actors report the time per row; never written


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """The record of one file: its rows, its checksum, and the actors' time for it."""

    bucket: int
    shard: int
    attempt: int
    path: str  # below the root that the writer was given
    rows: int
    bytes: int
    sha256: str
    failed: int  # rows with an error
    busy_seconds: float

    @classmethod
    def from_dict(cls, values: JsonObject) -> "PartRecord":
        return cls(**values)


def num_shared(parts: Sequence[PartRecord]) -> int:
    """Return how many items of a plan borrow their image."""
    return sum(part.rows for part in parts if part.shard == SHARED)


@dataclass(frozen=True, kw_only=True)
class WriteParts:
    """Stage: write one file per combination of the `by` columns in a batch; one `PartRecord` per file out.

    With a folder for `records`, each record is also written there, and the files do not repeat the `by`
    columns. `shard` is that of all rows, unless it is among the `by` columns.
    """

    root: str
    folder: str  # below the root
    by: tuple[str, ...]
    fencing_token: int
    row_group_size: int
    records: str | None = None
    metadata: dict[bytes, bytes] | None = None
    shard: int = 0
    attempt: int = 0

    def __call__(self, batch: pa.Table) -> pa.Table:
        records = [self.write(rows, values) for values, rows in self.groups(batch)]
        empty = pa.table({"path": pa.array([], pa.string())})
        return pa.Table.from_pylist([asdict(record) for record in records]) if records else empty

    def groups(self, batch: pa.Table) -> Iterator[tuple[dict[str, int], pa.Table]]:
        names = list(self.by)
        groups = batch.select(names).group_by(names).aggregate([]).to_pylist()
        if len(groups) == 1:  # a filter would copy the images
            yield groups[0], batch
            return
        for values in groups:
            masks = [pc.equal(batch[name], value).combine_chunks() for name, value in values.items()]
            yield values, batch.filter(masks[0] if len(masks) == 1 else pc.and_(*masks))

    def write(self, table: pa.Table, values: dict[str, int]) -> PartRecord:
        """Write one file, then its record."""
        name = f"part-{self.fencing_token:06d}-{hash128(*table['item_id'].to_pylist())[:16]}"
        folders = [f"{column}={value}" for column, value in values.items()]
        path = "/".join([self.folder, *folders, f"{name}.parquet"])
        busy = float(np.sum(table[BUSY].to_numpy()))
        dropped = {BUSY, *(self.by if self.records else ())}
        table = table.select([column for column in table.column_names if column not in dropped])
        written = write_table(
            table.replace_schema_metadata(self.metadata),
            join(self.root, path),
            row_group_size=self.row_group_size,
            embed_column="image_embeds" if "image_embeds" in table.column_names else None,
        )
        failed = pc.sum(pc.is_valid(table["error"])).as_py() if "error" in table.column_names else 0
        record = PartRecord(
            bucket=values["bucket"],
            shard=values.get("shard", self.shard),
            attempt=self.attempt,
            path=path,
            **written,
            failed=failed or 0,
            busy_seconds=round(busy, 3),
        )
        if self.records:
            key = "-".join(str(value) for value in values.values())
            write_record(asdict(record), join(self.records, f"{key}-{name}.json"))
        return record


class BusyClock:
    """The time in which at least one call of an actor ran; calls in several threads may overlap."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls, self.since, self.unclaimed = 0, 0.0, 0.0

    def start(self) -> None:
        """Note that a call begins."""
        with self.lock:
            self.tick()
            self.calls += 1

    def stop(self) -> float:
        """Note that a call ends; return the busy time that no call before it has claimed."""
        with self.lock:
            self.tick()
            self.calls -= 1
            claimed, self.unclaimed = self.unclaimed, 0.0
        return claimed

    def tick(self) -> None:
        now = time.perf_counter()
        self.unclaimed += now - self.since if self.calls else 0.0
        self.since = now


def with_busy_seconds(table: pa.Table, seconds: float) -> pa.Table:
    """Return the rows of one call of an actor with the seconds per row."""
    per_row = np.full(table.num_rows, seconds / max(1, table.num_rows), np.float32)
    return table.append_column(BUSY, pa.array(per_row))
