"""Graphs on Ray leave nothing behind in the process that runs them."""

import gc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.execution.operators.map_operator import MapOperator

from rebeca_ray.generation.dataflow import Stage, run_graph


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
