"""Compaction, while a new snapshot is built: what is still wanted of image files that are mostly dead is copied into the new run.

Nothing is changed in place. A crash on the way leaves copies that no snapshot lists, which gc collects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.storage.filesystem import join, open_filesystem
from rebeca_ray.storage.parquet import write_table

if TYPE_CHECKING:
    from rebeca_ray.generation.assembly import Assembly


MIN_LIVE = 0.5  # below this share of its rows an image file is copied
MAX_FILES = 64  # that one bucket writes a night; the rest waits
ROWS_PER_FILE, ROW_GROUP = 256, 100


def compact(work: Assembly, bucket: int, items: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The items with their new places, and rows of schemas.FILES for the copies."""
    wanted = mostly_dead(work, bucket, items)
    if not len(wanted):
        return items, []
    files, rows = items["image_file"].to_numpy().copy(), items["image_row"].to_numpy().copy()
    moving = np.flatnonzero(np.isin(files, wanted))
    moving = moving[np.lexsort((rows[moving], files[moving]))][: MAX_FILES * ROWS_PER_FILE]
    copies = read_images(work, files[moving], rows[moving])
    written = []
    for number in range(-(-len(moving) // ROWS_PER_FILE)):
        own = slice(number * ROWS_PER_FILE, (number + 1) * ROWS_PER_FILE)
        images = copies.slice(own.start, ROWS_PER_FILE)
        file = work.first_compacted + bucket * MAX_FILES + number
        path = f"{work.run.images}/bucket={bucket}/compacted-{work.run.epoch:06d}-{number:03d}.parquet"
        record = write_table(images, join(work.run.root, path), row_group_size=ROW_GROUP)
        written.append({"table": "images", "bucket": bucket, "file": file, "path": path, **record})
        files[moving[own]], rows[moving[own]] = file, np.arange(images.num_rows)
    for name, values in (("image_file", files), ("image_row", rows)):
        items = items.set_column(
            items.schema.get_field_index(name), items.schema.field(name), pa.array(values, pa.int32())
        )
    return items, written


def mostly_dead(work: Assembly, bucket: int, items: pa.Table) -> np.ndarray:
    """Numbers of this bucket's image files of earlier runs of which little is alive; none that holds an item of the pool."""
    assert work.previous is not None
    if work.previous.manifest["num_buckets"] != work.num_buckets:
        return np.array([], int)  # files then serve several buckets
    images = work.previous.files.filter(
        pc.and_(
            pc.equal(work.previous.files["table"], "images"), pc.equal(work.previous.files["bucket"], bucket)
        )
    )
    last = work.previous.bucket("items", bucket, work.num_buckets, ["image_file", "image_row"])
    own = distinct_places(
        last
    )  # of a file that serves other buckets too, from before a change of their number, nothing is known here
    alone = {
        file
        for file, live in zip(images["file"].to_pylist(), images["live_rows"].to_pylist(), strict=True)
        if own.get(file) == live
    }
    live = distinct_places(items)
    pooled = set() if work.pool_items is None else set(work.pool_items["image_file"].to_pylist())
    found = zip(images["file"].to_pylist(), images["rows"].to_pylist(), strict=True)
    return np.array(
        [
            file
            for file, count in found
            if 0 < live.get(file, 0) < MIN_LIVE * count and file in alone - pooled
        ],
        int,
    )


def distinct_places(items: pa.Table) -> dict[int, int]:
    """How many rows of each image file are pointed to."""
    places = np.unique(np.stack([items["image_file"].to_numpy(), items["image_row"].to_numpy()]), axis=1)
    return {
        int(file): int(count) for file, count in zip(*np.unique(places[0], return_counts=True), strict=True)
    }


def read_images(work: Assembly, files: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Whole rows of image files, in their order; both are sorted."""
    assert work.previous is not None
    filesystem, root = open_filesystem(work.run.root)
    path = {row["file"]: row["path"] for row in work.previous.files.to_pylist() if row["table"] == "images"}
    tables = []
    for file in np.unique(files):
        with filesystem.open(join(root, path[int(file)]), "rb") as handle:
            tables.append(pq.read_table(handle).take(rows[files == file]))
    return pa.concat_tables(tables)
