"""Refreshing: of every requested user it is decided, before anything is sampled, who is drawn anew and who keeps last night's items.

request, bucket by bucket + histories + last night's `users` -> work/…/decisions

Shapes: G users to be drawn.
"""

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER, Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import RefreshSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.identity import bucket_of, hash128
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table

PLAN, CARRY, RESCORE, POOLED = "plan", "carry", "rescore", "pool"
ROWS_PER_GROUP = 20_000
Key = tuple[float, int, int]  # the smaller, the earlier drawn


@dataclass(frozen=True, kw_only=True)
class Tonight:
    """What every decision of a run goes by."""

    date: datetime.date
    prior: str
    can_rescore: bool
    made_with: str
    refresh: RefreshSettings
    num_images: int
    num_buckets: int


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """All of them, counted; they themselves lie in the run's work folder, a file a bucket."""

    pool: dict[str, Any] | None  # the row of the strangers' pool, if there are any
    by_urgency: (
        bool  # units follow priority, since time may run out; else the buckets, so that files are full
    )
    boundaries: list[Key]  # the first key of each unit but the first
    planned_users: int
    planned_items: int  # images to render, were all of them drawn
    units: int

    def unit_of(self, row: dict[str, Any]) -> int:
        key = draw_key(row, self.by_urgency)
        return sum(key >= boundary for boundary in self.boundaries)


def decide_all(
    config: GenerateConfig,
    run: Run,
    prior: TrainedPrior,
    histories: Histories | None,
    previous: Snapshot | None,
    decoder: str,
    moved: Callable[[], None],
) -> Decisions:
    """Decide for every requested user; a resumed run reads what was decided."""
    marker = join(run.work, "decisions.json")
    if told := read_json(marker):
        return Decisions(**{**told, "boundaries": [tuple(key) for key in told["boundaries"]]})
    settings = config.sampler.model_dump_json(
        exclude={"batch_size", "num_actors", "cpus_per_actor", "device"}
    )
    tonight = Tonight(
        date=datetime.date.fromisoformat(run.run_date),
        prior=prior.fingerprint,
        can_rescore=prior.selector is not None,
        made_with=hash128(settings, config.selection.model_dump_json(), decoder),
        refresh=config.refresh,
        num_images=config.num_images,
        num_buckets=config.layout.num_buckets,
    )
    encoder = prior.settings.user_encoder
    by_urgency = config.limits.publish_by is not None or config.limits.max_gpu_hours is not None
    split_request(config, run)

    def decide_bucket(bucket: int) -> dict[str, Any]:
        known = known_users(config.prior, encoder, histories, bucket, tonight.num_buckets)
        return Users(run, tonight, bucket, known, histories, previous).decide(by_urgency)

    found = for_each_bucket(decide_bucket, range(tonight.num_buckets), moved)
    pool = decide_pool(run, tonight, previous, most=max(part["most_of_strangers"] for part in found))
    planned = [part["planned"] for part in found]
    if pool and pool["decision"] != CARRY:
        write_decisions(
            [pool], run.decisions(tonight.num_buckets, "to-plan")
        )  # a file beside those of the buckets
    if pool and pool["decision"] == PLAN:
        planned.append(keys_and_sizes([pool], by_urgency))
    planned_G4 = np.concatenate(planned)
    boundaries = cut(planned_G4, config.layout.items_per_unit)
    decisions = Decisions(
        pool=pool,
        by_urgency=by_urgency,
        boundaries=boundaries,
        planned_users=len(planned_G4),
        planned_items=int(planned_G4[:, 3].sum()),
        units=len(boundaries) + 1 if len(planned_G4) else 0,
    )
    write_json(asdict(decisions), marker)
    return decisions


def cut(planned_G4: np.ndarray, items_per_unit: int) -> list[Key]:
    """The first key of every unit but the first, so that each has about `items_per_unit` items."""
    ordered_G4 = planned_G4[np.lexsort((planned_G4[:, 2], planned_G4[:, 1], planned_G4[:, 0]))]
    unit_G = (np.cumsum(ordered_G4[:, 3]) - 1) // items_per_unit
    return [(float(key[0]), int(key[1]), int(key[2])) for key in ordered_G4[1:][np.diff(unit_G) > 0]]


def keys_and_sizes(rows: list[dict[str, Any]], by_urgency: bool) -> np.ndarray:
    """[G, 4] of some users: the three parts of their key, and how many images they get. (Doubles hold 48 bits of a hash.)"""
    return np.array([(*draw_key(row, by_urgency), row["num_images"]) for row in rows], np.float64).reshape(
        -1, 4
    )


def draw_key(row: dict[str, Any], by_urgency: bool) -> Key:
    """By priority, then by activity, or by bucket; a hash decides between equals, so that the order is total."""
    first, second = (-row["priority"], -row["activity"]) if by_urgency else (float(row["bucket"]), 0)
    return first, second, int(hash128("order", row["user_id"])[:12], 16)


def split_request(config: GenerateConfig, run: Run) -> None:
    """Write the request below the run's work folder, one file a bucket."""
    table = open_parquet(config.request, "request").read()
    table = table.select([name for name in schemas.REQUEST.names if name in table.column_names])
    bucket = np.array(
        [
            bucket_of(user, config.layout.num_buckets)
            for user in table["user_id"].cast(pa.string()).to_pylist()
        ]
    )
    order = np.argsort(bucket, kind="stable")
    table, ends = table.take(order), np.searchsorted(bucket[order], np.arange(config.layout.num_buckets + 1))
    for number, (start, stop) in enumerate(pairwise(ends.tolist())):
        write_table(
            table.slice(start, stop - start), request_file(run, number), row_group_size=ROWS_PER_GROUP
        )


def request_file(run: Run, bucket: int) -> str:
    return join(run.work, "request", f"bucket-{bucket:05d}.parquet")


def known_users(
    prior: str, encoder: str, histories: Histories | None, bucket: int, num_buckets: int
) -> dict[str, tuple[str, int]]:
    """Digest and activity of the users of a bucket whom the prior knows: by its table, by their histories, or none at all."""
    if encoder == "none":
        return {}
    parts = [f"{prior.rstrip('/')}/users.parquet"]
    if encoder == "history":
        assert histories is not None
        parts = [
            histories.file(number) for number in range(bucket, len(histories.users_of_bucket), num_buckets)
        ]
    known: dict[str, tuple[str, int]] = {}
    for part in parts:
        table = read_table(part, "users", ["user_id", "history_digest", "num_likes"])
        rows = zip(*(column.to_pylist() for column in table), strict=True)
        known |= {
            user: (digest, likes) for user, digest, likes in rows if bucket_of(user, num_buckets) == bucket
        }
    return known


class Users:
    """The users of one bucket, met and decided upon."""

    def __init__(
        self,
        run: Run,
        tonight: Tonight,
        bucket: int,
        known: dict[str, tuple[str, int]],
        histories: Histories | None,
        previous: Snapshot | None,
    ) -> None:
        self.run, self.tonight, self.bucket, self.histories, self.known = (
            run,
            tonight,
            bucket,
            histories,
            known,
        )
        self.last = last_users(previous, bucket, tonight.num_buckets)

    def decide(self, by_urgency: bool) -> dict[str, Any]:
        """Write the bucket's decisions; returns what must be known of all buckets together."""
        asked = read_table(request_file(self.run, self.bucket), "request").to_pylist()
        rows = [self.row(want) for want in asked]
        rows.sort(key=lambda row: (row["histories_bucket"], row["user_id"]))
        write_decisions(rows, self.run.decisions(self.bucket))
        drawn = [row for row in rows if row["decision"] in (PLAN, RESCORE)]
        if drawn:
            write_decisions(drawn, self.run.decisions(self.bucket, "to-plan"))
        planned = [row for row in drawn if row["decision"] == PLAN]
        return {
            "planned": keys_and_sizes(planned, by_urgency),
            "most_of_strangers": max(
                (row["num_images"] for row in rows if row["decision"] == POOLED), default=0
            ),
        }

    def row(self, want: dict[str, Any]) -> dict[str, Any]:
        """The decision of one requested user."""
        user = want["user_id"]
        prompt, negative_prompt = want.get("prompt") or "", want.get("negative_prompt") or ""
        digest, activity = self.known.get(user, ("", 0))
        row = {
            "user_id": user,
            "num_images": want.get("num_images") or self.tonight.num_images,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "bucket": self.bucket,
            "histories_bucket": self.histories.bucket_of(user) if self.histories else 0,
            "stranger": user not in self.known,
            "history_digest": digest,
            "made_with": hash128(self.tonight.made_with, prompt, negative_prompt),
            "priority": float(np.float32(want.get("priority") or 0.0)),  # as it is read back
            "activity": activity,
        }
        if row["stranger"] and not (prompt or negative_prompt):
            return {**row, "decision": POOLED, "generation": 0}
        decision, generation = decide(row, self.last.get(user), self.tonight)
        return {**row, "decision": decision, "generation": generation}


def decide(row: dict[str, Any], last: dict[str, Any] | None, tonight: Tonight) -> tuple[str, int]:
    """What becomes of one user, and the generation of their items. `last` is their row of last night's `users`."""
    if last is None:
        return PLAN, 0
    if turn(row["user_id"], tonight.date, tonight.refresh.rotation) != turn(
        row["user_id"], last["planned_on"], tonight.refresh.rotation
    ):
        return PLAN, last["generation"] + 1
    same = all(row[name] == last[name] for name in ("num_images", "stranger", "history_digest", "made_with"))
    if last["num_items"] == 0:
        return PLAN, last["generation"] + 1  # nothing of theirs was fit to be shown
    if not same or last["num_failed"]:
        return PLAN, last["generation"]
    if last["prior"] != tonight.prior and tonight.refresh.on_new_prior == "replace":
        return PLAN, last["generation"]
    if last["prior"] != tonight.prior and tonight.refresh.on_new_prior == "rescore" and tonight.can_rescore:
        return RESCORE, last["generation"]
    return CARRY, last["generation"]


def turn(user_id: str, date: datetime.date, rotation: float) -> int:
    """Changes on one night in `1 / rotation`, not the same for all; a night without a run only puts it off."""
    if rotation == 0:
        return 0
    period = round(1 / rotation)
    return (date.toordinal() + int(hash128("turn", user_id)[:12], 16)) // period


def decide_pool(run: Run, tonight: Tonight, previous: Snapshot | None, *, most: int) -> dict[str, Any] | None:
    """The row of the pool that strangers without prompts share: as many images as the most that one of them wants; None without any."""
    if most == 0:
        return None
    bucket = bucket_of(POPULATION_USER, tonight.num_buckets)
    last = last_users(previous, bucket, tonight.num_buckets).get(POPULATION_USER)
    row = {
        "user_id": POPULATION_USER,
        "num_images": max(most, last["num_images"] if last else 0),
        "prompt": "",
        "negative_prompt": "",
        "bucket": bucket,
        "histories_bucket": 0,
        "stranger": True,
        "history_digest": "",
        "made_with": hash128(tonight.made_with, "", ""),
        "priority": float(np.finfo(np.float32).max),  # many wait for it
        "activity": 0,
    }
    decision, generation = decide(row, last, tonight)
    return {**row, "decision": decision, "generation": generation}


def last_users(previous: Snapshot | None, bucket: int, num_buckets: int) -> dict[str, dict[str, Any]]:
    """Last night's `users` of a bucket."""
    if previous is None:
        return {}
    return {row["user_id"]: row for row in previous.bucket("users", bucket, num_buckets).to_pylist()}


def write_decisions(rows: list[dict[str, Any]], uri: str) -> None:
    write_table(pa.Table.from_pylist(rows, schema=schemas.DECISIONS), uri, row_group_size=ROWS_PER_GROUP)
