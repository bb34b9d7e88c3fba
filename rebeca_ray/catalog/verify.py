"""Verify a snapshot against its manifest.

Three levels compare its metadata, a sample of its files, or every byte, row and image.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import OUTCOMES, tally
from rebeca_ray.catalog.figures import group_starts
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.manifest import FileRow
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.catalog.row_groups import StoredImage
from rebeca_ray.errors import InputError
from rebeca_ray.identity import bucket_of
from rebeca_ray.pixels import open_image
from rebeca_ray.progress import counting
from rebeca_ray.schemas import TABLES
from rebeca_ray.storage.filesystem import exists, join, open_filesystem
from rebeca_ray.storage.records import sha256_of

T = TypeVar("T")
Level = Literal["metadata", "sample", "full"]
SAMPLE = 20  # files per table, images per file
IMAGES_AT_ONCE = 100  # a row group of the image files of a run
Check = Callable[[Snapshot, FileRow], Iterator[str]]


class SizedImage(StoredImage):
    """A row of an image file with the size of its image."""

    width: int
    height: int


def verify(snapshot: Snapshot, level: Level) -> list[str]:
    """Return one line per defect of a snapshot; none if all is well.

    `metadata` compares counts, and every file's presence and size. `sample` also hashes 20 files of each
    table, reads them, and decodes some of their images. `full` does that with all. Raises UserError if the
    snapshot is collected meanwhile, or its store cannot be reached.
    """
    files = snapshot.files.to_pylist()
    defects = in_threads("sizes", check_size, snapshot, files) or list(check_counts(snapshot, files))
    if level == "metadata" or defects:
        return defects
    chosen = [row for name in TABLES for row in spread([row for row in files if row["table"] == name], level)]
    defects += in_threads("bytes", check_bytes, snapshot, chosen)
    if defects:
        return defects
    image_files = {row["file"]: row for row in files if row["table"] == "images"}
    items = [row for row in chosen if row["table"] == "items"]
    defects += in_threads(
        "items", lambda snapshot, row: check_items(snapshot, row, image_files), snapshot, items
    )
    images = [row for row in chosen if row["table"] == "images"]
    defects += in_threads(
        "images", lambda snapshot, row: check_images(snapshot, row, level), snapshot, images
    )
    if level == "full" and not defects:
        used: dict[int, np.ndarray] = {}
        defects += in_threads(
            "locations",
            lambda snapshot, row: check_locations(snapshot, row, image_files, used),
            snapshot,
            items,
        )
        defects += check_live_rows(image_files, used)
    return defects


def spread(rows: list[T], level: Level) -> list[T]:
    """Return all rows, or a sample spread evenly over them."""
    if level == "full" or len(rows) <= SAMPLE:
        return rows
    return [rows[number] for number in np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))]


def in_threads(name: str, check: Check, snapshot: Snapshot, rows: list[FileRow]) -> list[str]:
    """Return the defects that `check` yields for some files; `name` is that of the progress."""

    def checked(row: FileRow) -> list[str]:
        with explained(snapshot, row["path"]):
            return list(check(snapshot, row))

    defects: list[str] = []
    with ThreadPoolExecutor(16) as pool, counting(f"verify {name}", len(rows)) as counted:
        for lines in pool.map(checked, rows):
            defects += lines
            counted.add(failed=bool(lines))
    return defects


def check_counts(snapshot: Snapshot, files: list[FileRow]) -> Iterator[str]:
    """Compare the manifest with itself and with its file list."""
    counts = snapshot.manifest.counts
    accounted = sum(getattr(counts, outcome) for outcome in OUTCOMES)
    if counts.requested != accounted:
        yield f"manifest: {counts.requested:,} items requested, but {accounted:,} accounted for"
    rows = {name: sum(row["rows"] for row in files if row["table"] == name) for name in TABLES}
    bucket = bucket_of(POPULATION_USER, snapshot.num_buckets)
    try:
        users = snapshot.bucket("users", bucket, snapshot.num_buckets, ["user_id", "num_items"])
    except InputError as error:
        if not exists(join(snapshot.root, snapshot.path, "manifest.json")):
            raise  # the snapshot was collected
        yield str(error)
        return
    pool = sum(users.filter(pc.equal(users["user_id"], POPULATION_USER))["num_items"].to_pylist())
    if rows["items"] - pool != counts.published:
        yield f"items: {rows['items'] - pool:,} rows are listed, the manifest counts {counts.published:,}"
    if len({row["path"] for row in files}) != len(files):
        yield "file list: a path is listed twice"


def check_size(snapshot: Snapshot, row: FileRow) -> Iterator[str]:
    filesystem, root = open_filesystem(snapshot.root)
    try:
        size = filesystem.info(join(root, row["path"]))["size"]
    except FileNotFoundError:
        if not exists(join(snapshot.root, snapshot.path, "manifest.json")):
            raise  # the snapshot was collected
        yield f"{row['path']}: is missing"
        return
    if size != row["bytes"]:
        yield f"{row['path']}: has {size:,} bytes, the file list says {row['bytes']:,}"


def check_bytes(snapshot: Snapshot, row: FileRow) -> Iterator[str]:
    """Compare a file's hash, rows and columns with the file list and the schema."""
    filesystem, root = open_filesystem(snapshot.root)
    if sha256_of(join(snapshot.root, row["path"])) != row["sha256"]:
        yield (
            f"{row['path']}: its sha256 is not the one in the file list; it was changed after it was written"
        )
        return
    with filesystem.open(join(root, row["path"]), "rb", cache_type="none") as file:
        metadata = pq.read_metadata(file)
    if metadata.num_rows != row["rows"]:
        yield f"{row['path']}: has {metadata.num_rows:,} rows, the file list says {row['rows']:,}"
    schema = metadata.schema.to_arrow_schema()
    # A file of an earlier run may be of an earlier version, with its names, and with fewer columns.
    version = int((schema.metadata or {}).get(schemas.VERSION_KEY.encode(), b"0"))
    expected = schemas.table(row["table"], snapshot.manifest.embed_dim, version)
    if version < schemas.SCHEMA_VERSION:
        expected = pa.schema(list(expected)[: len(schema)])
    if not schema.remove_metadata().equals(expected.remove_metadata()):
        yield f"{row['path']}: its columns are not those of `{row['table']}`"


def check_items(snapshot: Snapshot, row: FileRow, image_files: dict[int, FileRow]) -> Iterator[str]:
    """Check one file of items: its order, its ranks, repeated items, and the image files it points into."""
    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, row["path"]), "rb") as file:
        items = pq.read_table(file, columns=["item_id", "user_id", "rank", "image_file", "image_row"])
    ordered = items.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    if not ordered.equals(items):
        yield f"{row['path']}: is not sorted by user and rank"
    starts = group_starts(ordered["user_id"].to_numpy(zero_copy_only=False))
    ranks = np.arange(items.num_rows) - np.repeat(starts, np.diff([*starts, items.num_rows]))
    if not np.array_equal(ordered["rank"].to_numpy(), ranks):
        yield f"{row['path']}: a user's ranks have a gap or come twice"
    pairs = pc.binary_join_element_wise(items["user_id"], items["item_id"], "\x1f")
    if pc.count_distinct(pairs).as_py() != items.num_rows:
        yield f"{row['path']}: a user has an item twice"
    files, image_rows = items["image_file"].to_numpy(), items["image_row"].to_numpy()
    numbers, index = np.unique(files, return_inverse=True)
    ends = np.array([image_files[file]["rows"] if file in image_files else 0 for file in numbers.tolist()])
    unlisted = np.flatnonzero((image_rows < 0) | (image_rows >= ends[index]))
    if len(unlisted):
        yield (
            f"{row['path']}: an item points to row {image_rows[unlisted[0]]} of image file "
            f"{files[unlisted[0]]}, which is not listed"
        )


def check_images(snapshot: Snapshot, row: FileRow, level: Level) -> Iterator[str]:
    """Decode the images of one file, and compare their sizes with the table."""
    for image in stored_images(snapshot.root, row["path"], level):
        try:
            size = open_image(image["image"]["bytes"]).size
        except InputError as error:
            yield f"{row['path']}: the image of {image['item_id']} cannot be decoded ({error})"
            continue
        expected = (image["width"], image["height"])
        if size != expected:
            yield f"{row['path']}: the image of {image['item_id']} is {size}, not {expected}"


def stored_images(root: str, path: str, level: Level) -> Iterator[SizedImage]:
    """Yield the images of one file, all or a sample. IMAGES_AT_ONCE of them are in memory."""
    filesystem, base = open_filesystem(root)
    with filesystem.open(join(base, path), "rb", cache_type="none") as opened:
        file, start = pq.ParquetFile(opened), 0
        has_image = file.read(columns=["image.path"])["image"].is_valid().to_numpy()
        chosen = np.array(spread(np.flatnonzero(has_image).tolist(), level), int)
        for batch in file.iter_batches(IMAGES_AT_ONCE, columns=["item_id", "image", "width", "height"]):
            inside = chosen[(chosen >= start) & (chosen < start + batch.num_rows)] - start
            yield from cast(list[SizedImage], batch.take(pa.array(inside)).to_pylist())
            start += batch.num_rows


def check_locations(
    snapshot: Snapshot, items_file: FileRow, image_files: dict[int, FileRow], used: dict[int, np.ndarray]
) -> Iterator[str]:
    """Check that every item of a file has its own image at its location.

    Marks the rows in use in `used`: for each image file, one byte per row.
    """
    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, items_file["path"]), "rb") as file:
        items = pq.read_table(file, columns=["item_id", "image_file", "image_row"]).sort_by("image_file")
    start = 0
    for number, count in sorted(tally(items["image_file"]).items()):
        pointing, row, start = items.slice(start, count), image_files[number], start + count
        with filesystem.open(join(root, row["path"]), "rb") as file:
            images = pq.read_table(file, columns=["item_id", "width"]).take(pointing["image_row"])
        if not pc.all(pc.equal(images["item_id"], pointing["item_id"])).as_py():
            yield f"{row['path']}: holds another item's image where `items` points"
        if images["width"].null_count:
            yield f"{row['path']}: an item points to a row without an image"
        used.setdefault(number, np.zeros(row["rows"], bool))[pointing["image_row"].to_numpy()] = True


def check_live_rows(image_files: dict[int, FileRow], used: dict[int, np.ndarray]) -> Iterator[str]:
    """Compare the rows in use with `live_rows`. Fewer are fine: they only keep a file longer."""
    for number, row in image_files.items():
        pointed_to = np.count_nonzero(used[number]) if number in used else 0
        if pointed_to > (row["live_rows"] or 0):
            yield f"{row['path']}: {pointed_to} rows are pointed to, the file list says {row['live_rows']}"
