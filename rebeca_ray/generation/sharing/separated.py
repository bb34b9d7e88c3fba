"""Separated users: another number of buckets moves users who share an image into different buckets.

A bucket's images serve its own users alone, the population pool's aside. Exports rely on it.
"""

from collections import defaultdict
from collections.abc import Collection

import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.identity import bucket_of


def separated_users(
    previous: Snapshot, bucket: int, num_buckets: int, *, without: Collection[str] = ()
) -> set[str]:
    """Return the users of a bucket who shared an image with users that are in another bucket now.

    All of them are planned again, because the user who lent the image gets the same item again. Files
    `without` are not read.
    """
    if previous.num_buckets == num_buckets:
        return set()
    paths = previous.bucket_files("items", bucket, num_buckets)["path"].to_pylist()
    columns = ["item_id", "user_id", "origin"]
    items = previous.read_files("items", [path for path in paths if path not in without], columns)
    items = items.filter(pc.not_equal(items["origin"], schemas.POPULATION))
    several = items.group_by("item_id").aggregate([("user_id", "count")])
    shared = several.filter(pc.greater(several["user_id_count"], 1))["item_id"].combine_chunks()
    rows = items.filter(pc.is_in(items["item_id"], value_set=shared)).to_pylist()
    buckets = defaultdict[str, set[int]](set)
    for row in rows:
        buckets[row["item_id"]].add(bucket_of(row["user_id"], num_buckets))
    separated = {row["user_id"] for row in rows if len(buckets[row["item_id"]]) > 1}
    return {user for user in separated if bucket_of(user, num_buckets) == bucket}
