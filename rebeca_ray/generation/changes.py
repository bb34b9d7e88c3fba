"""The changes of a bucket since the snapshot before.

Items came, went, or stayed with another rank, like probability or image location.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas

KEY = ["item_id", "user_id"]
UPDATABLE = ["rank", "like_probability", "image_file", "image_row"]
COMPARED = [*KEY, *UPDATABLE]


def changes_table(items: pa.Table, before: pa.Table | None) -> pa.Table:
    """Return `schemas.CHANGES` of items of a bucket against those of the snapshot before."""
    now = items.select(COMPARED)
    before = now.slice(0, 0) if before is None else before.select(COMPARED)
    keys, keys_before = (
        pc.binary_join_element_wise(part["user_id"], part["item_id"], "\x1f").combine_chunks()
        for part in (now, before)
    )
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
