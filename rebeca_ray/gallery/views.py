"""The rows that pages show, read from the tables of a snapshot."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.gallery.tables import Filter, Tables

Row = dict[str, Any]  # of a table, by column

USER = ["user_id", "num_items", "num_failed", "cold_start", "stale"]
ITEM = [
    *("item_id", "user_id", "rank", "like_probability", "nearest_item_id", "nearest_similarity"),
    *("safety_flag", "origin", "image_file", "image_row"),
]
FILTERS: Mapping[str, tuple[str, str]] = {  # name -> title, and the unit of its limit if it has one
    "likely": ("Low like probability", "at most"),
    "flagged": ("Flagged as unsafe", ""),
    "near": ("Close to a real item", "cosine at least"),
    "failed": ("Failed", ""),
}
LIMITS = {"likely": 0.2, "near": 0.95}


def filter_of(name: str, limit: float) -> Filter:
    """Return the filter of items by name: `likely`, `flagged` or `near`."""
    if name == "likely":
        return Filter(
            "like_probability", lambda column: pc.less_equal(column, limit), lambda low, _: low <= limit
        )
    if name == "near":
        return Filter(
            "nearest_similarity",
            lambda column: pc.greater_equal(column, limit),
            lambda _, high: high >= limit,
        )
    return Filter("safety_flag", lambda column: column, lambda _, high: bool(high))


def with_best_item(tables: Tables, users: pa.Table) -> list[Row]:
    """Return users, each with their best item, or that of the population pool if they have none."""
    rows: list[Row] = users.to_pylist()
    names = [row["user_id"] for row in rows]
    items = tables.snapshot.items(ITEM, [*{*names, POPULATION_USER}]).to_pylist() if names else []
    best: dict[str, Row] = {}
    for item in items:  # by user and rank
        best.setdefault(item["user_id"], item)
    return [{**row, "best": best.get(row["user_id"]) or best.get(POPULATION_USER)} for row in rows]


def items_of(tables: Tables, user_id: str) -> list[Row]:
    """Return the items that a user gets, best first: the population pool for a user without any."""
    items = tables.snapshot.items(ITEM, [user_id])
    if not items.num_rows and user_row(tables, user_id):
        items = tables.snapshot.items(ITEM, [POPULATION_USER])
    rows: list[Row] = items.to_pylist()
    return rows


def user_row(tables: Tables, user_id: str) -> Row | None:
    """Return a user's row of the table `users`, None for an unknown user."""
    rows: list[Row] = tables.snapshot.table("users", None, [user_id]).to_pylist()
    return rows[0] if rows else None


def item_row(tables: Tables, user_id: str, item_id: str) -> Row | None:
    """Return all columns of an item but its embedding, None for an unknown item."""
    columns = [name for name in tables.snapshot.schema("items").names if name != "image_embeds"]
    items = tables.snapshot.items(columns, [user_id])
    rows: list[Row] = items.filter(pc.equal(items["item_id"], item_id)).to_pylist()
    return rows[0] if rows else None


def changes_of(tables: Tables, user_id: str) -> dict[str, str]:
    """Return the change of each of a user's items since the snapshot before, by item."""
    rows = tables.snapshot.table("changes", ["item_id", "change"], [user_id]).to_pylist()
    return {row["item_id"]: row["change"] for row in rows}
