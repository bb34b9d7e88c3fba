"""Estimate a run before it starts: decide as the run would, and forecast its cost. Tell when it must stop."""

import time
from datetime import UTC, datetime
from math import ceil

from rebeca_ray.catalog.layout import Run, new_run_id
from rebeca_ray.catalog.manifest import Cost, StageFigures
from rebeca_ray.catalog.read import published
from rebeca_ray.catalog.runs import BegunRun, remove_run, write_begun, write_run_record
from rebeca_ray.catalog.snapshots import check_user_key
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.context import RunContext, identify_models, with_current_versions
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.plan import request_histories
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.rendering.checks import with_choices
from rebeca_ray.generation.request import check_request
from rebeca_ray.generation.runs import record_of
from rebeca_ray.identity import read_user_key

ASSEMBLE_RESERVE = 1.5  # times the last assembling: rendering stops so long before `publish_by`


def estimate(config: GenerateConfig, *, images_per_second: float | None = None) -> Cost:
    """Forecast the cost of `generate_catalog` tonight on the actors that `config` names.

    Nothing is sampled. Everything it writes it removes, except embeddings of rated items, which the next run
    needs too. Raises InputError for bad input, and without `images_per_second` (of one decoder actor) if no
    run measured it.
    """
    if images_per_second is not None and not images_per_second > 0:
        raise InputError(f"images_per_second {images_per_second}: must be more than 0")
    config = with_choices(with_current_versions(config), in_process=False)
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    previous = published(config.catalog)
    check_user_key(config.catalog, read_user_key(config.user_key))
    if previous is None and images_per_second is None:
        raise InputError(
            f"catalog {config.catalog}: no run has measured anything there yet; "
            "give --images-per-second of one decoder actor, or generate for a few users first"
        )
    now = datetime.now(UTC)
    context = RunContext(
        config=config,
        run=Run(
            root=config.catalog.rstrip("/"),
            run_date=config.date().isoformat(),
            run_id=f"estimate-{new_run_id()}",
            fencing_token=0,
        ),
        models=identify_models(config, decoder),
        previous=previous,
        requested=requested,
        began_at=now,
    )
    # With `run.json`, no garbage collection takes the work folder meanwhile. With a record, a later one does.
    begun_at = now.isoformat(timespec="seconds")
    record = BegunRun(run_id=context.run.run_id, run_date="estimate", begun_at=begun_at, described={})
    write_run_record(config.catalog, record_of(config.catalog, record))
    write_begun(config.catalog, record)
    try:
        histories = request_histories(config, context.run)
        decisions = decide_all(context, histories, lambda: None)
    finally:
        remove_run(config.catalog, context.run.run_id)
    return forecast(context, decisions, images_per_second)


HOUR, GIB = 3600, 2**30
OTHER_STAGES = ("histories", "decide", "share", "test", "assemble")
TABLES_PER_BUCKET = 4 + 3  # published, and private


def forecast(context: RunContext, decisions: Decisions, images_per_second: float | None = None) -> Cost:
    """Forecast a run. A stage takes the time its start took last time, and each actor's part of the work."""
    config, previous = context.config, context.previous
    stages = previous.manifest.measured.stages if previous else {}
    batch, actors = config.decoder.batch_size, config.decoder.num_actors
    images = decisions.planned_items
    render = seconds_of(stages.get("render"), padded(images, batch, actors), actors, images_per_second, batch)
    planned = images + decisions.rescored_items
    plan = seconds_of(stages.get("plan"), planned, config.sampler.num_actors, None, 1)

    # Stages without actors, and the tables, grow with the request.
    growth = context.requested / previous.manifest.counts.requested if previous else 1.0
    other = sum(stages[name].seconds for name in OTHER_STAGES if name in stages) * max(1.0, growth)
    files = previous.files.to_pylist() if previous else []
    image_files = [row for row in files if row["table"] == "images"]
    tables_bytes = sum(row["bytes"] for row in files if row["table"] != "images")
    bytes_per_image = sum(row["bytes"] for row in image_files) / max(
        1, sum(row["rows"] for row in image_files)
    )
    return priced(
        config,
        requested_items=context.requested,
        planned_users=decisions.planned_users,
        images=images,
        seconds=(plan if planned else 0.0, render if images else 0.0, other),
        bytes_written=int(images * bytes_per_image + tables_bytes * growth),
    )


def actual_cost(context: RunContext, decisions: Decisions, progress: Progress, bytes_written: int) -> Cost:
    """Return the cost of a run that is done."""
    seconds = {name: stage.seconds for name, stage in progress.stages.items()}
    rendered = progress.stages["render"].rows if "render" in progress.stages else 0
    return priced(
        context.config,
        requested_items=context.requested,
        planned_users=decisions.planned_users,
        images=rendered or 0,
        seconds=(
            seconds.get("plan", 0.0),
            seconds.get("render", 0.0),
            sum(seconds.get(name, 0.0) for name in OTHER_STAGES),
        ),
        bytes_written=bytes_written,
    )


def seconds_of(
    stage: StageFigures | None, rows: int, actors: int, rows_per_second: float | None, batch: int
) -> float:
    """Return the seconds of a stage with actors: the time to start them, then the rows at their rate."""
    if stage is None:
        return rows / (rows_per_second * actors) if rows_per_second else 0.0
    assert stage.actors
    assert stage.rows
    assert stage.busy_seconds
    start = max(0.0, stage.seconds - stage.busy_seconds / stage.actors)
    rate = rows_per_second or padded(stage.rows, batch, stage.actors) / stage.busy_seconds
    return start + rows / (rate * actors)


def padded(rows: int, batch: int, actors: int) -> int:
    """Return rows as they are computed: in whole batches, the same number on every actor."""
    return ceil(rows / batch / actors) * batch * actors if rows else 0


def priced(
    config: GenerateConfig,
    *,
    requested_items: int,
    planned_users: int,
    images: int,
    seconds: tuple[float, float, float],
    bytes_written: int,
) -> Cost:
    """Return the cost that follows from seconds (of plan, render, and the rest), images and bytes."""
    plan, render, other = seconds
    gpu = cpu = 0.0
    for section, stage_seconds in ((config.sampler, plan), (config.decoder, render)):
        hours = section.num_actors * stage_seconds / HOUR
        gpu += hours if section.device == "cuda" else 0.0
        cpu += hours * section.cpus_per_actor
    image_files = 2 * ceil(images / config.layout.images_per_file)  # each with its record
    requests = image_files + TABLES_PER_BUCKET * config.layout.num_buckets
    prices = config.prices
    cost = (
        gpu * prices.gpu_hour
        + cpu * prices.cpu_hour
        + bytes_written / GIB * prices.gib_month
        + requests / 1e6 * prices.million_requests
    )
    return Cost(
        requested_items=requested_items,
        planned_users=planned_users,
        images=images,
        plan_seconds=round(plan, 1),
        render_seconds=round(render, 1),
        other_seconds=round(other, 1),
        hours=round(sum(seconds) / HOUR, 4),
        gpu_hours=round(gpu, 4),
        cpu_hours=round(cpu, 4),
        bytes_written=bytes_written,
        requests=requests,
        cost=round(cost, 2),
    )


def deadline_of(context: RunContext, spent_seconds: float) -> float | None:
    """Return when rendering must stop, in seconds since 1970; None without a limit.

    Assembling must end by `publish_by`, and the GPU hours must last. Earlier attempts used `spent_seconds` of
    the latter.
    """
    limits, previous = context.config.limits, context.previous
    ends = []
    if end := context.due_at:
        last = previous.manifest.measured.stages["assemble"].seconds if previous else 0.0
        ends.append(end.timestamp() - ASSEMBLE_RESERVE * last)
    if limits.max_gpu_hours is not None:
        remaining = 3600 * limits.max_gpu_hours - spent_seconds
        ends.append(time.time() + remaining / context.config.decoder.num_actors)
    return min(ends, default=None)
