"""Outcomes: every requested item of a bucket counted as one of OUTCOMES, each from its own evidence.

Published items are rows of `items`, failed ones rows of `errors`, filtered ones rows that were rendered
without an image fit to be shown. Deferred items are those of stale users beyond the items they keep. Nothing
is counted as the rest, so the sum of the outcomes is a check.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import pyarrow as pa

from rebeca_ray.catalog.counts import DEFERRED, FAILED, FILTERED, OUTCOMES, tally
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.generation.assembly import BucketTables, Pool
from rebeca_ray.generation.decisions import Action, Decision, PublishedUser
from rebeca_ray.generation.item_columns import without_pool

COUNTED = (*OUTCOMES, "requested", "users", "stale_users")


def count_outcomes(
    bucket: BucketTables, decisions: Iterable[Decision], last: Mapping[str, PublishedUser], pool: Pool | None
) -> dict[str, int]:
    """Return COUNTED of a bucket. `last` are the users of the previous snapshot."""
    items = without_pool(bucket.items)
    num_items, num_failed = tally(items["user_id"]), tally(bucket.errors["user_id"])
    counts = Counter(tally(items["origin"]))
    for decision in decisions:
        user = decision.user_id
        if user == POPULATION_USER:
            continue  # nobody requests the pool itself
        counts["requested"] += decision.num_images
        pooled = decision.action is Action.POOL
        if user in bucket.stale or (pooled and pool is not None and pool.stale):
            counts[DEFERRED] += decision.num_images - num_items.get(user, 0)
        elif pooled and pool is not None:
            # The pool's failures fall to those who request most.
            missing = max(0, decision.num_images - pool.items.num_rows)
            counts[FAILED] += min(missing, pool.num_failed)
            counts[FILTERED] += min(missing - min(missing, pool.num_failed), pool.num_filtered)
        elif decision.action is Action.PLAN:
            counts[FAILED] += num_failed.get(user, 0)
            counts[FILTERED] += bucket.filtered.get(user, 0)
        elif user in last:
            counts[FILTERED] += num_filtered(last[user])
    counts["users"] = len(num_items)
    counts["stale_users"] = len(bucket.stale - {POPULATION_USER})
    return {name: counts[name] for name in COUNTED}


def count_carried(
    items: pa.Table, last: Mapping[str, PublishedUser], decisions: Iterable[Decision]
) -> dict[str, int]:
    """Return COUNTED of a bucket that is carried over by reference. `items` are those of its files."""
    items = without_pool(items)
    counts = Counter(tally(items["origin"]))
    counts["requested"] = sum(
        decision.num_images for decision in decisions if decision.user_id != POPULATION_USER
    )
    counts[FILTERED] = sum(num_filtered(row) for user, row in last.items() if user != POPULATION_USER)
    counts["users"] = len(items["user_id"].unique())
    return {name: counts[name] for name in COUNTED}


def num_filtered(row: PublishedUser) -> int:
    """Return how many items of a user were not fit to be shown, as the previous snapshot says."""
    return row.num_images - row.num_items - row.num_failed
