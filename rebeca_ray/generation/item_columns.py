"""Columns of items, computed a table at a time: image locations, ranks."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.figures import group_starts
from rebeca_ray.catalog.layout import POPULATION_USER


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return the table with new values in a column, cast to its type."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), values.cast(table.schema.field(name).type))


def image_location(items: pa.Table) -> pa.Array:
    """Return each item's image location as one number: file in the upper 32 bits, row in the lower."""
    return pa.array((items["image_file"].to_numpy().astype(np.int64) << 32) + items["image_row"].to_numpy())


def close_gaps(items: pa.Table) -> pa.Table:
    """Return sorted items with ranks 0, 1, 2, … per user."""
    users = items["user_id"].to_numpy(zero_copy_only=False)
    starts = group_starts(users)
    rank = np.arange(len(users)) - np.repeat(starts, np.diff([*starts, len(users)]))
    return set_column(items, "rank", pa.array(rank, pa.int16()))


def without_pool(items: pa.Table) -> pa.Table:
    """Return the items that somebody requested: all but those of the population pool."""
    return items.filter(pc.not_equal(items["user_id"], POPULATION_USER))
