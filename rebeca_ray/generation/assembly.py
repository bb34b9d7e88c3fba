"""The inputs and results of assembling: image files, the index of rendered items, what a bucket wrote."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.figures import QualitySums
from rebeca_ray.catalog.manifest import FileRow
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Decision, DecisionsFile
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.generation.repair.previous import Damage
from rebeca_ray.storage.records import read_columns


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file of this run, with the number that `items.image_file` refers to."""

    number: int
    record: PartRecord


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The population pool: the decision on it, and its items as they are in the snapshot."""

    decision: Decision
    items: pa.Table
    num_failed: int = 0
    num_filtered: int = 0
    stale: bool = False


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The inputs that all buckets of a run share."""

    context: RunContext
    timed_out: bool
    now: datetime
    metadata: dict[str, str]  # of every file but images
    first_file: int  # number of this run's first image file
    first_compacted: int  # number of the first file that bucket 0 may write when it compacts
    pool_decision: Decision | None
    damaged: Damage = field(default_factory=dict)  # files of the previous snapshot
    pool: Pool | None = None


@dataclass(frozen=True, kw_only=True)
class BucketInput:
    """The inputs that one bucket has for itself: its decisions, its part of the plan, its images."""

    bucket: int
    decided: DecisionsFile
    parts: list[PartRecord]  # of the plan
    files: list[ImageFile]


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """The files of one bucket, its counts and figures."""

    files: list[FileRow]  # of all tables but images
    images: list[FileRow]  # image files that compaction wrote
    counts: dict[str, int]
    sums: QualitySums
    live_rows: dict[int, int]  # by image file
    by_reference: bool = False
    unrendered: int = 0  # planned items with neither image nor error, though time did not run out
    damaged: Damage = field(default_factory=dict)  # files that were read, and could not be


@dataclass(frozen=True, kw_only=True)
class BucketTables:
    """The items of one bucket before they are written, its failures, and its stale users."""

    items: pa.Table
    errors: pa.Table
    filtered: dict[str, int]  # by user: items that were rendered, and not fit to be shown
    stale: set[str]


INDEX_COLUMNS = {
    "item_id": pa.string(),
    "error": pa.string(),
    "width": pa.int32(),
    "safety_probability": pa.float32(),
}


@dataclass(frozen=True, kw_only=True)
class RenderedIndex:
    """One row per item.

    An item that was rendered twice counts once; one that failed and was then rendered did not fail.

    A row without `width` or `error` was not fit to be shown.
    """

    item_id: pa.Array
    error: pa.Array
    width: pa.Array
    safety_probability: pa.Array
    attempt: pa.Array
    file: pa.Array  # the number of the image file
    row: pa.Array

    @classmethod
    def read(cls, root: str, files: Sequence[ImageFile]) -> Self:
        """Read the index of some image files, without pixels. Raises DamagedFilesError for a damaged one."""

        def index(file: ImageFile) -> pa.Table:
            table = read_columns(root, file.record.path, list(INDEX_COLUMNS))
            count = table.num_rows
            numbers = {
                "file": np.full(count, file.number),
                "row": np.arange(count),
                "attempt": np.full(count, file.record.attempt),
            }
            for name, values in numbers.items():
                table = table.append_column(name, pa.array(values, pa.int32()))
            return table

        with ThreadPoolExecutor(16) as pool:
            tables = list(pool.map(index, files))
        if not tables:
            kinds = {**INDEX_COLUMNS, "file": pa.int32(), "row": pa.int32(), "attempt": pa.int32()}
            return cls(**{name: pa.array([], kind) for name, kind in kinds.items()})
        table = pa.concat_tables(tables)
        # index_in() finds the first of repeated ids.
        # So rows without an error come first, then the latest failure.
        table = table.append_column("failed", pc.is_valid(table["error"]).cast(pa.int8()))
        order = pc.sort_indices(table, sort_keys=[("failed", "ascending"), ("attempt", "descending")])
        table = table.drop_columns(["failed"]).take(order)
        columns = zip(table.column_names, table, strict=True)
        return cls(**{name: column.combine_chunks() for name, column in columns})
