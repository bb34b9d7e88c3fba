"""A snapshot as one Parquet file for a map of its items, which Apple's `embedding-atlas` opens.

    uvx embedding-atlas atlas.parquet --x x --y y --neighbors neighbors --image image

items, all or an even sample -> t-SNE of their embeddings, ten neighbours each -> JPEG thumbnails -> one file

The atlas reads no WebP, the default of catalogs, so that every thumbnail is encoded again.
"""

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.errors import InputError
from rebeca_ray.pixels import see_image
from rebeca_ray.provenance.marks import XMP_PACKET
from rebeca_ray.storage.parquet import write_tables

NEIGHBOURS, THUMBNAIL, DIRECTIONS = 10, 96, 50
IMAGES_AT_ONCE = 500
KEPT = ["item_id", "user_id", "rank", "like_probability", "safety_flag", "origin"]
READ = [*KEPT, "image_embeds", "image_file", "image_row"]
NEIGHBOUR_LIST = pa.struct([("ids", pa.list_(pa.int32())), ("distances", pa.list_(pa.float32()))])
SCHEMA = pa.schema(
    [
        *(field for field in schemas.items(1) if field.name in KEPT),
        schemas.required("x", pa.float32()),
        schemas.required("y", pa.float32()),
        schemas.required("neighbors", NEIGHBOUR_LIST),  # rows of this file, by cosine distance
        pa.field("image", schemas.IMAGE),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """The numbers of items in the file and in the snapshot."""

    items: int
    total: int


def export_atlas(snapshot: Snapshot, out: str, max_items: int) -> Atlas:
    """Write the map of at most `max_items` items to the Parquet file `out`.

    Raises InputError for a snapshot of fewer than two items, and without scikit-learn.
    """
    require_sklearn()
    items = sample(snapshot, max_items)
    if items.num_rows < 2:
        raise InputError(
            f"catalog {snapshot.root}: run {snapshot.run_id} has {items.num_rows} items, a map needs two"
        )
    embeds = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(items.num_rows, -1)
    unit_ID = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    position_I2, ids_IK, distances_IK = project(unit_ID)
    mapped = items.select(KEPT)
    neighbours = [
        {"ids": ids, "distances": distances}
        for ids, distances in zip(ids_IK.tolist(), distances_IK.tolist(), strict=True)
    ]
    for name, column in (
        ("x", pa.array(position_I2[:, 0], pa.float32())),
        ("y", pa.array(position_I2[:, 1], pa.float32())),
        ("neighbors", pa.array(neighbours, NEIGHBOUR_LIST)),
    ):
        mapped = mapped.append_column(name, column)
    write_tables(with_thumbnails(snapshot, items, mapped), SCHEMA, out, row_group_size=IMAGES_AT_ONCE)
    return Atlas(items=items.num_rows, total=total_of(snapshot))


def require_sklearn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("export atlas: scikit-learn is not installed; pip install 'rebeca-ray[atlas]'")


def total_of(snapshot: Snapshot) -> int:
    rows = snapshot.files.filter(pc.equal(snapshot.files["table"], "items"))["rows"]
    return int(pc.sum(rows).as_py() or 0)


def sample(snapshot: Snapshot, max_items: int) -> pa.Table:
    """Return items, evenly spaced over the table if there are too many. Holds one file more in memory."""
    tables: list[pa.Table] = []
    total, begin = total_of(snapshot), 0
    chosen = np.unique(np.linspace(0, total - 1, min(total, max_items)).round().astype(int))
    files = snapshot.files.filter(pc.equal(snapshot.files["table"], "items")).sort_by("file")
    for path, rows in zip(files["path"].to_pylist(), files["rows"].to_pylist(), strict=True):
        inside = chosen[(chosen >= begin) & (chosen < begin + rows)] - begin
        if len(inside):
            tables.append(snapshot.read_files("items", [path], READ).take(pa.array(inside)))
        begin += rows
    return pa.concat_tables(tables) if tables else snapshot.schema("items").empty_table().select(READ)


def project(unit_ID: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions [I, 2], and the rows and cosine distances of the nearest others, [I, K] each."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors

    count, embed_dim = unit_ID.shape
    reduced = PCA(min(count, embed_dim, DIRECTIONS), random_state=0).fit_transform(unit_ID)
    perplexity = min(30.0, (count - 1) / 3)
    start = "pca" if reduced.shape[1] > 1 and reduced.std() > 0 else "random"
    positions = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(reduced)
    nearest = NearestNeighbors(n_neighbors=min(NEIGHBOURS, count - 1), metric="cosine").fit(unit_ID)
    distances, ids = nearest.kneighbors()  # of the rows themselves, each without itself
    return positions, ids, distances


def with_thumbnails(snapshot: Snapshot, items: pa.Table, mapped: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows of `mapped` with a JPEG each, some at a time."""
    for start in range(0, items.num_rows, IMAGES_AT_ONCE):
        images = [
            {"bytes": thumbnail(image), "path": f"{item}.jpg"}
            for image, item in zip(
                snapshot.images(items.slice(start, IMAGES_AT_ONCE)),
                items["item_id"].slice(start, IMAGES_AT_ONCE).to_pylist(),
                strict=True,
            )
        ]
        part = mapped.slice(start, IMAGES_AT_ONCE)
        yield part.append_column("image", pa.array(images, schemas.IMAGE)).cast(SCHEMA)


def thumbnail(image: bytes) -> bytes:
    """Return a small JPEG of an encoded image."""
    picture = see_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, xmp=XMP_PACKET)  # says that a machine made it
    return buffer.getvalue()
