"""A data set as its layout gives it: ratings by split, and images by item.

files in a published layout -> `PublishedData` -> write.py
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.errors import InputError

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "interactions", "validation", "test"  # the splits, by the names of their files
SPLITS = (TRAIN, VALIDATION, TEST)
DEFAULT_SCALE = (1.0, 5.0)
LIKE, DISLIKE = 5.0, 1.0  # on that scale, for data sets of likes and dislikes
IMAGES_PER_GROUP = 100

Ratings = dict[str, pa.Table]


@dataclass(frozen=True, kw_only=True)
class PublishedData:
    """A published data set.

    `ratings` has a table per split: user_id, item_id, rating, and timestamp where the layout has times.
    `available` are the items with an image. `read_images` yields the images of some of them, as
    `schemas.ITEMS`, at most IMAGES_PER_GROUP at once.
    """

    name: str
    source: str
    ratings: Ratings
    available: frozenset[str]
    read_images: Callable[[Collection[str]], Iterator[pa.Table]]
    rating_scale: tuple[float, float] = DEFAULT_SCALE

    @property
    def rated(self) -> list[str]:
        """Return the rated items of all splits, sorted."""
        return sorted(distinct(self.ratings, "item_id"))


def distinct(ratings: Ratings, column: str) -> set[str]:
    """Return the values of a column in all splits."""
    return {value for table in ratings.values() for value in pc.unique(table[column]).to_pylist()}


def by_split(table: pa.Table, split: pa.Array) -> Ratings:
    """Return the rows of each split that has any. `split` names the split of each row."""
    tables = {name: table.filter(pc.equal(split, name)) for name in SPLITS}
    return {name: rows for name, rows in tables.items() if rows.num_rows}


def counts_of(ratings: Ratings) -> dict[str, int]:
    """Return the numbers of users, images and ratings, as `warn_of_counts` compares them."""
    return {
        "users": len(distinct(ratings, "user_id")),
        "images": len(distinct(ratings, "item_id")),
        "ratings": sum(table.num_rows for table in ratings.values()),
    }


def warn_of_counts(where: str, counts: Mapping[str, int], *published: Mapping[str, int]) -> None:
    """Log a warning unless the counts are those of a published version: somebody may have a part of it."""
    if all(any(counts[name] != number for name, number in version.items()) for version in published):
        expected = " or ".join(
            ", ".join(f"{number:,} {name}" for name, number in version.items()) for version in published
        )
        actual = ", ".join(f"{counts[name]:,} {name}" for name in published[0])
        log.warning(f"{where}: {actual}; published are {expected}; imported as it is")


def in_a_later_split(ratings: Ratings) -> Iterator[tuple[str, pa.Array]]:
    """Yield each split with a mask of its rows: whether a later split rates the same user and item."""
    later = pa.array([], pa.string())
    for split in reversed([name for name in SPLITS if name in ratings]):
        table = ratings[split]
        pair = pc.binary_join_element_wise(table["user_id"], table["item_id"], "\x1f").combine_chunks()
        yield split, pc.is_in(pair, value_set=later)
        later = pa.concat_arrays([later, pair])


def require_one_split(where: str, ratings: Ratings) -> None:
    """Raise InputError if a user rates an item in two splits: training would see the test."""
    for split, is_repeated in in_a_later_split(ratings):
        if count := pc.sum(is_repeated).as_py():
            row = ratings[split].filter(is_repeated).slice(0, 1).to_pylist()[0]
            more = f" (and {count - 1:,} more)" if count > 1 else ""
            raise InputError(
                f"{where}: {row['user_id']} × {row['item_id']} is rated with {row['rating']:g} in {split} "
                f"and again in a later split{more}; expected one split per pair; remove one of the ratings"
            )


def without_leaks(where: str, ratings: Ratings) -> Ratings:
    """Return the ratings without those that a later split rates again, and log their number."""
    kept = dict(ratings)
    for split, is_repeated in in_a_later_split(ratings):
        if count := pc.sum(is_repeated).as_py():
            log.warning(f"{where}: {count:,} ratings of {split} stand in a later split too; left out there")
            kept[split] = ratings[split].filter(pc.invert(is_repeated))
    return kept


def image_table(item_id: list[str], data: list[bytes], names: list[str]) -> pa.Table:
    """Return images as `schemas.ITEMS`."""
    image = pa.StructArray.from_arrays(
        [pa.array(data, pa.binary()), pa.array(names, pa.string())], fields=list(schemas.IMAGE)
    )
    return pa.table([pa.array(item_id, pa.string()), image], schema=schemas.ITEMS)
