"""Compare groups of users: are some served worse than others?

groups (user_id, group) + a snapshot -> figures per user, bucket by bucket -> means per group, with intervals

No group has fewer users than `min_users`: smaller ones are merged, so that nobody can be singled out.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.figures import group_starts, mean_cosines
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.snapshots import user_key_of
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.paired import bootstrap_interval
from rebeca_ray.storage.parquet import open_table

FIGURES = ("like_probability", "diversity", "failed", "unsafe", "cold_start")
NO_GROUP, SMALL_GROUPS = "(no group)", "(small groups)"
NUM_SAMPLES = 1000  # of the bootstrap
MOST_USERS = 10_000  # of a bootstrap; more are thinned out evenly, which widens the interval
ITEM_COLUMNS = ["user_id", "image_embeds", "like_probability", "safety_flag"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The mean of a figure over the users who have it, and its 95% bootstrap interval over users.

    `differs` says that the interval leaves out the mean over all users.
    """

    users: int
    mean: float
    low: float
    high: float
    differs: bool


@dataclass(frozen=True, kw_only=True)
class UserGroup:
    """A group of users with their items. A figure that no user has is None. `merged` counts small groups."""

    group: str
    merged: int
    users: int
    items: int
    figures: dict[str, Figure | None]


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """The figures of all users, then of each group, the largest first."""

    run_id: str
    run_date: str
    min_users: int
    everybody: UserGroup
    groups: list[UserGroup]


def compare_groups(snapshot: Snapshot, uri: str, min_users: int = 20) -> GroupReport:
    """Return the figures of the groups in the table `uri`. The population pool is no user.

    Raises InputError for a table with a user in two groups, without any user of the snapshot, or with names
    that stand for other things here, and for a snapshot of fewer than `min_users` users.
    """
    groups = read_groups(uri, snapshot.root)
    rows = pa.concat_tables(user_figures(snapshot)).combine_chunks()
    if rows.num_rows < min_users:
        raise InputError(
            f"catalog {snapshot.root}: {rows.num_rows} users, fewer than --min-users {min_users}; "
            "compare the groups of a larger catalog"
        )
    row = pc.index_in(rows["user_id"], value_set=groups["user_id"])
    if row.null_count == len(row):
        raise InputError(
            f"groups {uri}: none of its {len(groups)} users is in catalog {snapshot.root}; "
            "give the users of this catalog"
        )
    group_U = np.array(pc.fill_null(groups["group"].take(row), NO_GROUP).to_pylist(), object)
    figures = {
        name: rows[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("items", *FIGURES)
    }
    everybody = describe("(all users)", 1, figures, np.ones(len(group_U), bool), None)
    parts = merged_groups(group_U.tolist(), min_users)
    return GroupReport(
        run_id=snapshot.run_id,
        run_date=snapshot.manifest.run_date,
        min_users=min_users,
        everybody=everybody,
        groups=[
            describe(name, len(names), figures, np.isin(group_U, np.array(names, object)), everybody)
            for name, names in parts.items()
        ],
    )


def read_groups(uri: str, root: str) -> pa.Table:
    """Return `user_id` and `group` of a Parquet or CSV table, with the pseudonyms of the catalog if any."""
    source = open_table(uri, "groups", columns={}, user_key=user_key_of(root))
    table = source.read(check_columns(source, schemas.GROUPS)).combine_chunks()
    check_rows(table, "groups", uri)
    check_ids(table["user_id"], "groups", uri, "user_id", unique="give each user one group")
    check_ids(table["group"], "groups", uri, "group")
    if taken := {NO_GROUP, SMALL_GROUPS} & set(table["group"].unique().to_pylist()):
        raise InputError(f"groups {uri}: {min(taken)!r} is a name of the report; give the group another")
    return table.select(["user_id", "group"])


def user_figures(snapshot: Snapshot) -> Iterator[pa.Table]:
    """Yield a table per bucket: each user with items and FIGURES, null where a user has no such figure.

    `failed` and `unsafe` are fractions of the requested items. An unsafe item was left out, or is flagged.
    """
    for bucket in range(snapshot.num_buckets):
        users = snapshot.bucket("users", bucket, snapshot.num_buckets)
        users = users.filter(pc.not_equal(users["user_id"], POPULATION_USER))
        items = snapshot.bucket("items", bucket, snapshot.num_buckets, ITEM_COLUMNS).sort_by("user_id")
        of_items = item_figures(items)
        row = pc.index_in(users["user_id"], value_set=of_items["user_id"])
        requested, kept, failed = (
            users[name].to_numpy().astype(np.float64) for name in ("num_images", "num_items", "num_failed")
        )
        stale = users["stale"].to_numpy()
        flagged = pc.fill_null(of_items["flagged"].take(row), 0.0).to_numpy()
        # Time ran out for the missing items of a stale user, so nobody knows whether they are unsafe.
        left_out = np.where(stale, 0.0, np.maximum(0.0, requested - kept - failed))
        yield pa.table(
            {
                "user_id": users["user_id"],
                "items": kept,
                "like_probability": of_items["like_probability"].take(row),
                "diversity": of_items["diversity"].take(row),
                "failed": failed / requested,
                "unsafe": (left_out + flagged) / requested,
                "cold_start": users["cold_start"].cast(pa.float64()),
            }
        )


def item_figures(items: pa.Table) -> pa.Table:
    """Return for each user of sorted items: mean like probability, mean distance, flagged items."""
    starts = group_starts(items["user_id"].to_numpy(zero_copy_only=False))
    if not len(starts):
        empty = pa.array([], pa.float64())
        return pa.table(
            {
                "user_id": pa.array([], pa.string()),
                "like_probability": empty,
                "diversity": empty,
                "flagged": empty,
            }
        )
    counts = np.diff([*starts, items.num_rows])
    embeds = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(items.num_rows, -1)
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    several = counts > 1
    distance = np.full(len(counts), np.nan)
    distance[several] = 1 - mean_cosines(unit, starts, counts)
    like = items["like_probability"].to_numpy(zero_copy_only=False).astype(np.float64)  # null is NaN
    judged = np.add.reduceat(np.isfinite(like).astype(np.float64), starts)
    total = np.add.reduceat(np.nan_to_num(like), starts)
    mean = np.divide(total, judged, out=np.full(len(counts), np.nan), where=judged > 0)
    flagged = np.add.reduceat(items["safety_flag"].to_numpy(zero_copy_only=False).astype(np.float64), starts)
    return pa.table(
        {
            "user_id": items["user_id"].take(pa.array(starts)),
            "like_probability": pa.array(mean, from_pandas=True),
            "diversity": pa.array(distance, from_pandas=True),
            "flagged": flagged,
        }
    )


def merged_groups(group_U: list[str], min_users: int) -> dict[str, list[str]]:
    """Return the groups of each part of the report, the largest part first, by the part's name.

    The small groups together must reach `min_users` too: otherwise the difference between all users and the
    other groups would give them away. So the next smallest group joins them until they do.
    """
    users: dict[str, int] = defaultdict(int)
    for group in group_U:
        users[group] += 1
    by_size = sorted(users, key=lambda group: (users[group], group))
    small: list[str] = []
    total = 0
    for group in by_size:
        if users[group] >= min_users and (not small or total >= min_users):
            break
        small.append(group)
        total += users[group]
    parts = {group: [group] for group in by_size if group not in small}
    sizes = {group: users[group] for group in parts}
    if small:
        parts[SMALL_GROUPS], sizes[SMALL_GROUPS] = small, total
    return {name: parts[name] for name in sorted(parts, key=lambda name: (-sizes[name], name))}


def describe(
    name: str, merged: int, figures: dict[str, np.ndarray], inside: np.ndarray, everybody: UserGroup | None
) -> UserGroup:
    """Return the figures of the users for whom `inside` holds, compared with those of everybody."""
    compared = everybody.figures if everybody else dict.fromkeys(FIGURES)
    return UserGroup(
        group=name,
        merged=merged,
        users=int(inside.sum()),
        items=int(figures["items"][inside].sum()),
        figures={figure: mean_of(figures[figure][inside], compared[figure]) for figure in FIGURES},
    )


def mean_of(figure_U: np.ndarray, everybody: Figure | None) -> Figure | None:
    """Return the mean of the finite figures with its interval; None without any."""
    figure_U = figure_U[np.isfinite(figure_U)]
    if not len(figure_U):
        return None
    thinned = np.linspace(0, len(figure_U) - 1, min(MOST_USERS, len(figure_U))).astype(int)
    low, high = bootstrap_interval(figure_U[thinned], num_samples=NUM_SAMPLES)
    return Figure(
        users=len(figure_U),
        mean=float(figure_U.mean()),
        low=low,
        high=high,
        differs=everybody is not None and not low <= everybody.mean <= high,
    )
