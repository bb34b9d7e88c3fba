"""What was drawn: image files of a run, and where in them each item is, or why it failed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.storage.filesystem import join, open_filesystem

COLUMNS = ["item_id", "error", "width", "safety_probability"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One row an item: an item drawn twice counts once, and one that failed and was drawn again did not fail.

    One without `width` or `error` was not fit to be shown.
    """

    item_id: pa.Array
    error: pa.Array
    width: pa.Array
    safety_probability: pa.Array
    attempt: pa.Array
    file: pa.Array  # its number
    row: pa.Array

    @classmethod
    def read(cls, root: str, files: list[dict[str, Any]]) -> Self:
        """Of files with `path`, `file` (a number) and `attempt`; without pixels."""
        filesystem, base = open_filesystem(root)

        def index(file: dict[str, Any]) -> pa.Table:
            with filesystem.open(
                join(base, file["path"]), "rb", cache_type="none"
            ) as handle:  # not the pixels between
                table = pq.read_table(handle, columns=COLUMNS)
            count = table.num_rows
            for name, values in (
                ("file", np.full(count, file["file"])),
                ("row", np.arange(count)),
                ("attempt", np.full(count, file["attempt"])),
            ):
                table = table.append_column(name, pa.array(values, pa.int32()))
            return table

        with ThreadPoolExecutor(16) as pool:
            tables = list(pool.map(index, files))
        if not tables:
            kinds = [pa.string(), pa.string(), pa.int32(), pa.float32(), pa.int32(), pa.int32(), pa.int32()]
            return cls(
                **{
                    name: pa.array([], kind)
                    for name, kind in zip([*COLUMNS, "file", "row", "attempt"], kinds, strict=True)
                }
            )
        table = pa.concat_tables(tables)
        # index_in() finds the first of repeated ids: those that did not fail come first, then the latest failure.
        failed = pc.is_valid(table["error"]).cast(pa.int8())
        order = pc.sort_indices(
            table.append_column("failed", failed),
            sort_keys=[("failed", "ascending"), ("attempt", "descending")],
        )
        return cls(
            **{
                name: column.combine_chunks()
                for name, column in zip(table.column_names, table.take(order), strict=True)
            }
        )
