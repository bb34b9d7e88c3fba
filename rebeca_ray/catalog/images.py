"""Images on demand: rows of `items` -> their encoded images, from the row groups that hold them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.catalog.row_groups import EncodedImage, read_rows
from rebeca_ray.errors import InputError
from rebeca_ray.inline import MAX_SHOWN, Images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rebeca_ray.catalog.read import Snapshot

FILES_AT_ONCE = 16
LOCATION = ("image_file", "image_row")
FIRST_ITEMS = 24  # shown of a snapshot if nobody names a user


def image_location(items: pa.Table) -> pa.Array:
    """Return each item's image location as one number: file in the upper 32 bits, row in the lower."""
    return pa.array((items["image_file"].to_numpy().astype(np.int64) << 32) + items["image_row"].to_numpy())


def show_items(snapshot: Snapshot, user_ids: Sequence[str] | None) -> Images:
    """Return the items of some users with their images; without users, the first items of one file.

    Only the images of a grid are read.
    """
    columns = [name for name in snapshot.schema("items").names if name != "image_embeds"]
    if user_ids is not None:
        items = snapshot.items(columns, user_ids)
    else:
        paths = snapshot.paths("items")[:1]
        with explained(snapshot, *paths):
            items = snapshot.dataset_of("items", paths).head(FIRST_ITEMS, columns=columns)
    shown = items.slice(0, MAX_SHOWN)
    images = pa.array(read_images(snapshot, shown), schemas.IMAGES.field("image").type)
    return Images(shown.append_column("image", images), left_out=len(items) - len(shown))


def read_images(snapshot: Snapshot, items: pa.Table) -> list[EncodedImage]:
    """Return the image of each item, in the given order. Raises InputError as `Snapshot.images` does."""
    if not isinstance(items, pa.Table):
        raise TypeError(
            f"images: the items are a {type(items).__name__}; give rows of `Snapshot.items`, a pyarrow table"
        )
    if missing := set(LOCATION) - set(items.column_names):
        raise InputError(
            f"images: the items have no column {', '.join(sorted(missing))}; "
            "read them with it, or with all columns"
        )
    item_ids = items["item_id"].to_pylist() if "item_id" in items.column_names else None
    # File number -> row of that file -> indices among the items.
    requests: dict[int, dict[int, list[int]]] = {}
    locations = zip(*(items[name].to_pylist() for name in LOCATION), strict=True)
    for index, (file, row) in enumerate(locations):
        requests.setdefault(file, {}).setdefault(row, []).append(index)
    if unknown := set(requests) - set(snapshot.image_files):
        raise of_another(snapshot, f"there is no image file {min(unknown)}")
    images: dict[int, EncodedImage] = {}

    def read(number: int) -> None:
        path, size = snapshot.image_files[number]
        rows = sorted(requests[number])
        with explained(snapshot, path):
            stored_rows = read_rows(snapshot.root, path, size, rows)
        for row, stored in zip(rows, stored_rows, strict=True):
            for index in requests[number][row]:
                # File numbers repeat after a rollback. An item of another snapshot would get another image.
                if stored is None or (item_ids and item_ids[index] != stored["item_id"]):
                    raise of_another(snapshot, f"row {row} of image file {number} is another item's")
                images[index] = stored["image"]

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(read, requests))
    return [images[index] for index in range(items.num_rows)]


def of_another(snapshot: Snapshot, reason: str) -> InputError:
    return InputError(
        f"catalog {snapshot.root}: run {snapshot.run_id}: {reason}; "
        "the items are of another snapshot: give this one's, or ask that one"
    )
