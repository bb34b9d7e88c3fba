"""Plan: users become planned items, each with the embedding to decode. One Ray Data graph.

decisions, bucket by bucket -> planning/planner.py, in actors -> work/…/plan
"""

import logging
from dataclasses import asdict, replace

import numpy as np

from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.data.feedback import find_rated
from rebeca_ray.data.histories import Histories, build_histories
from rebeca_ray.data.items import embedded_with, open_items, read_item_ids
from rebeca_ray.errors import ResumableError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.parts import NOT_RENDERED, PartRecord, WriteParts
from rebeca_ray.generation.planning.keys import users_per_batch
from rebeca_ray.generation.progress import Progress
from rebeca_ray.storage.filesystem import delete, join
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import damage_among, read_record, write_record
from rebeca_ray.telemetry import metrics
from rebeca_ray.watchdog import Activity

log = logging.getLogger(__name__)

ITEMS_PER_FILE = 20_000
BATCHES_PER_BLOCK = 16  # a second of a GPU; a block costs the driver 20 ms


def plan_items(
    context: RunContext, histories: Histories | None, decisions: Decisions, progress: Progress
) -> None:
    """Write the run's plan, `shard=<s>/bucket=<b>/`. Every item of a planned user becomes exactly one row.

    A complete plan is never made again: a resumed run reads it, if it is intact. Raises InputError if the
    prior was replaced meanwhile, ResumableError for a plan that lacks rows.
    """
    run, config = context.run, context.config
    if has_plan(run, decisions):
        return
    # Here, since they load torch: a driver without a plan to make, and the workers that write, do without.
    from rebeca_ray.generation.planning.planner import PlanUsers
    from rebeca_ray.generation.sharing.planned import share_images

    for folder in (run.plan, join(run.work, "shards")):
        delete(folder)  # of an attempt that died, or of a plan that differs
    files = [join(run.work, file.path) for file in decisions.to_plan]
    rescored_from = context.previous if decisions.rescored_items else None
    planner = Stage(
        name=metrics.Stage.PLAN,
        work=PlanUsers,
        # Each actor gets a copy of these, so without the long lists of files.
        arguments=(
            config,
            context.versions,
            histories,
            rescored_from and rescored_from.only("items"),
            replace(decisions, files=[], damaged={}),
            context.inputs.get("items"),
        ),
        batch_size=users_per_batch(config),
        rows_per_block=BATCHES_PER_BLOCK * users_per_batch(config),
        actors=Actors(
            count=config.sampler.num_actors,
            cpus=config.sampler.cpus_per_actor,
            gpus=1 if config.sampler.device == "cuda" else 0,
        ),
    )
    writer = WriteParts(
        root=run.work,
        folder="plan",
        by=("shard", "bucket"),
        fencing_token=run.fencing_token,
        row_group_size=ITEMS_PER_FILE,
    )
    records: list[PartRecord] = []
    if files:
        stages = [planner, Stage(work=writer, batch_size=ITEMS_PER_FILE)]
        pulse = None if context.in_process else progress.listen()
        batches = run_graph(files, stages, in_process=context.in_process, pulse=pulse)
        total = decisions.planned_items + decisions.rescored_items
        records = progress.follow("plan", batches, total=total, actors=config.sampler.num_actors)
    if problem := missing_rows(records, decisions):
        raise ResumableError(f"run {run.run_id}: {problem}; nothing is published, start it again to resume")
    records = share_images(context, decisions, records, progress, ITEMS_PER_FILE)
    write_record(
        {"decisions": decisions.fingerprint(), "parts": [asdict(record) for record in records]},
        run.plan_marker,
    )


def has_plan(run: Run, decisions: Decisions) -> bool:
    """Return whether the run has a complete and intact plan of these decisions."""
    values = read_record(run.plan_marker)
    if values is None or values["decisions"] != decisions.fingerprint():
        return False
    parts = read_plan(run)
    problem = missing_rows(parts, decisions)
    for path, reason in damage_among(run.work, parts).items():
        problem = f"{join(run.work, path)}: {reason}"
    if problem:
        log.warning(f"{problem}; all items are planned again")
    return problem is None


def missing_rows(parts: list[PartRecord], decisions: Decisions) -> str | None:
    """Return the difference between the rows of a plan and the items that were decided on; None if equal."""
    rows = {NOT_RENDERED: 0, 0: 0}
    for part in parts:
        rows[part.shard if part.shard == NOT_RENDERED else 0] += part.rows
    expected = {NOT_RENDERED: decisions.rescored_items, 0: decisions.planned_items}
    if rows == expected:
        return None
    return (
        f"the plan has {rows[0]:,} new and {rows[NOT_RENDERED]:,} rescored items, "
        f"expected {expected[0]:,} and {expected[NOT_RENDERED]:,}"
    )


def read_plan(run: Run) -> list[PartRecord]:
    """Return the records of a complete plan. Raises ResumableError without one."""
    values = read_record(run.plan_marker)
    if values is None:
        raise ResumableError(f"{run.plan_marker}: is missing or damaged; expected the plan; start again")
    return [PartRecord.from_dict(part) for part in values["parts"]]


def request_histories(config: GenerateConfig, run: Run, activity: Activity | None = None) -> Histories | None:
    """Return all ratings of the users, in parts of the catalog's buckets.

    Returns None if the config gives no interactions. Generated items that were rated are numbered after the
    real ones. Progress is noted in `activity`.
    """
    if config.interactions is None or config.items is None:
        return None
    everything = config.interactions.for_serving(hide_hold_out=config.hide_hold_out)
    items = open_items(config.items)
    item_id, rated_id, rated_uri = read_item_ids(items), np.array([], object), None
    generated = find_rated(config.catalog, config.interactions, item_id, *embedded_with(items))
    if generated.num_rows:
        rated_id = generated["item_id"].to_numpy(zero_copy_only=False)
        rated_uri = join(run.work, "rated.parquet")
        write_table(generated, rated_uri, row_group_size=ITEMS_PER_FILE, embed_column="image_embeds")
    histories = build_histories(
        everything,
        np.concatenate([item_id, rated_id]),
        run.work,
        multiple_of=config.layout.num_buckets,
        activity=activity,
        catalog=config.catalog,
    )
    return replace(histories, rated=rated_uri)
