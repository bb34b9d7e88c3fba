"""Columns of items, computed a table at a time: ranks, pairs of user and item, changes."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.figures import group_starts
from rebeca_ray.catalog.layout import POPULATION_USER


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return the table with new values in a column, cast to its type."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), values.cast(table.schema.field(name).type))


def close_gaps(items: pa.Table) -> pa.Table:
    """Return sorted items with ranks 0, 1, 2, … per user."""
    users = items["user_id"].to_numpy(zero_copy_only=False)
    starts = group_starts(users)
    rank = np.arange(len(users)) - np.repeat(starts, np.diff([*starts, len(users)]))
    return set_column(items, "rank", pa.array(rank, pa.int16()))


def user_and_item(items: pa.Table) -> pa.Array:
    """Return each row's user and item as one text. Users may share an item."""
    return pc.binary_join_element_wise(items["user_id"], items["item_id"], "\x1f").combine_chunks()


def without_pool(items: pa.Table) -> pa.Table:
    """Return the items that somebody requested: all but those of the population pool."""
    return items.filter(pc.not_equal(items["user_id"], POPULATION_USER))


KEY = ["item_id", "user_id"]
UPDATABLE = ["rank", "like_probability", "image_file", "image_row"]
COMPARED = [*KEY, *UPDATABLE]


def changes_table(items: pa.Table, before: pa.Table | None) -> pa.Table:
    """Return `schemas.CHANGES` of items of a bucket against those of the previous snapshot."""
    now = items.select(COMPARED)
    before = now.slice(0, 0) if before is None else before.select(COMPARED)
    keys, keys_before = user_and_item(now), user_and_item(before)
    row_before = pc.index_in(keys, value_set=keys_before)
    stayed, old = now.filter(pc.is_valid(row_before)), before.take(row_before.drop_null())
    same = np.ones(stayed.num_rows, bool)
    for name in UPDATABLE:
        same &= stayed[name].fill_null(-1).to_numpy() == old[name].fill_null(-1).to_numpy()
    parts = {
        "added": now.filter(pc.is_null(row_before)),
        "removed": before.filter(pc.invert(pc.is_in(keys_before, value_set=keys))),
        "updated": stayed.filter(pa.array(~same)),
    }
    tables = [
        pa.table([part["item_id"], part["user_id"], pa.repeat(change, part.num_rows)], schema=schemas.CHANGES)
        for change, part in parts.items()
    ]
    return pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("item_id", "ascending")])
