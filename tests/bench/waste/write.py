"""Write: the images table by our stage on Ray, by Ray's plain `write_parquet`, and both without Ray.

    python -m tests.bench.waste.write ray ROWS | alone ROWS

The rows have 63 kB of image and 3 kB of thumbnail. They lie in memory, and are written to memory (/dev/shm),
as a disk would be the limit. On Ray, the rate is that of the rows between ROWS / 4 and ROWS.
"""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.generation.parts import WriteParts
from rebeca_ray.generation.render import ROW_GROUP
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.storage.parquet import write_table
from tests.bench.waste.machine import report

ROOT, ROWS_PER_BLOCK, ROWS_PER_FILE, ROUNDS = "/dev/shm/rebeca-bench", 500, 2500, 3


def rows_of(numbers: list[int]) -> pa.Table:
    """Return rows of `schemas.IMAGES` with random bytes as images."""
    random = np.random.default_rng(numbers[0])
    rows = [
        {
            "item_id": f"{number:032x}",
            "image": {"bytes": random.bytes(63_000), "path": f"{number:032x}.jpeg"},
            "thumbnail": random.bytes(3000),
            "width": 512,
            "height": 512,
            "seed": number,
        }
        for number in numbers
    ]
    return pa.Table.from_pylist(rows, schema=schemas.IMAGES)


def as_rendered(batch: pa.Table) -> pa.Table:
    """Return the rows of some numbers as render actors return them."""
    table = rows_of(batch["id"].to_pylist())
    bucket, busy = pa.array([0] * table.num_rows, pa.int32()), pa.array([0.0] * table.num_rows, pa.float32())
    return table.append_column("bucket", bucket).append_column("busy_seconds", busy)


def seconds(write: Callable[[], None]) -> float:
    shutil.rmtree(ROOT, ignore_errors=True)
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


def on_ray(rows: int) -> None:
    start_ray()
    import ray

    datasets = [
        ray.data.range(count, override_num_blocks=count // ROWS_PER_BLOCK)
        .map_batches(as_rendered, batch_format="pyarrow", batch_size=ROWS_PER_BLOCK)
        .materialize()
        for count in (rows // 4, rows)
    ]
    writer = WriteParts(
        root=ROOT,
        folder="images",
        by=("bucket",),
        fencing_token=1,
        row_group_size=ROW_GROUP,
        records=f"{ROOT}/records",
    )

    def by_us(dataset: Any) -> None:
        records = dataset.map_batches(writer, batch_size=ROWS_PER_FILE, batch_format="pyarrow")
        assert sum(batch["rows"].to_numpy().sum() for batch in records.iter_batches(batch_format="pyarrow"))

    def by_ray(dataset: Any) -> None:
        dataset.drop_columns(["bucket", "busy_seconds"]).write_parquet(f"{ROOT}/plain")

    rates: dict[str, list[float]] = {"ours": [], "ray": []}
    for number in range(ROUNDS + 1):
        for name, write in (("ours", by_us), ("ray", by_ray)):
            small, large = (seconds(lambda d=dataset, w=write: w(d)) for dataset in datasets)  # type: ignore[misc]
            if number:  # the first round starts Ray's workers
                rates[name].append(0.75 * rows / (large - small))
    shutil.rmtree(ROOT, ignore_errors=True)
    report({name: float(np.median(values)) for name, values in rates.items()})


def alone(rows: int) -> None:
    table = rows_of(list(range(rows)))
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: write_table(table, f"{ROOT}/ours.parquet", row_group_size=ROW_GROUP),
        "pyarrow": lambda: pq.write_table(table, f"{ROOT}.parquet"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, write in ways.items():
            taken = seconds(lambda w=write: w() and None)  # type: ignore[misc]
            if number:
                rates[name].append(rows / taken)
    shutil.rmtree(ROOT, ignore_errors=True)
    report({name: float(np.median(values)) for name, values in rates.items()})


if __name__ == "__main__":
    {"ray": on_ray, "alone": alone}[sys.argv[1]](int(sys.argv[2]))
