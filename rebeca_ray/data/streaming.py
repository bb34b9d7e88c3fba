"""Stream an input through Ray Data: each task reads a file in batches of the declared types.

`ray.data.read_parquet` would take every column and the types of the first file, and would make columns of
folders above the input.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from rebeca_ray.ray_runtime import with_log
from rebeca_ray.storage.data_file import DataFile
from rebeca_ray.storage.parquet import ParquetInput

Check = Callable[[pa.Table, DataFile, int], None]


def stream(table: ParquetInput, schema: pa.Schema, rows: int, check: Check | None = None) -> Any:
    """Return the columns of `schema` as a Ray Dataset, in batches of at most `rows` rows.

    `check` sees every batch, with its file and the number of its first row there.
    """
    import ray

    files = table.files

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for index in batch["id"].to_pylist():
            first_row = 0
            for part in files[index].batches(schema, rows):
                if check is not None:
                    check(part, files[index], first_row)
                first_row += part.num_rows
                yield part

    numbers = ray.data.range(len(files), override_num_blocks=len(files))
    return numbers.map_batches(with_log(read), batch_size=1, batch_format="pyarrow")
