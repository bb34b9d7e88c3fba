"""Counting: the outcomes of requested items, and how often each value of a column occurs."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas

FAILED, FILTERED, DEFERRED = "failed", "filtered", "deferred"
OUTCOMES = (schemas.NEW, schemas.CARRIED, schemas.POPULATION, FAILED, FILTERED, DEFERRED)


def tally(values: Any) -> dict[Any, int]:
    """Return how often each value of a list or an Arrow column occurs."""
    counted = pc.value_counts(pa.array(values) if isinstance(values, list) else values)
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
