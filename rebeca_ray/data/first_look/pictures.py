"""Facts about items: their images, those that do not open, and the names that ratings use.

Parquet of items, or a folder of image files -> every image is opened once -> `Items`
"""

import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.data.bad_images import describe_bad
from rebeca_ray.data.clip import read_image
from rebeca_ray.data.items import read_item_ids
from rebeca_ray.data.published.dataset import IMAGES_PER_GROUP, PublishedData
from rebeca_ray.data.published.image_files import SUFFIXES, find_images, reader_of
from rebeca_ray.data.validation import check_columns, check_ids
from rebeca_ray.errors import InputError, shown
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.listing import THREADS
from rebeca_ray.storage.parquet import open_parquet

log = logging.getLogger(__name__)

BACKGROUND = "#ffffff"
EMBEDDED = (
    "image_embeds are there already, so leave `rebeca embed` out and copy jobs/configs/train_stickers.yaml"
)


@dataclass(frozen=True, kw_only=True)
class Items:
    """All items, and the reasons of images that do not open. `files` are the addresses in a folder."""

    uri: str
    item_id: pa.Array
    bad_images: dict[str, str]
    files: dict[str, str] | None = None

    @property
    def good(self) -> pa.Array:
        """Return the ids of the items with an image that opens."""
        bad = pa.array(list(self.bad_images), pa.string())
        return self.item_id.filter(pc.invert(pc.is_in(self.item_id, value_set=bad)))

    def as_data(self) -> PublishedData:
        """Return the images of a folder in the form that `write_items` takes."""
        assert self.files is not None
        return PublishedData(
            name="images",
            source=self.uri,
            ratings={},
            available=frozenset(self.files),
            read_images=reader_of(self.files),
        )


def read_items(uri: str, rated: pa.Array) -> Items:
    """Open every image of `uri` once. `rated` are the ids in the ratings, which name the files of a folder.

    Raises InputError for columns, ids or names that the jobs refuse, and if no image opens.
    """
    files = None
    if is_folder_of_images(uri):
        files = name_files(uri, rated)
        item_id = pa.array(list(files), pa.string())
        tables: Iterator[pa.Table] = reader_of(files)(files)
    else:
        source = open_parquet(uri, "items")
        columns = check_columns(source, schemas.ITEMS, instead={"image_embeds": EMBEDDED})
        item_id = pa.array(read_item_ids(source), pa.string())
        tables = source.batches(columns, IMAGES_PER_GROUP)
    log.info("opening %s images of %s", f"{len(item_id):,}", uri)
    with counting("open images", len(item_id)) as counted:
        bad_images = bad_images_in(counted.tables(tables))
    if len(bad_images) == len(item_id):
        raise InputError(f"{describe_bad(uri, bad_images, len(item_id))}; give images that open")
    return Items(uri=uri, item_id=item_id, bad_images=bad_images, files=files)


def is_folder_of_images(uri: str) -> bool:
    """Return whether there are image files below `uri`, and no Parquet files."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in list_files(uri)}
    return bool(suffixes & SUFFIXES) and ".parquet" not in suffixes


def name_files(uri: str, rated: pa.Array) -> dict[str, str]:
    """Return the address of each image by item id: its name below the folder, with or without its suffix.

    The form that more ratings use counts. Names that would be equal without their suffix keep it.
    """
    images = find_images(uri)
    try:
        full = pa.array(list(images), pa.string())
        check_ids(pa.chunked_array([full]), "images", uri, "file name")
    except UnicodeEncodeError:
        name = next(name for name in images if not name.isprintable())
        raise InputError(f"images {uri}: file name {shown(name)} is not UTF-8; rename it") from None
    stems = [str(PurePosixPath(name).with_suffix("")) for name in images]
    short = pa.array(stems, pa.string())
    if used(full, rated) >= used(short, rated):
        return images
    counted = pc.value_counts(short)
    repeated = set(counted.filter(pc.greater(counted.field("counts"), 1)).field("values").to_pylist())
    return {
        name if stem in repeated else stem: address
        for (name, address), stem in zip(images.items(), stems, strict=True)
    }


def used(names: pa.Array, rated: pa.Array) -> int:
    return pc.sum(pc.is_in(rated, value_set=names)).as_py() or 0


def bad_images_in(tables: Iterator[pa.Table]) -> dict[str, str]:
    """Return the reasons of the images that do not open, by item id."""
    bad: dict[str, str] = {}
    # Each opening sets warnings aside. In threads, these settings would get mixed up and stay so.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        for table in tables:
            images = table["image"].to_pylist()
            reasons = pool.map(lambda image: read_image(image, BACKGROUND)[1], images)
            for item, reason in zip(table["item_id"].to_pylist(), reasons, strict=True):
                if reason is not None:
                    bad[item] = reason
    return bad
