"""The gate figures of a snapshot: rates per requested item, and means over its items.

A figure is a field of `GateFigures` and its computation here. `gate.min_<figure>` or `gate.max_<figure>` in
the config bounds it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict


class GateFigures(BaseModel):
    """A mean of nothing is None. Buckets that were carried over by reference are not part of the means."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    failed: float
    filtered: float
    duplicates: float | None = None
    like_probability: float | None = None
    diversity: float | None = None
    judged_items: int


class QualitySums(TypedDict, total=False):
    """Sums over a bucket's items; `figures_of` divides them."""

    items: float
    duplicates: float
    like: float
    judged: float
    distance: float
    users_with_several: float


def quality_sums(items: pa.Table) -> QualitySums:
    """Return sums over items that are sorted by user."""
    if items.num_rows == 0:
        return {}
    embeds = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(items.num_rows, -1)
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    starts = group_starts(items["user_id"].to_numpy(zero_copy_only=False))
    counts = np.diff([*starts, items.num_rows])

    mean_cosine = mean_cosines(unit, starts, counts)

    # Equal rows have equal products with any vector, and others hardly ever.
    # This takes much less work than comparing rows.
    product = embeds @ np.random.default_rng(0).standard_normal(embeds.shape[1])
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((product, owner))
    duplicates = int(((np.diff(product[order]) == 0) & (np.diff(owner[order]) == 0)).sum())

    like = items["like_probability"].drop_null()
    return {
        "items": float(items.num_rows),
        "duplicates": float(duplicates),
        "like": float(pc.sum(like).as_py() or 0.0),
        "judged": float(len(like)),
        "distance": float((1 - mean_cosine).sum()),
        "users_with_several": float(len(mean_cosine)),
    }


def mean_cosines(unit: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean cosine between two items, for each user with several. `unit` is sorted by user."""
    # The squared length of a sum of n unit vectors is n plus the sum of their cosines.
    squared_length = np.square(np.add.reduceat(unit, starts, axis=0)).sum(1)
    several = counts > 1
    pairs = counts[several] * (counts[several] - 1)
    cosines: np.ndarray = (squared_length[several] - counts[several]) / pairs
    return cosines


def figures_of(requested: int, failed: int, filtered: int, buckets: Iterable[QualitySums]) -> GateFigures:
    """Return the figures of a snapshot from its counts and the sums of its buckets."""
    sums: Counter[str] = Counter()
    for bucket in buckets:
        sums.update(bucket)

    def mean(total: str, count: str) -> float | None:
        return round(sums[total] / sums[count], 5) if sums[count] else None

    return GateFigures(
        failed=round(failed / requested, 6),
        filtered=round(filtered / requested, 6),
        duplicates=mean("duplicates", "items"),
        like_probability=mean("like", "judged"),
        diversity=mean("distance", "users_with_several"),
        judged_items=int(sums["items"]),
    )


def group_starts(users: np.ndarray) -> np.ndarray:
    """Return the first row of each user in a sorted column."""
    if not len(users):
        return np.array([], int)
    return np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
