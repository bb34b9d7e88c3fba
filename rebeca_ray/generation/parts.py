"""Files written from inside a Ray Data graph: each under a name its content decides, each with a record written after it.

A file without a record does not exist for anybody: it is what a killed attempt left. A task that Ray tries again writes over its
own file.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.identity import hash128
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table

WRITER_CPUS = 0.5  # writing waits for storage
BUSY = "busy_seconds"  # the column in which actors tell what a row took them; never written


class WriteParts:
    """Ray Data stage: rows in; a file for each combination of the `by` columns in a batch; a row of records out for each file.

    Records tell `path` (below `root`), `rows`, `bytes`, `sha256`, `failed` (rows with an `error`), `busy_seconds`, the values of the
    `by` columns, and `note`'s. With a folder for `records` they are also written there, and the `by` columns are in them alone.
    """

    def __init__(
        self,
        root: str,
        folder: str,
        *,
        by: list[str],
        epoch: int,
        row_group_size: int,
        records: str | None = None,
        metadata: dict[bytes, bytes] | None = None,
        note: dict[str, int],
    ) -> None:
        self.root, self.folder, self.by, self.epoch, self.row_group_size = (
            root,
            folder,
            by,
            epoch,
            row_group_size,
        )
        self.records, self.metadata, self.note = records, metadata, note

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self.write(batch.filter(mask), values) for values, mask in self.groups(batch)]
        return pa.Table.from_pylist(rows) if rows else pa.table({"path": pa.array([], pa.string())})

    def groups(self, batch: pa.Table) -> Iterator[tuple[dict[str, Any], pa.Array]]:
        for values in batch.select(self.by).group_by(self.by).aggregate([]).to_pylist():
            masks = [pc.equal(batch[name], value).combine_chunks() for name, value in values.items()]
            yield values, masks[0] if len(masks) == 1 else pc.and_(*masks)

    def write(self, table: pa.Table, values: dict[str, Any]) -> dict[str, Any]:
        name = f"part-{self.epoch:06d}-{hash128(*table['item_id'].to_pylist())[:16]}"
        path = "/".join(
            [self.folder, *(f"{column}={value}" for column, value in values.items()), f"{name}.parquet"]
        )
        busy = float(np.sum(table[BUSY].to_numpy()))
        table = table.select(
            [
                name
                for name in table.column_names
                if name != BUSY and (self.records is None or name not in self.by)
            ]
        )
        table = table.replace_schema_metadata(self.metadata)
        embeds = "image_embeds" if "image_embeds" in table.column_names else None
        written = write_table(
            table, join(self.root, path), row_group_size=self.row_group_size, embed_column=embeds
        )
        failed = pc.sum(pc.is_valid(table["error"])).as_py() if "error" in table.column_names else 0
        record = {**values, **self.note, "path": path, **written, "failed": failed or 0, BUSY: round(busy, 3)}
        if self.records:
            write_json(
                record, join(self.records, f"{'-'.join(str(value) for value in values.values())}-{name}.json")
            )
        return record


def with_busy_seconds(table: pa.Table, seconds: float) -> pa.Table:
    """The rows of one call of an actor, with what each took."""
    return table.append_column(
        BUSY, pa.array(np.full(table.num_rows, seconds / max(1, table.num_rows), np.float32))
    )
