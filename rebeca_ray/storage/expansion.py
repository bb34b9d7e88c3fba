"""Bound the memory of an input: a file of kilobytes can stand for terabytes.

In Parquet, a dictionary holds a long text once, and two bytes repeat it a thousand times. A compressed page
of zeros shrinks ten thousandfold.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# What a file may take in memory. Texts of real inputs shrink to a fifth or a twentieth.
FREE_BYTES, BYTES_PER_BYTE = 2**30, 100
FREE_ROWS, ROWS_PER_BYTE = 2**24, 100  # rows of distinct ids take at least a bit each, also when compressed


def most_bytes(size: int) -> int:
    """Return the bytes in memory of the largest column that a file of `size` bytes may have."""
    return FREE_BYTES + BYTES_PER_BYTE * size


def most_rows(size: int) -> int:
    return FREE_ROWS + ROWS_PER_BYTE * size


def too_large(size: int) -> pa.ArrowInvalid:
    return pa.ArrowInvalid(f"its {size:,} bytes stand for texts of more than {most_bytes(size):,}")


def counted(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of a file of `size` bytes. Raises ArrowInvalid once they hold too much together."""
    total = 0
    for batch in batches:
        total += batch.nbytes
        if total > most_bytes(size):
            raise too_large(size)
        yield batch


def check_texts_fit(source: pa.NativeFile, metadata: Any, names: list[str], size: int) -> None:
    """Raise ArrowInvalid if the texts of some columns would take too much memory.

    Looks at the dictionaries alone, and counts row by row only where they hold a long text.
    """
    paths = [
        column.path
        for column in map(metadata.schema.column, range(metadata.num_columns))
        if column.physical_type == "BYTE_ARRAY" and column.path.split(".")[0] in names
    ]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if not paths or sum(group.num_rows * group.total_byte_size for group in groups) <= most_bytes(size):
        return
    parquet = pq.ParquetFile(source, metadata=metadata, read_dictionary=paths)
    longest = 0  # bytes, if every row had the longest text of its row group
    for index, group in enumerate(groups):
        for batch in parquet.iter_batches(1, row_groups=[index], columns=paths):
            texts = [text for column in batch.columns for text in texts_in(column)]
            longest += group.num_rows * sum(max(lengths_in(text)[0], default=0) for text in texts)
            break
    if longest <= most_bytes(size):
        return
    total = 0
    for batch in parquet.iter_batches(2**16, columns=paths):
        for text in (text for column in batch.columns for text in texts_in(column)):
            lengths, indices = lengths_in(text)
            total += sum(
                lengths[count["values"]] * count["counts"]
                for count in pc.value_counts(indices.drop_null()).to_pylist()
            )
        if total > most_bytes(size):
            raise too_large(size)


def texts_in(column: pa.Array) -> Iterator[pa.Array]:
    """Yield a column of texts, or those inside a column of images: their bytes and their paths."""
    if not pa.types.is_struct(column.type):
        yield column
        return
    for index in range(column.type.num_fields):
        yield from texts_in(column.field(index))


def lengths_in(column: pa.Array) -> tuple[list[int], pa.Array]:
    """Return the lengths of the texts in a dictionary, and the index of each row's text.

    Lists of texts are no column of ours, and count as empty.
    """
    if not pa.types.is_dictionary(column.type):
        return [], pa.array([], pa.int32())
    return pc.binary_length(column.dictionary).fill_null(0).to_pylist(), column.indices
