"""The first look at ratings and items together: facts, and tables in the form that the jobs read.

ratings, items -> `look` -> `Look` -> `facts` for people and scripts, `write_tables_of` for the jobs
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.data.bad_images import MAX_NAMED
from rebeca_ray.data.first_look.columns import Column, choose_columns
from rebeca_ray.data.first_look.likes import Taste, Threshold, choose_threshold, taste_of
from rebeca_ray.data.first_look.pictures import Items, read_items
from rebeca_ray.data.first_look.ratings import (
    IMPRESSION,
    REPEATED,
    Ratings,
    holds_number,
    is_in_form,
    read_ratings,
)
from rebeca_ray.data.first_look.sources import Source, batches, kind_of, open_source
from rebeca_ray.data.published.write import RATINGS_PER_GROUP, write_items
from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.parquet import replaced, write_table, write_tables

log = logging.getLogger(__name__)

MAX_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Look:
    """Ratings, items, and both together. `usable` [N] are the ratings of items with an image that opens."""

    ratings: Ratings
    items: Items
    threshold: Threshold | None
    usable: np.ndarray
    taste: Taste
    missing_items: pa.Array  # rated, but not among the items
    interactions_in_form: bool

    @property
    def lost_ratings(self) -> int:
        """Return the number of ratings of items without an image that opens."""
        return int((~self.usable).sum())

    @property
    def has_times(self) -> bool:
        return self.ratings.first_time is not None

    @property
    def converts_items(self) -> bool:
        return self.items.files is not None


def look(
    interactions: str, items: str, given: Mapping[str, str], like_threshold: float | None = None
) -> Look:
    """Read the ratings and open the images. `given` names columns of the ratings.

    Raises InputError for input that cannot be read, for columns that cannot be guessed, and if no rating
    has an item with an image.
    """
    source = open_source(interactions)
    ratings = read_ratings(source, columns_of(source, given))
    threshold = choose_threshold(ratings, like_threshold)
    pictures = read_items(items, ratings.items)
    has_image = pc.is_in(ratings.items, value_set=pictures.good).to_numpy(zero_copy_only=False)
    usable = has_image[ratings.item]
    if not usable.any():
        rated, known = (ids[0].as_py() for ids in (ratings.items, pictures.item_id))
        raise InputError(
            f"items {items}: no rating of {interactions} names one of them; ratings name items such as "
            f"{shown(rated)}, here they are called such as {shown(known)}; use one name, or item_id=NAME"
        )
    taste = taste_of(ratings, threshold, usable)
    if not taste.likes and threshold:
        raise InputError(
            f"interactions {interactions}: no rating of {taste.ratings:,} reaches the like threshold "
            f"{threshold.like:g}; expected at least one like; lower it with --like-threshold"
        )
    is_known = pc.is_in(ratings.items, value_set=pictures.item_id)
    return Look(
        ratings=ratings,
        items=pictures,
        threshold=threshold,
        usable=usable,
        taste=taste,
        missing_items=ratings.items.filter(pc.invert(is_known)),
        interactions_in_form=is_in_form(ratings),
    )


def columns_of(source: Source, given: Mapping[str, str]) -> dict[str, Column]:
    """Return the columns by declared name. A guess of the ratings holds a number, or is left out."""
    names = list(source.names)
    while True:
        columns = choose_columns(source.uri, names, given)
        rating = columns.get("rating")
        if rating is None or not rating.guessed or holds_number(source, rating):
            return columns
        log.warning("column %s holds no number, so it is not read as ratings", shown(rating.name))
        names.remove(rating.name)


def facts(view: Look) -> JsonObject:
    """Return all facts, with stable keys."""
    ratings, items, taste, threshold = view.ratings, view.items, view.taste, view.threshold
    return {
        "interactions": {
            "path": ratings.source.uri,
            "format": kind_of(ratings.source),
            "columns": {
                declared: {"column": column.name, "guessed": column.guessed}
                for declared, column in ratings.columns.items()
            },
            "rows": ratings.num_rows,
            "ratings": taste.ratings,
            "users": taste.users,
            "rated_items": taste.items,
            "likes": taste.likes,
            "dislikes": taste.ratings - taste.likes,
            "like_threshold": threshold.like if threshold else None,
            "rating_scale": list(threshold.scale) if threshold else None,
            "like_reason": threshold.reason if threshold else "without ratings, every row is a like",
            "median_likes_per_user": taste.median_likes,
            "median_ratings_per_user": taste.median_ratings,
            "cold_start_users": taste.cold_start_users,
            "repeated_pairs": ratings.defects.get(REPEATED, 0),
            "impressions": ratings.defects.get(IMPRESSION, 0),
            "timestamps": view.has_times,
            "first_time": ratings.first_time.isoformat(timespec="seconds") if ratings.first_time else None,
            "last_time": ratings.last_time.isoformat(timespec="seconds") if ratings.last_time else None,
            "unknown_times": ratings.unknown_times,
        },
        "items": {
            "path": items.uri,
            "format": "folder of images" if view.converts_items else "Parquet",
            "items": len(items.item_id),
            "missing_items": len(view.missing_items),
            "missing_examples": view.missing_items[:MAX_EXAMPLES].to_pylist(),
            "bad_images": len(items.bad_images),
            "bad_examples": dict(sorted(items.bad_images.items())[:MAX_NAMED]),
        },
        "left_out": left_out(view),
    }


def left_out(view: Look) -> list[JsonObject]:
    """Return each left-out group: its number and kind, the reason, and the command that leaves it out."""
    rows: list[JsonObject] = [
        {
            "number": number,
            "kind": "rows",
            "reason": reason,
            "by": "train" if reason == IMPRESSION else "init",
        }
        for reason, number in view.ratings.defects.items()
    ]
    images: JsonObject = {
        "number": len(view.items.bad_images),
        "kind": "items",
        "reason": "an image that does not open",
        "by": "init" if view.converts_items else "embed",
    }
    lost: JsonObject = {
        "number": view.lost_ratings,
        "kind": "ratings",
        "reason": "an item without an image that opens",
        "by": "train",
    }
    users: JsonObject = {
        "number": view.taste.cold_start_users,
        "kind": "users",
        "reason": "no like, so nothing to learn from; they still get images",
        "by": "train",
    }
    return [group for group in (*rows, images, lost, users) if group["number"]]


def write_tables_of(view: Look, folder: str) -> None:
    """Write into `folder` the tables that are not yet in the form of the jobs."""
    if not view.interactions_in_form:
        names = [name for name in view.ratings.types.names if name != "event"]
        schema = pa.schema([schemas.INTERACTIONS.field(name) for name in names])
        write_tables(
            kept_rows(view.ratings, schema),
            schema,
            join(folder, "interactions.parquet"),
            row_group_size=RATINGS_PER_GROUP,
        )
    if view.converts_items:
        write_items(view.items.as_data(), set(view.items.good.to_pylist()), join(folder, "items"))


def kept_rows(ratings: Ratings, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows that stay. Raises InputError if the file changed since it was read."""
    start = 0
    for batch in batches(ratings.source, ratings.types):
        stays = ratings.stays[start : start + batch.num_rows]
        start += batch.num_rows
        if start > ratings.num_rows:
            break
        yield batch.filter(pa.array(stays)).select(schema.names).cast(schema)
    if start != ratings.num_rows:
        raise replaced("interactions", ratings.source.uri, "it was converted")


def write_request(view: Look, path: str, num_users: int) -> int:
    """Write a request of the users with the most likes, and return their number."""
    likes = view.taste.likes_per_user
    users = view.ratings.users.take(pa.array(np.argsort(-likes, kind="stable")[:num_users]))
    write_table(pa.table({"user_id": users.cast(pa.string())}), path, row_group_size=RATINGS_PER_GROUP)
    return len(users)
