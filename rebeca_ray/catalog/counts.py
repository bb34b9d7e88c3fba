"""What becomes of every requested item, counted."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas

KINDS = (schemas.NEW, schemas.CARRIED, schemas.POPULATION, "failed", "filtered", "deferred")


def tally(values: Any) -> dict[Any, int]:
    counted = pc.value_counts(pa.array(values) if isinstance(values, list) else values)
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
