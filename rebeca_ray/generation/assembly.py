"""The inputs and results of assembling: values that pass from bucket to snapshot."""

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from rebeca_ray.catalog.figures import QualitySums
from rebeca_ray.catalog.manifest import FileRow
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Decision
from rebeca_ray.generation.parts import PartRecord


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
    stale: bool = False


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The inputs that all buckets of a run share."""

    context: RunContext
    parts: list[PartRecord]  # of the plan
    files: list[ImageFile]
    timed_out: bool
    now: datetime
    metadata: dict[str, str]  # of every file but images
    first_file: int  # number of this run's first image file
    first_compacted: int  # number of the first file that bucket 0 may write when it compacts
    pool_decision: Decision | None
    pool: Pool | None = None


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


@dataclass(frozen=True, kw_only=True)
class BucketTables:
    """The items of one bucket before they are written, its failures, and its stale users."""

    items: pa.Table
    errors: pa.Table
    stale: set[str]
