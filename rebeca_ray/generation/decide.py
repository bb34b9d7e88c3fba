"""Decide, before anything is sampled, which requested users get new items and which keep their items.

request, bucket by bucket + histories + `users` of the previous snapshot -> work/…/decisions

Shapes: G users to plan.
"""

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER, Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.sections import RefreshSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.data.validation import check_columns
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import (
    RENDER_KEY,
    Action,
    Decision,
    Decisions,
    PublishedUser,
    RenderKey,
    decisions_table,
    published_users,
    render_keys,
)
from rebeca_ray.identity import bucket_of, hash128
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table

ROWS_PER_GROUP = 20_000
Known = dict[str, tuple[str, int]]  # user -> digest and length of their history


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the request, with the defaults filled in."""

    user_id: str
    num_images: int
    prompt: str
    negative_prompt: str
    priority: float


@dataclass(frozen=True, kw_only=True)
class BucketDecisions:
    """What must be known of a bucket to cut the work of all buckets into shards."""

    planned: np.ndarray  # [G, 4], see `keys_and_sizes`
    pool_size: int  # images that the most demanding cold-start user wants


def decide_all(
    context: RunContext, histories: Histories | None, on_progress: Callable[[], None]
) -> Decisions:
    """Decide on every requested user. A resumed run reads its earlier decisions."""
    marker = join(context.run.work, "decisions.json")
    if values := read_json(marker):
        return Decisions.from_dict(values)
    limits = context.config.limits
    by_urgency = limits.publish_by is not None or limits.max_gpu_hours is not None
    split_request(context)

    def decide(bucket: int) -> BucketDecisions:
        return decide_bucket(context, histories, bucket, by_urgency)

    buckets = range(context.num_buckets)
    parts = for_each_bucket(decide, buckets, on_progress, in_process=context.in_process)
    pool = decide_pool(context, pool_size=max(part.pool_size for part in parts))
    planned = [part.planned for part in parts]
    if pool and pool.action is not Action.CARRY:
        # One more file beside those of the buckets.
        write_decisions([pool], context.run.decisions(context.num_buckets, "to-plan"))
    if pool and pool.action is Action.PLAN:
        planned.append(keys_and_sizes([pool], by_urgency))
    planned_G4 = np.concatenate(planned)
    boundaries = cut(planned_G4, context.config.layout.items_per_shard)
    decisions = Decisions(
        pool=pool,
        by_urgency=by_urgency,
        boundaries=boundaries,
        planned_users=len(planned_G4),
        planned_items=int(planned_G4[:, 3].sum()),
        shards=len(boundaries) + 1 if len(planned_G4) else 0,
    )
    write_json(asdict(decisions), marker)
    return decisions


def cut(planned_G4: np.ndarray, items_per_shard: int) -> list[RenderKey]:
    """Return the first key of every shard but the first, so that each has about `items_per_shard` items."""
    ordered_G4 = planned_G4[np.lexsort((planned_G4[:, 2], planned_G4[:, 1], planned_G4[:, 0]))]
    shard_G = (np.cumsum(ordered_G4[:, 3]) - 1) // items_per_shard
    return [(float(key[0]), float(key[1]), float(key[2])) for key in ordered_G4[1:][np.diff(shard_G) > 0]]


def keys_and_sizes(decisions: list[Decision], by_urgency: bool) -> np.ndarray:
    """Return [G, 4]: the three parts of each user's render key, and their images."""
    keys = render_keys(decisions_table(decisions), by_urgency)
    sizes = np.array([decision.num_images for decision in decisions], np.float64)
    return np.stack([*(keys[name] for name in RENDER_KEY.names or ()), sizes], axis=1)


def split_request(context: RunContext) -> None:
    """Write the request below the run's work folder, one file per bucket."""
    num_buckets = context.num_buckets
    source = open_parquet(context.config.request, "request")
    table = source.read(check_columns(source, schemas.REQUEST))
    users = table["user_id"].to_pylist()
    bucket = np.array([bucket_of(user, num_buckets) for user in users])
    order = np.argsort(bucket, kind="stable")
    table, ends = table.take(order), np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    for number, (start, stop) in enumerate(pairwise(ends.tolist())):
        rows = table.slice(start, stop - start)
        write_table(rows, request_file(context.run, number), row_group_size=ROWS_PER_GROUP)


def request_file(run: Run, bucket: int) -> str:
    return join(run.work, "request", f"bucket-{bucket:05d}.parquet")


def read_requests(context: RunContext, bucket: int) -> list[Request]:
    """Return the requests of one bucket."""
    rows = read_table(request_file(context.run, bucket), "request").to_pylist()
    return [
        Request(
            user_id=row["user_id"],
            num_images=row.get("num_images") or context.config.num_images,
            prompt=row.get("prompt") or "",
            negative_prompt=row.get("negative_prompt") or "",
            priority=float(np.float32(row.get("priority") or 0.0)),  # as it is read back
        )
        for row in rows
    ]


def known_users(context: RunContext, histories: Histories | None, bucket: int) -> Known:
    """Return digest and activity of the users of a bucket whom the prior knows.

    An `id` prior knows them by its table, a `history` prior by their histories. A prior without users knows
    nobody.
    """
    if context.models.user_encoder == "none":
        return {}
    files = [f"{context.config.prior.rstrip('/')}/users.parquet"]
    if context.models.user_encoder == "history":
        assert histories is not None
        numbers = range(bucket, len(histories.users_of_bucket), context.num_buckets)
        files = [histories.file(number) for number in numbers]
    known: Known = {}
    for file in files:
        table = read_table(file, "users", ["user_id", "history_digest", "num_likes"])
        rows = zip(*(column.to_pylist() for column in table), strict=True)
        inside = (
            (user, digest, likes)
            for user, digest, likes in rows
            if bucket_of(user, context.num_buckets) == bucket
        )
        known |= {user: (digest, likes) for user, digest, likes in inside}
    return known


def decide_bucket(
    context: RunContext, histories: Histories | None, bucket: int, by_urgency: bool
) -> BucketDecisions:
    """Decide on the users of one bucket, and write the decisions."""
    known = known_users(context, histories, bucket)
    last = last_users(context.previous, bucket, context.num_buckets)
    decisions = [
        decide_user(context, request, known, last.get(request.user_id), bucket, histories)
        for request in read_requests(context, bucket)
    ]
    decisions.sort(key=lambda decision: (decision.histories_bucket, decision.user_id))
    write_decisions(decisions, context.run.decisions(bucket))
    to_plan = [decision for decision in decisions if decision.action in (Action.PLAN, Action.RESCORE)]
    if to_plan:
        write_decisions(to_plan, context.run.decisions(bucket, "to-plan"))
    planned = [decision for decision in to_plan if decision.action is Action.PLAN]
    pool_sizes = [decision.num_images for decision in decisions if decision.action is Action.POOL]
    return BucketDecisions(planned=keys_and_sizes(planned, by_urgency), pool_size=max(pool_sizes, default=0))


def decide_user(
    context: RunContext,
    request: Request,
    known: Known,
    last: PublishedUser | None,
    bucket: int,
    histories: Histories | None,
) -> Decision:
    """Return the decision on one requested user. `last` is their row of the previous `users`."""
    digest, activity = known.get(request.user_id, ("", 0))
    cold_start = request.user_id not in known
    decision = Decision(
        user_id=request.user_id,
        action=Action.POOL,
        num_images=request.num_images,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        bucket=bucket,
        histories_bucket=histories.bucket_of(request.user_id) if histories else 0,
        cold_start=cold_start,
        history_digest=digest,
        generation=0,
        settings_digest=hash128(context.settings_digest, request.prompt, request.negative_prompt),
        priority=request.priority,
        activity=activity,
    )
    if cold_start and not (request.prompt or request.negative_prompt):
        return decision
    return with_action(decision, last, context)


def with_action(decision: Decision, last: PublishedUser | None, context: RunContext) -> Decision:
    """Return the decision with its action and generation. `last` is the user's previous row."""
    action, generation = decide_action(decision, last, context)
    return replace(decision, action=action, generation=generation)


def decide_action(decision: Decision, last: PublishedUser | None, context: RunContext) -> tuple[Action, int]:
    """Return the action for a user, and the generation of their items."""
    refresh = context.config.refresh
    if last is None:
        return Action.PLAN, 0
    if turn(decision.user_id, context.date, refresh) != turn(decision.user_id, last.planned_on, refresh):
        return Action.PLAN, last.generation + 1
    if last.num_items == 0:  # none was fit to be shown
        return Action.PLAN, last.generation + 1
    inputs = ("num_images", "cold_start", "history_digest", "settings_digest")
    if last.num_failed or any(getattr(decision, name) != getattr(last, name) for name in inputs):
        return Action.PLAN, last.generation
    if last.prior == context.versions["prior"] or refresh.on_new_prior == "keep":
        return Action.CARRY, last.generation
    if refresh.on_new_prior == "replace":
        return Action.PLAN, last.generation
    return (Action.RESCORE if context.models.can_rescore else Action.CARRY), last.generation


def turn(user_id: str, date: datetime.date, refresh: RefreshSettings) -> int:
    """Return a number that changes on one night in `1 / rotation`, spread over the users.

    A night without a run only delays the change.
    """
    if refresh.rotation == 0:
        return 0
    period = round(1 / refresh.rotation)
    return (date.toordinal() + int(hash128("turn", user_id)[:12], 16)) // period


def decide_pool(context: RunContext, *, pool_size: int) -> Decision | None:
    """Return the decision on the population pool; None without a cold-start user who needs it.

    The pool never shrinks: it keeps the previous size where tonight's is smaller.
    """
    if pool_size == 0:
        return None
    bucket = bucket_of(POPULATION_USER, context.num_buckets)
    last = last_users(context.previous, bucket, context.num_buckets).get(POPULATION_USER)
    decision = Decision(
        user_id=POPULATION_USER,
        action=Action.PLAN,
        num_images=max(pool_size, last.num_images if last else 0),
        prompt="",
        negative_prompt="",
        bucket=bucket,
        histories_bucket=0,
        cold_start=True,
        history_digest="",
        generation=0,
        settings_digest=hash128(context.settings_digest, "", ""),
        priority=float(np.finfo(np.float32).max),  # many users wait for it
        activity=0,
    )
    return with_action(decision, last, context)


def last_users(previous: Snapshot | None, bucket: int, num_buckets: int) -> dict[str, PublishedUser]:
    """Return the previous snapshot's `users` of a bucket."""
    return published_users(previous.bucket("users", bucket, num_buckets)) if previous else {}


def write_decisions(decisions: list[Decision], uri: str) -> None:
    write_table(decisions_table(decisions), uri, row_group_size=ROWS_PER_GROUP)
