"""Stream an input through Ray Data: each task reads a file in batches of the declared types.

`ray.data.read_parquet` would take every column and the types of the first file, and would make columns of
folders above the input.
"""

from typing import Any

import pyarrow as pa

from rebeca_ray.ray_runtime import rows_of_files
from rebeca_ray.storage.parquet import ParquetInput


def stream(table: ParquetInput, schema: pa.Schema, rows: int) -> Any:
    """Return the columns of `schema` as a Ray Dataset, in batches of at most `rows` rows."""
    files = table.files
    return rows_of_files(len(files), lambda number: files[number].batches(schema, rows))
