"""Is a snapshot what its manifest says? By its metadata, by a sample of its files, or by every byte, row and image of it."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import KINDS, tally
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.filesystem import exists, join, open_filesystem

Level = Literal["metadata", "sample", "full"]
SAMPLE = 20  # files of each table, images of each of those
TABLES = ("items", "users", "errors", "changes", "images")


def verify(snapshot: Snapshot, level: Level) -> list[str]:
    """What is wrong with a snapshot, a line each; nothing if all is well.

    `metadata` compares counts, and every file's presence and size. `sample` also hashes 20 files of each table, reads them, and decodes
    some of their images. `full` does that with all. Raises UserError if the snapshot is collected meanwhile, or its store cannot be asked.
    """
    files = snapshot.files.to_pylist()
    wrong = in_threads(check_size, snapshot, files) or list(check_counts(snapshot, files))
    if level == "metadata" or wrong:
        return wrong
    chosen = [row for name in TABLES for row in spread([row for row in files if row["table"] == name], level)]
    wrong += in_threads(check_bytes, snapshot, chosen)
    if wrong:
        return wrong
    numbers = {row["file"]: row for row in files if row["table"] == "images"}
    items = [row for row in chosen if row["table"] == "items"]
    wrong += in_threads(lambda snapshot, row: check_items(snapshot, row, numbers), snapshot, items)
    images = [row for row in chosen if row["table"] == "images"]
    wrong += in_threads(lambda snapshot, row: check_images(snapshot, row, level), snapshot, images)
    if level == "full" and not wrong:
        live: dict[int, Any] = {}
        wrong += in_threads(lambda snapshot, row: check_places(snapshot, row, numbers, live), snapshot, items)
        wrong += check_live(numbers, live)
    return wrong


def spread(rows: list[dict[str, Any]], level: Level) -> list[dict[str, Any]]:
    if level == "full" or len(rows) <= SAMPLE:
        return rows
    return [rows[number] for number in np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))]


def in_threads(check: Any, snapshot: Snapshot, rows: list[dict[str, Any]]) -> list[str]:
    def checked(row: dict[str, Any]) -> list[str]:
        with snapshot.explained(row["path"]):
            return list(check(snapshot, row))

    with ThreadPoolExecutor(16) as pool:
        return [line for lines in pool.map(checked, rows) for line in lines]


def check_counts(snapshot: Snapshot, files: list[dict[str, Any]]) -> Iterator[str]:
    """The manifest against itself and its file list."""
    counts = snapshot.manifest["counts"]
    if counts["requested"] != sum(counts[kind] for kind in KINDS):
        yield f"manifest: {counts['requested']:,} items requested, but {sum(counts[kind] for kind in KINDS):,} accounted for"
    rows = {name: sum(row["rows"] for row in files if row["table"] == name) for name in TABLES}
    published = counts["new"] + counts["carried"] + counts["population"]
    num_buckets = snapshot.manifest["num_buckets"]
    users = snapshot.bucket(
        "users", bucket_of(POPULATION_USER, num_buckets), num_buckets, ["user_id", "num_items"]
    )
    pool = sum(users.filter(pc.equal(users["user_id"], POPULATION_USER))["num_items"].to_pylist())
    if rows["items"] - pool != published:
        yield f"items: {rows['items'] - pool:,} rows are listed, the manifest counts {published:,}"
    if len({row["path"] for row in files}) != len(files):
        yield "file list: a path is listed twice"


def check_size(snapshot: Snapshot, row: dict[str, Any]) -> Iterator[str]:
    filesystem, root = open_filesystem(snapshot.root)
    try:
        size = filesystem.info(join(root, row["path"]))["size"]
    except FileNotFoundError:
        if not exists(join(snapshot.root, snapshot.path, "manifest.json")):
            raise  # it was collected
        yield f"{row['path']}: is missing"
        return
    if size != row["bytes"]:
        yield f"{row['path']}: has {size:,} bytes, the file list says {row['bytes']:,}"


def check_bytes(snapshot: Snapshot, row: dict[str, Any]) -> Iterator[str]:
    filesystem, root = open_filesystem(snapshot.root)
    data = filesystem.cat_file(join(root, row["path"]))
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        yield f"{row['path']}: its sha256 is not the one in the file list; it was changed after it was written"
        return
    metadata = pq.read_metadata(io.BytesIO(data))
    if metadata.num_rows != row["rows"]:
        yield f"{row['path']}: has {metadata.num_rows:,} rows, the file list says {row['rows']:,}"
    schema, expected = (
        metadata.schema.to_arrow_schema(),
        schemas.table(row["table"], snapshot.manifest["embed_dim"]),
    )
    if (schema.metadata or {}).get(schemas.VERSION_KEY.encode()) != str(schemas.SCHEMA_VERSION).encode():
        expected = pa.schema(list(expected)[: len(schema)])  # of an earlier version, when there were fewer
    if not schema.remove_metadata().equals(expected):
        yield f"{row['path']}: its columns are not those of `{row['table']}`"


def check_items(snapshot: Snapshot, row: dict[str, Any], numbers: dict[int, dict[str, Any]]) -> Iterator[str]:
    """One file of items: sorted, ranked without gaps, each item once a user, and pointing into listed image files."""
    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, row["path"]), "rb") as file:
        items = pq.read_table(file, columns=["item_id", "user_id", "rank", "image_file", "image_row"])
    ordered = items.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    if not ordered.equals(items):
        yield f"{row['path']}: is not sorted by user and rank"
    num_items = tally(items["user_id"])
    ranks = ordered["rank"].to_pylist()
    if ranks != [rank for user in sorted(num_items) for rank in range(num_items[user])]:
        yield f"{row['path']}: a user's ranks have a gap or come twice"
    pairs = pc.binary_join_element_wise(items["user_id"], items["item_id"], "\x1f")
    if pc.count_distinct(pairs).as_py() != items.num_rows:
        yield f"{row['path']}: a user has an item twice"
    for file, number in zip(items["image_file"].to_pylist(), items["image_row"].to_pylist(), strict=True):
        if file not in numbers or not 0 <= number < numbers[file]["rows"]:
            yield f"{row['path']}: an item points to row {number} of image file {file}, which is not listed"
            return


def check_images(snapshot: Snapshot, row: dict[str, Any], level: Level) -> Iterator[str]:
    """One file of images: what has no error can be decoded, and is as large as it says."""
    from PIL import Image

    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, row["path"]), "rb") as file:
        images = pq.read_table(file, columns=["item_id", "image", "width", "height"]).to_pylist()
    for image in spread([image for image in images if image["image"]], level):
        try:
            with Image.open(io.BytesIO(image["image"]["bytes"])) as picture:
                picture.load()
                found = picture.size
        except OSError as error:
            yield f"{row['path']}: the image of {image['item_id']} cannot be decoded ({error})"
            continue
        if found != (image["width"], image["height"]):
            yield f"{row['path']}: the image of {image['item_id']} is {found}, not {(image['width'], image['height'])}"


def check_places(
    snapshot: Snapshot, listed: dict[str, Any], numbers: dict[int, dict[str, Any]], live: dict[int, Any]
) -> Iterator[str]:
    """Every item of a file has its own image at its place; `live` gains the rows of image files that are pointed to."""
    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, listed["path"]), "rb") as file:
        items = pq.read_table(file, columns=["item_id", "image_file", "image_row"]).sort_by("image_file")
    start = 0
    for number, count in sorted(tally(items["image_file"]).items()):
        own, row, start = items.slice(start, count), numbers[number], start + count
        with filesystem.open(join(root, row["path"]), "rb") as file:
            drawn = pq.read_table(file, columns=["item_id", "width"]).take(own["image_row"])
        if not pc.all(pc.equal(drawn["item_id"], own["item_id"])).as_py():
            yield f"{row['path']}: holds another item's image where `items` points"
        if drawn["width"].null_count:
            yield f"{row['path']}: an item points to a row without an image"
        live.setdefault(number, []).append(pc.unique(own["image_row"]).to_numpy())


def check_live(numbers: dict[int, dict[str, Any]], live: dict[int, Any]) -> Iterator[str]:
    """As many rows of an image file are pointed to as its `live_rows` says; fewer only keep a file longer."""
    for number, row in numbers.items():
        pointed_to = len(np.unique(np.concatenate(live.get(number, [[]]))))
        if pointed_to > row["live_rows"]:
            yield f"{row['path']}: {pointed_to} rows are pointed to, the file list says {row['live_rows']}"
