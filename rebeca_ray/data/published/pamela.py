"""PAMELA (arXiv 2604.07427): generated images, rated from 1 to 5, with seen and unseen users in the test.

SOURCE/annotations/pamela_<split>.json (participant_id, image_path, original_score), SOURCE/images/<image>
"""

import json

import pyarrow as pa

from rebeca_ray.data.published.dataset import (
    TEST,
    TRAIN,
    VALIDATION,
    PublishedData,
    Ratings,
    counts_of,
    require_one_split,
    warn_of_counts,
)
from rebeca_ray.data.published.image_files import find_images, read_file, reader_of
from rebeca_ray.data.published.rows import Rows
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import join

NAME = "PAMELA"
FILES = {
    TRAIN: ("pamela_train",),
    VALIDATION: ("pamela_val_seen", "pamela_val_unseen"),
    TEST: ("pamela_test_seen", "pamela_test_unseen"),
}
KEYS = ("participant_id", "image_path", "original_score")
PUBLISHED = {"users": 199, "images": 5_077, "ratings": 69_904, "test ratings": 12_205}


def read_pamela(source: str, *, keep_last: bool = False) -> PublishedData:
    """Read PAMELA with its splits. An item's id is the name of its image below `images/`.

    Raises InputError, naming the entry and the value, and for a pair of user and image in two splits.
    """
    ratings: Ratings = {}
    for split, names in FILES.items():
        files = [join(source, "annotations", f"{name}.json") for name in names]
        ratings[split] = pa.concat_tables([read_annotations(file, keep_last=keep_last) for file in files])
    require_one_split(f"{NAME} {source}", ratings)
    counts = {**counts_of(ratings), "test ratings": ratings[TEST].num_rows}
    warn_of_counts(f"{NAME} {source}", counts, PUBLISHED)
    images = find_images(join(source, "images"))
    return PublishedData(
        name=NAME,
        source=source,
        ratings=ratings,
        available=frozenset(images),
        read_images=reader_of(images),
    )


def read_annotations(uri: str, *, keep_last: bool) -> pa.Table:
    """Return the ratings of one file."""
    content = read_file(uri)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{uri}: not valid JSON; expected a list of objects; get the file again") from None
    if not isinstance(entries, list) or not entries:
        kind = "an empty list" if entries == [] else f"a JSON {type(entries).__name__}"
        raise InputError(f"{uri}: holds {kind}; expected a list of objects; get the file again")
    for number, entry in enumerate(entries):
        absent = [key for key in KEYS if not isinstance(entry, dict) or entry.get(key) is None]
        if absent:
            raise InputError(
                f"{uri}: entry {number} has no {absent[0]}; expected {', '.join(KEYS)}; drop the entry"
            )
    table = pa.table({key: pa.array([str(entry[key]) for entry in entries], pa.string()) for key in KEYS})
    rows = Rows(uri=uri, table=table, name_of_row=lambda row: f"entry {row}")
    items = [image_name(path) for path in rows.texts("image_path").to_pylist()]
    ratings = pa.table(
        {
            "user_id": rows.texts("participant_id"),
            "item_id": pa.array(items, pa.string()),
            "rating": rows.numbers("original_score", 1, 5),
        }
    )
    return rows.without_repeats(ratings, keep_last=keep_last)


def image_name(path: str) -> str:
    """Return the name of an image below `images/`. A path may begin with `./`, `PAMELA/` or `images/`."""
    return path.removeprefix("./").removeprefix("PAMELA/").removeprefix("images/")
