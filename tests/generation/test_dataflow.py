"""Graphs on Ray leave nothing behind in the process that runs them, and pass rows on as they come."""

import gc
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from ray.data._internal.execution.operators.map_operator import MapOperator

from rebeca_ray.generation.dataflow import Actors, Stage, run_graph


@pytest.mark.usefixtures("ray_local")
def test_a_graph_frees_the_objects_of_the_graph_before_it(tmp_path: Path) -> None:
    """Each operator holds its function and its input in the store. Python collects them much later."""
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "rows.parquet")
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            stages = [Stage(work=lambda batch: batch, batch_size=None)]
            batches = list(run_graph([str(tmp_path / "rows.parquet")], stages, in_process=False))
            assert pa.concat_tables(batches)["number"].to_pylist() == [1, 2]
            counts.append(sum(isinstance(value, MapOperator) for value in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[1] == counts[0] > 0


class Draw:
    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def with_time(name: str, seconds: float, batch: pa.Table) -> pa.Table:
    time.sleep(seconds)
    return batch.append_column(name, pa.array([time.time()] * batch.num_rows))


@pytest.mark.usefixtures("ray_local")
def test_writing_begins_before_all_is_read_where_reading_has_the_only_cpu_that_is_left(
    tmp_path: Path,
) -> None:
    files = [str(tmp_path / f"{number}.parquet") for number in range(12)]
    for file in files:
        pq.write_table(pa.table({"number": range(8)}), file)
    draw = Actors(count=1, cpus=ray.cluster_resources()["CPU"] - 1)
    stages = [
        Stage(work=partial(with_time, "read", 0.5), batch_size=None),
        Stage(work=Draw, batch_size=8, actors=draw, rows_per_block=8),
        Stage(work=partial(with_time, "written", 0), batch_size=16),
    ]
    rows = pa.concat_tables(run_graph(files, stages, in_process=False))
    assert sorted(rows["number"].to_pylist()) == sorted([*range(8)] * 12)
    assert pc.min(rows["written"]).as_py() < pc.max(rows["read"]).as_py()
