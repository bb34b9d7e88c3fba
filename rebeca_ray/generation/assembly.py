"""What assembling passes from step to step."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What every bucket of a run is assembled from."""

    run: Run
    previous: Snapshot | None
    num_buckets: int
    embed_dim: int
    prior: str  # fingerprint
    parts: list[dict[str, Any]]  # of the plan
    files: list[dict[str, Any]]  # of images, with their numbers
    late: bool  # time ran out
    max_safety_probability: float
    now: datetime
    metadata: dict[str, str]
    first_compacted: int  # number of the first file that bucket 0 may write when it compacts
    pool: dict[str, Any] | None  # the decision on it
    pool_items: pa.Table | None = None  # as they are in the snapshot
    pool_failed: int = 0
    pool_late: bool = False


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What came of a bucket: rows of schemas.FILES (images: of new ones alone), counts, figures, and live rows of image files."""

    files: list[dict[str, Any]]
    images: list[dict[str, Any]]
    counts: dict[str, int]
    sums: dict[str, float]
    live: dict[int, int]
    by_reference: bool = False
    undrawn: int = 0  # planned items with neither an image nor a reason, though time did not run out


@dataclass(frozen=True, kw_only=True)
class Together:
    """A bucket's items before they are written, its failures, and the users who were not finished in time."""

    items: pa.Table
    errors: pa.Table
    late: set[str]
    undrawn: int = 0
