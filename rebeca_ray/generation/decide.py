"""Decide, before anything is sampled, which requested users get new items and which keep their items.

request, bucket by bucket + histories + `users` of the previous snapshot -> work/…/decisions

Shapes: G users to plan.
"""

import datetime
import logging
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, replace

import numpy as np

from rebeca_ray.catalog.layout import POPULATION_USER, Run
from rebeca_ray.config.sections import RefreshSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import (
    RENDER_KEY,
    Action,
    Decision,
    Decisions,
    DecisionsFile,
    PublishedUser,
    RenderKey,
    decisions_table,
    render_keys,
)
from rebeca_ray.generation.repair.previous import Damage, read_known, read_previous
from rebeca_ray.generation.request import Request, known_file, read_requests, split_prior_users, split_request
from rebeca_ray.identity import bucket_of, hash128, settings_for_item
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.records import damage_among, read_record, write_record

log = logging.getLogger(__name__)

ROWS_PER_GROUP = 20_000
KEYS_PER_BUCKET = 256  # shards of millions of items need no finer ones
Known = dict[str, tuple[str, int]]  # user -> digest and length of their history


@dataclass(frozen=True, kw_only=True)
class BucketDecisions:
    """What must be known of a bucket to cut the work of all buckets into shards, and to read it again."""

    planned_users: int
    planned: np.ndarray  # at most [KEYS_PER_BUCKET, 4], see `thinned`
    pool_size: int  # images that the most demanding cold-start user wants
    rescored_items: int
    files: list[DecisionsFile]
    last_pool: PublishedUser | None  # of the previous snapshot, in the bucket of the population pool
    pool_is_lost: bool
    damaged: Damage


def decide_all(
    context: RunContext, histories: Histories | None, on_progress: Callable[[], None]
) -> Decisions:
    """Decide on every requested user. A resumed run reads its earlier decisions, if they are intact."""
    run, num_buckets = context.run, context.num_buckets
    marker = join(run.work, "decisions.json")
    if values := read_record(marker):
        decisions = Decisions.from_dict(values)
        damaged = damage_among(run.work, decisions.files)
        if not damaged:
            return decisions
        path, reason = next(iter(damaged.items()))
        log.warning(f"{join(run.work, path)}: {reason}; all users are decided on again")
    limits = context.config.limits
    by_urgency = limits.publish_by is not None or limits.max_gpu_hours is not None
    known_damage = read_known(run.work)
    split_request(context)
    if context.models.user_encoder == "id":
        split_prior_users(context)

    def decide_on_all(known: Damage) -> list[BucketDecisions]:
        def decide(bucket: int) -> BucketDecisions:
            return decide_bucket(context, histories, bucket, by_urgency, known)

        return for_each_bucket(
            decide, range(num_buckets), on_progress, name="decide", in_process=context.in_process
        )

    parts = decide_on_all(known_damage)
    damaged = {path: reason for part in parts for path, reason in part.damaged.items()}
    if damaged.keys() - known_damage.keys():
        # An image file may serve several buckets, such as that of the population pool: all do without it.
        parts = decide_on_all(known_damage | damaged)
    pool = decide_pool(context, parts, pool_size=max(part.pool_size for part in parts))
    planned, files = [part.planned for part in parts], [file for part in parts for file in part.files]
    planned_users = sum(part.planned_users for part in parts)
    rescored_items = sum(part.rescored_items for part in parts)
    if pool and pool.action is not Action.CARRY:
        # One more file beside those of the buckets.
        files.append(write_decisions([pool], run, num_buckets, to_plan=True))
    if pool and pool.action is Action.PLAN:
        planned.append(keys_and_sizes([pool], by_urgency))
        planned_users += 1
    last_pool = parts[bucket_of(POPULATION_USER, num_buckets)].last_pool
    if pool and pool.action is Action.RESCORE and last_pool:
        rescored_items += last_pool.num_items
    planned_G4 = np.concatenate(planned)
    boundaries = cut(planned_G4, context.config.layout.items_per_shard)
    decisions = Decisions(
        pool=pool,
        by_urgency=by_urgency,
        boundaries=boundaries,
        planned_users=planned_users,
        planned_items=int(planned_G4[:, 3].sum()),
        shards=len(boundaries) + 1 if planned_users else 0,
        rescored_items=rescored_items,
        files=files,
        damaged={path: reason for part in parts for path, reason in part.damaged.items()},
    )
    for path, reason in decisions.damaged.items():
        log.warning(
            f"catalog {run.root}: {path}: {reason}; the users with items in it are planned again, "
            "and later snapshots do without it"
        )
    write_record(asdict(decisions), marker)
    return decisions


def cut(planned_G4: np.ndarray, items_per_shard: int) -> list[RenderKey]:
    """Return the first key of every shard but the first, so that each has about `items_per_shard` items."""
    ordered_G4 = in_order(planned_G4)
    shard_G = (np.cumsum(ordered_G4[:, 3]) - 1) // items_per_shard
    return [(float(key[0]), float(key[1]), float(key[2])) for key in ordered_G4[1:][np.diff(shard_G) > 0]]


def in_order(planned_G4: np.ndarray) -> np.ndarray:
    return planned_G4[np.lexsort((planned_G4[:, 2], planned_G4[:, 1], planned_G4[:, 0]))]


def thinned(planned_G4: np.ndarray) -> np.ndarray:
    """Return at most KEYS_PER_BUCKET rows of `keys_and_sizes`, in order.

    Each stands for as many neighbours: it has the key of the middle one, and the images of all. So the keys
    of all buckets fit into the driver, however many users there are.
    """
    users = len(planned_G4)
    if users <= KEYS_PER_BUCKET:
        return planned_G4
    ordered_G4 = in_order(planned_G4)
    ends = np.linspace(0, users, KEYS_PER_BUCKET + 1).astype(int)
    kept = ordered_G4[(ends[:-1] + ends[1:]) // 2]
    kept[:, 3] = np.add.reduceat(ordered_G4[:, 3], ends[:-1])
    return kept


def keys_and_sizes(decisions: list[Decision], by_urgency: bool) -> np.ndarray:
    """Return [G, 4]: the three parts of each user's render key, and their images."""
    keys = render_keys(decisions_table(decisions), by_urgency)
    sizes = np.array([decision.num_images for decision in decisions], np.float64)
    return np.stack([*(keys[name] for name in RENDER_KEY.names or ()), sizes], axis=1)


def known_users(context: RunContext, histories: Histories | None, bucket: int) -> Known:
    """Return digest and activity of the users of a bucket whom the prior knows.

    An `id` prior knows them by its table, a `history` prior by their histories. A prior without users knows
    nobody.
    """
    if context.models.user_encoder == "none":
        return {}
    files = [known_file(context.run, bucket)]
    if context.models.user_encoder == "history":
        assert histories is not None
        numbers = range(bucket, len(histories.users_of_bucket), context.num_buckets)
        files = [histories.file(number) for number in numbers]
    known: Known = {}
    for file in files:
        table = read_table(file, "users", ["user_id", "history_digest", "num_likes"])
        rows = zip(*(column.to_pylist() for column in table), strict=True)
        known |= {user: (digest, likes) for user, digest, likes in rows}
    return known


def decide_bucket(
    context: RunContext, histories: Histories | None, bucket: int, by_urgency: bool, known_damage: Damage
) -> BucketDecisions:
    """Decide on the users of one bucket, and write the decisions."""
    known = known_users(context, histories, bucket)
    requests = read_requests(context, bucket)
    previous = read_previous(context, bucket, {request.user_id for request in requests}, known_damage)
    decisions = [
        planned_if_lost(
            decide_user(context, request, known, previous.users.get(request.user_id), bucket, histories),
            previous.lost,
        )
        for request in requests
    ]
    decisions.sort(key=lambda decision: (decision.histories_bucket, decision.user_id))
    files = [write_decisions(decisions, context.run, bucket, to_plan=False)]
    to_plan = [decision for decision in decisions if decision.action in (Action.PLAN, Action.RESCORE)]
    if to_plan:
        files.append(write_decisions(to_plan, context.run, bucket, to_plan=True))
    rescored = (decision.user_id for decision in decisions if decision.action is Action.RESCORE)
    planned = [decision for decision in to_plan if decision.action is Action.PLAN]
    pool_sizes = [decision.num_images for decision in decisions if decision.action is Action.POOL]
    return BucketDecisions(
        planned_users=len(planned),
        planned=thinned(keys_and_sizes(planned, by_urgency)),
        pool_size=max(pool_sizes, default=0),
        rescored_items=sum(previous.users[user].num_items for user in rescored),
        files=files,
        last_pool=previous.users.get(POPULATION_USER),
        pool_is_lost=POPULATION_USER in previous.lost,
        damaged=previous.damaged,
    )


def planned_if_lost(decision: Decision, lost: Set[str]) -> Decision:
    """Return the decision to plan a user again whose previous items cannot be kept."""
    keeps = decision.action in (Action.CARRY, Action.RESCORE)
    return replace(decision, action=Action.PLAN) if keeps and decision.user_id in lost else decision


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
    settings = settings_for_item(
        context.settings_digest, request.item_id, request.strength, context.config.sampler.variant
    )
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
        settings_digest=hash128(settings, request.prompt, request.negative_prompt),
        priority=request.priority,
        activity=activity,
        item_id=request.item_id,
        strength=request.strength,
    )
    if cold_start and not (request.prompt or request.negative_prompt or request.item_id):
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
    planned_on = min(last.planned_on, context.date)  # a clock that was ahead counts as tonight's
    if turn(decision.user_id, context.date, refresh) != turn(decision.user_id, planned_on, refresh):
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


def decide_pool(context: RunContext, parts: list[BucketDecisions], *, pool_size: int) -> Decision | None:
    """Return the decision on the population pool; None without a cold-start user who needs it.

    The pool never shrinks: it keeps the previous size where tonight's is smaller.
    """
    if pool_size == 0:
        return None
    bucket = bucket_of(POPULATION_USER, context.num_buckets)
    last = parts[bucket].last_pool
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
    lost = {POPULATION_USER} if parts[bucket].pool_is_lost else set[str]()
    return planned_if_lost(with_action(decision, last, context), lost)


def write_decisions(decisions: list[Decision], run: Run, bucket: int, *, to_plan: bool) -> DecisionsFile:
    uri = run.decisions(bucket, "to-plan" if to_plan else "all")
    written = write_table(decisions_table(decisions), uri, row_group_size=ROWS_PER_GROUP)
    path = uri.removeprefix(f"{run.work}/")
    return DecisionsFile(bucket=bucket, to_plan=to_plan, path=path, **written)
