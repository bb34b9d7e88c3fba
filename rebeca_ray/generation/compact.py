"""Compact image files while a new snapshot is built: copy the live rows of mostly dead files.

Nothing is changed in place. A crash leaves copies that no snapshot lists, and gc collects them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.images import image_location
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import listed, read_recorded

if TYPE_CHECKING:
    from rebeca_ray.catalog.manifest import FileRow
    from rebeca_ray.catalog.read import Snapshot
    from rebeca_ray.generation.assembly import Assembly

MIN_LIVE = 0.5  # image files with a smaller fraction of live rows are copied
MAX_FILES = 64  # written by one bucket in a night; the rest waits
ROWS_PER_FILE, ROW_GROUP = 256, 100


def compact(work: Assembly, bucket: int, items: pa.Table) -> tuple[pa.Table, list[FileRow]]:
    """Return the items with their new image locations, and the rows of `schemas.FILES` of the copies."""
    previous = work.context.previous
    assert previous is not None
    dying = mostly_dead(work, previous, bucket, items)
    if not len(dying):
        return items, []
    files, rows = items["image_file"].to_numpy().copy(), items["image_row"].to_numpy().copy()
    # Users may share an image: each is copied once.
    location = image_location(items).to_numpy()
    moving = np.unique(location[np.isin(files, dying)])[: MAX_FILES * ROWS_PER_FILE]
    copies = read_images(previous, moving >> 32, moving & 0xFFFFFFFF)
    rows_of_files: list[FileRow] = []
    run = work.context.run
    for number, start in enumerate(range(0, len(moving), ROWS_PER_FILE)):
        images = copies.slice(start, ROWS_PER_FILE)
        file = work.first_compacted + bucket * MAX_FILES + number
        path = f"{run.images}/bucket={bucket}/compacted-{run.fencing_token:06d}-{number:03d}.parquet"
        written = write_table(images, join(run.root, path), row_group_size=ROW_GROUP)
        rows_of_files.append(
            {
                "table": "images",
                "bucket": bucket,
                "file": file,
                "path": path,
                **written,
                "min_user_id": None,
                "max_user_id": None,
                "live_rows": None,
            }
        )
        new_row = {old: row for row, old in enumerate(moving[start : start + ROWS_PER_FILE].tolist())}
        moved = np.flatnonzero(np.isin(location, list(new_row)))
        files[moved], rows[moved] = file, [new_row[old] for old in location[moved].tolist()]
    for name, values in (("image_file", files), ("image_row", rows)):
        index = items.schema.get_field_index(name)
        items = items.set_column(index, items.schema.field(name), pa.array(values, pa.int32()))
    return items, rows_of_files


def mostly_dead(work: Assembly, previous: Snapshot, bucket: int, items: pa.Table) -> np.ndarray:
    """Return the numbers of this bucket's image files of earlier runs with few live rows.

    Files that hold an item of the population pool, or serve other buckets too, are left out.
    """
    if previous.num_buckets != work.context.num_buckets:
        return np.array([], int)  # files then serve several buckets
    ours = pc.and_(pc.equal(previous.files["table"], "images"), pc.equal(previous.files["bucket"], bucket))
    images = previous.files.filter(ours)
    last = previous.bucket(
        "items", bucket, work.context.num_buckets, ["image_file", "image_row"], without=work.damaged
    )
    # A file may serve other buckets too, from before their number changed. Their rows are unknown here.
    used_here = rows_in_use(last)
    counted = zip(images["file"].to_pylist(), images["live_rows"].to_pylist(), strict=True)
    alone = {file for file, live in counted if used_here.get(file) == live}
    pooled = set(work.pool.items["image_file"].to_pylist()) if work.pool else set()
    live_now = rows_in_use(items)
    sizes = zip(images["file"].to_pylist(), images["rows"].to_pylist(), strict=True)
    dying = [
        file for file, rows in sizes if 0 < live_now.get(file, 0) < MIN_LIVE * rows and file in alone - pooled
    ]
    return np.array(dying, int)


def rows_in_use(items: pa.Table) -> dict[int, int]:
    """Return how many rows of each image file are pointed to."""
    locations = np.unique(np.stack([items["image_file"].to_numpy(), items["image_row"].to_numpy()]), axis=1)
    counts = zip(*np.unique(locations[0], return_counts=True), strict=True)
    return {int(file): int(count) for file, count in counts}


def read_images(previous: Snapshot, files: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Return whole rows of image files, in their order; both arrays are sorted.

    Raises DamagedFilesError for a file that is not as it was written: a copy would get a new checksum.
    """
    images = previous.files.filter(pc.equal(previous.files["table"], "images"))
    images = images.filter(pc.is_in(images["file"], value_set=pa.array(np.unique(files), pa.int32())))
    listed_files = {row["file"]: listed(row) for row in images.to_pylist()}
    tables = [
        read_recorded(previous.root, listed_files[int(file)]).take(rows[files == file])
        for file in np.unique(files)
    ]
    # The copies have at least the weakest mark among their sources.
    weakest = min((schemas.mark_of(table.schema) for table in tables), key=schemas.MARKS.index)
    copies = pa.concat_tables(tables)
    return copies.replace_schema_metadata(schemas.with_mark(copies.schema, weakest).metadata)
