"""Images on demand: rows of `items` -> their encoded images, from the row groups that hold them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rebeca_ray.catalog.row_groups import read_rows
from rebeca_ray.errors import InputError, UserError

if TYPE_CHECKING:
    from rebeca_ray.catalog.read import Snapshot

FILES_AT_ONCE = 16


def read_images(snapshot: Snapshot, items: pa.Table) -> list[dict[str, Any]]:
    """The `image` of each row, in their order. Raises UserError as `Snapshot.images`."""
    if not isinstance(items, pa.Table):
        raise TypeError(
            f"images: the items are a {type(items).__name__}; give rows of `Snapshot.items`, a pyarrow table"
        )
    if missing := {"image_file", "image_row"} - set(items.column_names):
        raise InputError(
            f"images: the items have no column {', '.join(sorted(missing))}; read them with it, or with all columns"
        )
    item_id = items["item_id"].to_pylist() if "item_id" in items.column_names else None
    wanted: dict[int, dict[int, list[int]]] = {}  # file -> row -> places among the items
    for place, (file, row) in enumerate(
        zip(items["image_file"].to_pylist(), items["image_row"].to_pylist(), strict=True)
    ):
        wanted.setdefault(file, {}).setdefault(row, []).append(place)
    if unknown := set(wanted) - set(snapshot.image_files):
        raise of_another(snapshot, f"there is no image file {min(unknown)}")
    found: list[dict[str, Any]] = [{}] * items.num_rows

    def read(number: int) -> None:
        path, size = snapshot.image_files[number]
        rows = sorted(wanted[number])
        with snapshot.explained(path):
            images = read_rows(snapshot.root, path, size, rows, ["item_id", "image"])
        for row, image in zip(rows, images, strict=True):
            for place in wanted[number][row]:
                # Numbers come again after a rollback, so that an item of another snapshot would get somebody else's picture.
                if image is None or (item_id and item_id[place] != image["item_id"]):
                    raise of_another(snapshot, f"row {row} of image file {number} is another item's")
                found[place] = image["image"]

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(read, wanted))
    return found


def of_another(snapshot: Snapshot, why: str) -> UserError:
    return InputError(
        f"catalog {snapshot.root}: run {snapshot.run_id}: {why}; the items are of another snapshot: give this one's, or ask that one"
    )
