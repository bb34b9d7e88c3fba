"""The index of rendered items: in which image file and row each is, or why it failed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.generation.assembly import ImageFile
from rebeca_ray.storage.filesystem import join, open_filesystem

COLUMNS = {
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
        """Read the index of some image files, without pixels."""
        filesystem, base = open_filesystem(root)

        def index(file: ImageFile) -> pa.Table:
            # Without a cache, so that the pixels between the columns are not read.
            with filesystem.open(join(base, file.record.path), "rb", cache_type="none") as handle:
                table = pq.read_table(handle, columns=list(COLUMNS))
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
            kinds = {**COLUMNS, "file": pa.int32(), "row": pa.int32(), "attempt": pa.int32()}
            return cls(**{name: pa.array([], kind) for name, kind in kinds.items()})
        table = pa.concat_tables(tables)
        # index_in() finds the first of repeated ids.
        # So rows without an error come first, then the latest failure.
        table = table.append_column("failed", pc.is_valid(table["error"]).cast(pa.int8()))
        order = pc.sort_indices(table, sort_keys=[("failed", "ascending"), ("attempt", "descending")])
        table = table.drop_columns(["failed"]).take(order)
        columns = zip(table.column_names, table, strict=True)
        return cls(**{name: column.combine_chunks() for name, column in columns})
