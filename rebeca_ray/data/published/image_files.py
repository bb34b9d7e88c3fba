"""Images as files of a folder: list their names, and read their bytes in the order of their items."""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pyarrow as pa

from rebeca_ray.data.published.dataset import IMAGES_PER_GROUP, image_table
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import list_files, open_filesystem, unreadable
from rebeca_ray.storage.listing import THREADS
from rebeca_ray.storage.store import failure_types

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def find_images(folder: str) -> dict[str, str]:
    """Return the address of each image below a folder, by its name there. Raises InputError for none."""
    start = f"{folder.rstrip('/')}/"
    names = {uri.removeprefix(start): uri for uri in list_files(folder)}
    images = {
        name: uri
        for name, uri in names.items()
        if PurePosixPath(name).suffix.lower() in SUFFIXES and not hidden(name)
    }
    if not images:
        raise InputError(
            f"images {folder}: no image there; expected files such as name.jpg; unpack the images there"
        )
    return images


def hidden(name: str) -> bool:
    """Return whether a file is one that an operating system adds, such as `.DS_Store` and `._name.jpg`."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def reader_of(files: Mapping[str, str]) -> Callable[[Collection[str]], Iterator[pa.Table]]:
    """Return the function that yields the images of some items, sorted. `files` has an address per item."""

    def read_images(items: Collection[str]) -> Iterator[pa.Table]:
        ordered = sorted(items)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(ordered), IMAGES_PER_GROUP):
                group = ordered[start : start + IMAGES_PER_GROUP]
                names = [PurePosixPath(files[item]).name for item in group]
                yield image_table(group, list(pool.map(read_file, (files[item] for item in group))), names)

    return read_images


def read_file(uri: str) -> bytes:
    """Return the bytes of a file. Raises UserError if it cannot be read."""
    filesystem, path = open_filesystem(uri)
    try:
        return bytes(filesystem.cat_file(path))
    except failure_types() as error:
        raise unreadable(uri, error) from None
