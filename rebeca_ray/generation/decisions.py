"""Decisions: for every requested user, whether to plan new items or to keep their items.

Decisions of a bucket are one Parquet file in the run's work folder; `Decisions` sums up all of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from enum import StrEnum
from typing import Self

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.identity import hash128
from rebeca_ray.storage.objects import JsonObject

RenderKey = tuple[float, float, float]  # the smaller is rendered earlier


class Action(StrEnum):
    """What a run does for a user."""

    PLAN = "plan"  # draw new items
    CARRY = "carry"  # keep the previous items
    RESCORE = "rescore"  # keep them, judged and ranked by tonight's selector
    POOL = "pool"  # share the population pool


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One row of `schemas.DECISIONS`."""

    user_id: str
    action: Action
    num_images: int
    prompt: str
    negative_prompt: str
    bucket: int
    histories_bucket: int
    cold_start: bool
    history_digest: str
    generation: int
    settings_digest: str
    priority: float
    activity: int
    item_id: str | None = None
    strength: float | None = None

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        return cls(**{**values, "action": Action(values["action"])})


@dataclass(frozen=True, kw_only=True)
class PublishedUser:
    """One row of `schemas.USERS`: the inputs of a user's items in a snapshot."""

    user_id: str
    num_images: int
    num_items: int
    num_failed: int
    cold_start: bool
    stale: bool
    history_digest: str
    generation: int
    prior: str
    settings_digest: str
    planned_on: date
    planned_by: str


@dataclass(frozen=True, kw_only=True)
class DecisionsFile:
    """A file of `schemas.DECISIONS` below the run's work folder, as it was written."""

    bucket: int  # the number of buckets for the population pool's
    to_plan: bool  # else all users of the bucket
    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """All decisions of a run, counted."""

    pool: Decision | None  # on the population pool, if any cold-start user needs it
    # Shards follow priority, since time may run out; otherwise the buckets, so that files are full.
    by_urgency: bool
    boundaries: list[RenderKey]  # the first key of each shard but the first
    planned_users: int
    planned_items: int  # images to render, if nothing was rendered before
    shards: int
    rescored_items: int = 0  # rows of the plan with nothing to render
    files: list[DecisionsFile] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # files of the previous snapshot, with the reasons

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        pool = values["pool"] and Decision.from_dict(values["pool"])
        boundaries = [(first, second, third) for first, second, third in values["boundaries"]]
        files = [DecisionsFile(**file) for file in values["files"]]
        return cls(**{**values, "pool": pool, "boundaries": boundaries, "files": files})

    @property
    def to_plan(self) -> list[DecisionsFile]:
        """Return the files with the users to plan and to rescore, by bucket."""
        return [file for file in self.files if file.to_plan]

    def fingerprint(self) -> str:
        """Return a hash of everything that planning takes from the decisions."""
        files = sorted(file.sha256 for file in self.to_plan)
        return hash128(*files, repr(self.boundaries), str(self.by_urgency))


def decisions_table(decisions: list[Decision]) -> pa.Table:
    """Return decisions as `schemas.DECISIONS`."""
    return pa.Table.from_pylist([asdict(decision) for decision in decisions], schema=schemas.DECISIONS)


def published_users(users: pa.Table) -> dict[str, PublishedUser]:
    """Return the rows of a `users` table by their user."""
    names = [field.name for field in fields(PublishedUser)]
    return {row["user_id"]: PublishedUser(**row) for row in users.select(names).to_pylist()}


RENDER_KEY = np.dtype([("first", np.float64), ("second", np.float64), ("order", np.float64)])


def render_keys(decisions: pa.Table, by_urgency: bool) -> np.ndarray:
    """Return the keys [G] of rows of `schemas.DECISIONS`: by priority, then activity; or by bucket.

    A hash of the user decides between equals, so that the order is total. Doubles hold its 48 bits exactly.
    """
    keys = np.zeros(decisions.num_rows, RENDER_KEY)
    if by_urgency:
        keys["first"] = -decisions["priority"].to_numpy().astype(np.float64)
        keys["second"] = -decisions["activity"].to_numpy().astype(np.float64)
    else:
        keys["first"] = decisions["bucket"].to_numpy()
    keys["order"] = [int(hash128("order", user)[:12], 16) for user in decisions["user_id"].to_pylist()]
    return keys


def shards_of(keys: np.ndarray, boundaries: Sequence[RenderKey]) -> np.ndarray:
    """Return the shard [G] of each key; `boundaries` are the first keys of all shards but the first."""
    return np.searchsorted(np.array([tuple(key) for key in boundaries], RENDER_KEY), keys, side="right")
