"""Pick-a-Pic v1 and v2 (Kirstain et al. 2023): pairs of generated images, and the one that a user prefers.

SOURCE/{train,validation,test}-*.parquet (user_id, image_0_uid, image_1_uid, label_0, label_1, created_at,
jpg_0, jpg_1), directly there or below `data/`

The preferred image of a pair is a like, the other one a dislike. The images are read in a second pass.
"""

import logging
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.data.published.dataset import (
    DISLIKE,
    IMAGES_PER_GROUP,
    LIKE,
    TEST,
    TRAIN,
    VALIDATION,
    PublishedData,
    image_table,
    warn_of_counts,
    without_leaks,
)
from rebeca_ray.data.published.rows import Rows
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.parquet import ParquetInput, open_parquet

log = logging.getLogger(__name__)

NAME = "Pick-a-Pic"
FILE = re.compile(r"(train|validation|test)-\d+-of-\d+.*\.parquet")  # `test_unique-…` repeats rows of `test`
SPLIT_OF = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
VERSION_1 = {"train pairs": 583_747, "validation pairs": 17_439, "test pairs": 14_073}
VERSION_2 = {"train pairs": 959_040, "validation pairs": 20_596, "test pairs": 20_716}
PAIRS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("image_0_uid", pa.string(), nullable=False),
        pa.field("image_1_uid", pa.string(), nullable=False),
        pa.field("label_0", pa.float64()),
        pa.field("label_1", pa.float64()),
        pa.field("created_at", pa.timestamp("us"), nullable=False),
    ]
)


def read_pick_a_pic(source: str) -> PublishedData:
    """Read the preferences of Pick-a-Pic with its splits. An item's id is the uid of its image.

    A pair without a preference is left out and counted. A user's latest preference for an image counts.
    Raises InputError, naming row and value, for labels that are no preference.
    """
    inputs = {split: open_parquet(source, NAME, files=files) for split, files in files_of(source).items()}
    ratings = without_leaks(
        f"{NAME} {source}", {split: preferences(table) for split, table in inputs.items()}
    )
    pairs = {
        f"{name} pairs": inputs[split].num_rows if split in inputs else 0 for name, split in SPLIT_OF.items()
    }
    warn_of_counts(f"{NAME} {source}", pairs, VERSION_1, VERSION_2)
    return PublishedData(
        name=NAME,
        source=source,
        ratings=ratings,
        available=frozenset().union(*(items_with_images(table) for table in inputs.values())),
        read_images=partial(read_images, list(inputs.values())),
    )


def files_of(source: str) -> dict[str, list[str]]:
    """Return the Parquet files of each split. Raises InputError without a file of the training split."""
    files: dict[str, list[str]] = {}
    for uri in list_files(source, ".parquet"):
        if match := FILE.fullmatch(PurePosixPath(uri).name):
            files.setdefault(SPLIT_OF[match[1]], []).append(uri)
    if TRAIN not in files:
        raise InputError(
            f"{NAME} {source}: no file train-*.parquet there; expected the Parquet files of the data set; "
            "give the folder that holds them"
        )
    return files


def preferences(table: ParquetInput) -> pa.Table:
    """Return a like and a dislike for each pair of one split that has a preference."""
    pairs = table.read(check_columns(table, PAIRS))
    rows = Rows(uri=table.uri, table=pairs, name_of_row=partial(name_of_row, table))
    for column in ("user_id", "image_0_uid", "image_1_uid"):
        empty = pc.equal(pc.fill_null(pairs[column].cast(pa.string()), ""), "")
        rows.refuse(empty.combine_chunks(), column, "expected an id", "drop the row")

    first, second = (pc.if_else(pc.is_nan(pairs[name]), None, pairs[name]) for name in ("label_0", "label_1"))
    prefers_first = pc.fill_null(pc.and_(pc.equal(first, 1), pc.equal(second, 0)), False)
    prefers_second = pc.fill_null(pc.and_(pc.equal(first, 0), pc.equal(second, 1)), False)
    is_tie = pc.and_(pc.equal(first, second), pc.not_equal(first, 1))
    is_unlabelled = pc.and_(pc.is_null(first), pc.is_null(second))
    is_known = pc.or_(
        pc.or_(prefers_first, prefers_second), pc.or_(pc.fill_null(is_tie, False), is_unlabelled)
    )
    rows.refuse(
        pc.invert(is_known).combine_chunks(),
        "label_0",
        "expected 1 with 0, 0 with 1, or a tie",
        "drop the row",
    )
    is_pair = pc.not_equal(pairs["image_0_uid"], pairs["image_1_uid"])
    chosen = pairs.filter(pc.and_(pc.or_(prefers_first, prefers_second), is_pair))
    if without := pairs.num_rows - chosen.num_rows:
        log.warning(
            f"{NAME} {table.files[0].file.path}: {without:,} of {pairs.num_rows:,} pairs have no preference "
            "or the same image twice; left out"
        )
    sides = [
        pa.table(
            {
                "user_id": chosen["user_id"].cast(pa.string()),
                "item_id": chosen[f"image_{side}_uid"],
                "rating": pc.if_else(pc.equal(chosen[f"label_{side}"], 1), LIKE, DISLIKE),
                "timestamp": chosen["created_at"],
            }
        )
        for side in (0, 1)
    ]
    return rows.without_repeats(pa.concat_tables(sides), keep_last=True)


def name_of_row(table: ParquetInput, row: int) -> str:
    """Return the file and the number within it of a row of all files together."""
    for file, header in zip(table.files, table.headers, strict=True):
        if row < header.num_rows:
            return f"row {row} of {file.name}"
        row -= header.num_rows
    raise IndexError(row)


def image_columns(side: int) -> pa.Schema:
    """Return the columns of the images on one side of the pairs."""
    return pa.schema([pa.field(f"image_{side}_uid", pa.string()), pa.field(f"jpg_{side}", pa.binary())])


def items_with_images(table: ParquetInput) -> set[str]:
    """Return the uids with an image. The images themselves are read only in files whose footer counts nulls.

    Raises InputError for files without images.
    """
    items: set[str] = set()
    for file, header in zip(table.files, table.headers, strict=True):
        for side in (0, 1):
            columns = image_columns(side)
            kind = header.schema.field(f"jpg_{side}").type if f"jpg_{side}" in header.schema.names else None
            if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise InputError(
                    f"{NAME} {table.uri}: column 'jpg_{side}' of {file.name} is {kind or 'missing'}; "
                    "expected binary; get the version of the data set with images"
                )
            if nulls_of(header.metadata, f"jpg_{side}") == 0:
                columns = columns.remove(1)
            for batch in file.batches(columns, IMAGES_PER_GROUP, header):
                present = batch.filter(pc.is_valid(batch[f"jpg_{side}"])) if len(columns) == 2 else batch
                items.update(present[f"image_{side}_uid"].to_pylist())
    return items


def nulls_of(metadata: Any, column: str) -> int | None:
    """Return the number of nulls in a column by the footer of its file, None if it has no such statistics."""
    index = metadata.schema.names.index(column)
    groups = [metadata.row_group(number).column(index) for number in range(metadata.num_row_groups)]
    if not all(group.is_stats_set and group.statistics.has_null_count for group in groups):
        return None
    return sum(group.statistics.null_count for group in groups)


def read_images(inputs: list[ParquetInput], items: Collection[str]) -> Iterator[pa.Table]:
    """Yield the image of each item once, in the order of the files."""
    remaining = set(items)
    columns = pa.schema([*image_columns(0), *image_columns(1)])
    for table in inputs:
        for batch in table.batches(columns, IMAGES_PER_GROUP // 2):
            images = {
                uid.as_py(): data.as_py()
                for side in (0, 1)
                for uid, data in zip(batch[f"image_{side}_uid"], batch[f"jpg_{side}"], strict=True)
                if uid.as_py() in remaining and data.is_valid
            }
            remaining -= images.keys()
            if images:
                yield image_table([*images], [*images.values()], [f"{uid}.jpg" for uid in images])
