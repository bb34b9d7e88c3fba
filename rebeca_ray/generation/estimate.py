"""What a run will take, from the request and from what the last run measured; and what it took, in the same words."""

from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil

from rebeca_ray.catalog.layout import Run, new_run_id
from rebeca_ray.catalog.read import Snapshot, published
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.decide import Decisions, decide_all
from rebeca_ray.generation.parts import BUSY
from rebeca_ray.generation.plan import request_histories
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.request import check_request
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.storage.filesystem import delete, join
from rebeca_ray.storage.objects import write_json

HOUR, GIB = 3600, 2**30
OTHERS = ("histories", "decide", "test", "assemble")
TABLES_PER_BUCKET = 4 + 3  # of the snapshot; and private ones


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds are of the clock on the wall; `requests` are writes to the store; `cost` is in the currency of `prices`."""

    requested_items: int
    planned_users: int
    images: int
    plan_seconds: float
    render_seconds: float
    other_seconds: float  # deciding, testing, assembling
    hours: float
    gpu_hours: float
    cpu_hours: float
    bytes_written: int
    requests: int
    cost: float


def estimate(config: GenerateConfig, *, images_per_second: float | None = None) -> Estimate:
    """What `generate_catalog` would take tonight on the actors that `config` names. Nothing is drawn; what it writes it removes,
    but for embeddings of rated items, which the next run would look up too.

    Raises UserError for bad input, and if neither `images_per_second` (of one decoder actor) is given nor a run measured it.
    """
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    previous = published(config.catalog)
    if previous is None and images_per_second is None:
        raise InputError(
            f"catalog {config.catalog}: no run has measured anything there yet; give --images-per-second of one decoder actor, "
            "or generate for a few users first"
        )
    run = Run(
        root=config.catalog.rstrip("/"),
        run_date=config.date().isoformat(),
        run_id=f"estimate-{new_run_id()}",
        epoch=0,
    )
    note = {
        "run_id": run.run_id,
        "run_date": "estimate",
        "begun_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "described": {},
    }
    write_json(note, join(run.work, "run.json"))  # so that no collection takes it meanwhile
    try:
        histories = request_histories(config, run)
        decisions = decide_all(
            config,
            run,
            load_prior(config.prior),
            histories,
            previous,
            decoder.fingerprint(config.decoder),
            lambda: None,
        )
    finally:
        delete(run.work)
    return foresee(config, decisions, requested, previous, images_per_second)


def foresee(
    config: GenerateConfig,
    decisions: Decisions,
    requested: int,
    previous: Snapshot | None,
    images_per_second: float | None = None,
) -> Estimate:
    """From decisions that are made. A stage takes what starting it took last time, and its share of the work for each actor."""
    stages = previous.manifest["measured"]["stages"] if previous else {}
    batch, actors = config.decoder.batch_size, config.decoder.num_actors
    images = decisions.planned_items
    render = seconds_of(stages.get("render"), padded(images, batch, actors), actors, images_per_second, batch)
    plan = seconds_of(stages.get("plan"), images, config.sampler.num_actors, None, 1)
    last_requested = previous.manifest["counts"]["requested"] if previous else requested
    other = sum(stages[name]["seconds"] for name in OTHERS if name in stages) * max(
        1.0, requested / last_requested
    )
    image_rows = [row for row in previous.files.to_pylist() if row["table"] == "images"] if previous else []
    bytes_an_image = sum(row["bytes"] for row in image_rows) / max(1, sum(row["rows"] for row in image_rows))
    return priced(
        config,
        requested_items=requested,
        planned_users=decisions.planned_users,
        images=images,
        seconds=(plan if images else 0.0, render if images else 0.0, other),
        bytes_written=int(images * bytes_an_image + tables_bytes(previous) * requested / last_requested),
    )


def seconds_of(
    stage: dict[str, float] | None, rows: int, actors: int, rows_per_second: float | None, batch: int
) -> float:
    """Seconds of a stage that actors do: what it took to start them, then the rows at their rate."""
    if stage is None:
        return rows / (rows_per_second * actors) if rows_per_second else 0.0
    last_actors = int(stage["actors"])
    start = max(0.0, stage["seconds"] - stage[BUSY] / last_actors)
    rate = rows_per_second or padded(int(stage["rows"]), batch, last_actors) / stage[BUSY]
    return start + rows / (rate * actors)


def padded(rows: int, batch: int, actors: int) -> int:
    """Rows as they are computed: in whole batches, and no fewer on the actor that has the most."""
    return ceil(rows / batch / actors) * batch * actors if rows else 0


def tables_bytes(previous: Snapshot | None) -> int:
    return (
        sum(row["bytes"] for row in previous.files.to_pylist() if row["table"] != "images") if previous else 0
    )


def spent(
    config: GenerateConfig, decisions: Decisions, requested: int, progress: Progress, bytes_written: int
) -> Estimate:
    """The same figures of a run that is done."""
    seconds = {name: stage["seconds"] for name, stage in progress.stages.items()}
    other = sum(seconds.get(name, 0.0) for name in OTHERS)
    return priced(
        config,
        requested_items=requested,
        planned_users=decisions.planned_users,
        images=int(progress.stages.get("render", {}).get("rows", 0)),
        seconds=(seconds.get("plan", 0.0), seconds.get("render", 0.0), other),
        bytes_written=bytes_written,
    )


def priced(
    config: GenerateConfig,
    *,
    requested_items: int,
    planned_users: int,
    images: int,
    seconds: tuple[float, float, float],
    bytes_written: int,
) -> Estimate:
    """Hours of actors, requests and money follow from seconds, images and bytes."""
    plan, render, other = seconds
    gpu = cpu = 0.0
    for section, took in ((config.sampler, plan), (config.decoder, render)):
        hours = section.num_actors * took / HOUR
        gpu += hours if section.device == "cuda" else 0.0
        cpu += hours * section.cpus_per_actor
    files = 2 * ceil(images / config.layout.images_per_file)  # each with its record
    requests = files + TABLES_PER_BUCKET * config.layout.num_buckets
    prices = config.prices
    cost = (
        gpu * prices.gpu_hour
        + cpu * prices.cpu_hour
        + bytes_written / GIB * prices.gib_month
        + requests / 1e6 * prices.million_requests
    )
    return Estimate(
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
