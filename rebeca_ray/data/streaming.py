"""Stream an input through Ray Data: each task reads a file in batches of the declared types.

`ray.data.read_parquet` would take every column and the types of the first file, and would make columns of
folders above the input.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rebeca_ray.ray_runtime import with_log
from rebeca_ray.storage.parquet import ParquetInput


def stream(table: ParquetInput, schema: pa.Schema, rows: int) -> Any:
    """Return the columns of `schema` as a Ray Dataset, in batches of at most `rows` rows."""
    import ray

    files = table.files

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for index in batch["id"].to_pylist():
            yield from files[index].batches(schema, rows)

    numbers = ray.data.range(len(files), override_num_blocks=len(files))
    return numbers.map_batches(with_log(read), batch_size=1, batch_format="pyarrow")
