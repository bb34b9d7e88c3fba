"""Likes and dislikes as folders: one folder per user, with the images that the user likes and dislikes.

SOURCE/<user>/likes/<image>, SOURCE/<user>/dislikes/<image>

The content of an image is its identity, so that users who like the same picture share an item.
"""

import hashlib

import pyarrow as pa

from rebeca_ray.data.published.dataset import DISLIKE, LIKE, TRAIN, PublishedData
from rebeca_ray.data.published.image_files import find_images, read_file, reader_of
from rebeca_ray.errors import InputError

RATINGS = {"likes": LIKE, "dislikes": DISLIKE}
ID_LENGTH = 40  # of hexadecimal digits; ids of generated items have 32


def read_user_folders(source: str) -> PublishedData:
    """Read likes as ratings of 5, dislikes as 1. An item's id is a hash of its bytes.

    The same image twice in one folder counts once. Raises InputError for an image elsewhere, and for one that
    a user likes and dislikes.
    """
    files: dict[str, str] = {}
    rated: dict[tuple[str, str], tuple[float, str]] = {}
    for name, uri in find_images(source).items():
        user, _, below = name.partition("/")
        folder, _, image = below.partition("/")
        if folder not in RATINGS or not image:
            raise InputError(
                f"{source}: holds {name}; expected <user>/likes/<image> or <user>/dislikes/<image>; move it"
            )
        item = hashlib.sha256(read_file(uri)).hexdigest()[:ID_LENGTH]
        files.setdefault(item, uri)
        rating, first = rated.setdefault((user, item), (RATINGS[folder], name))
        if rating != RATINGS[folder]:
            raise InputError(
                f"{source}: {name} is the same image as {first}; expected a like or a dislike; remove one"
            )
    table = pa.table(
        {
            "user_id": pa.array([user for user, _ in rated], pa.string()),
            "item_id": pa.array([item for _, item in rated], pa.string()),
            "rating": pa.array([rating for rating, _ in rated.values()], pa.float64()),
        }
    )
    return PublishedData(
        name="folder",
        source=source,
        ratings={TRAIN: table},
        available=frozenset(files),
        read_images=reader_of(files),
    )
