"""The main job: decide, plan, test the plan, render, assemble, judge, publish. Nothing is visible to a reader before the last step."""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import rebeca_ray
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.read import Snapshot, published
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.decoder.files import DecoderIdentity, identify_decoder
from rebeca_ray.errors import InputError, QualityGateError, ResumableError, StorageError
from rebeca_ray.generation.assemble import MadeOf, assemble
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.estimate import foresee, spent
from rebeca_ray.generation.gate import check_plan, refusals
from rebeca_ray.generation.plan import plan_items, request_histories
from rebeca_ray.generation.progress import Progress, watchdog
from rebeca_ray.generation.render import check_renderer, render_all, seconds_so_far
from rebeca_ray.generation.request import check_request
from rebeca_ray.generation.runs import begin, choose_run, describe_run
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.ray_runtime import bind_run, require_room, start_ray
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import delete, exists, join
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.writable import require_writable

log = logging.getLogger(__name__)

ASSEMBLE_RESERVE = (
    1.5  # of the seconds that the last assembling took: rendering stops so long before `publish_by`
)


def generate_catalog(
    config: GenerateConfig,
    *,
    resume: Resume = "auto",
    retry_failed: bool = False,
    force: bool = False,
    since: datetime.datetime | None = None,
) -> dict[str, Any]:
    """Generate and publish one snapshot; returns its manifest.

    A run of the same date that was begun from the same things and did not end is gone on with (`resume`; `require` accepts nothing
    else, `never` starts anew). `retry_failed` draws again what failed in it. `force` publishes what the quality gate refuses, and the
    manifest and the pointer say so. `limits.publish_by` is the next after `since`, or after the run began. Raises UserErrors, whose
    exit codes are the job's.
    """
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    first_ever = not exists(config.catalog)
    require_writable(config.catalog, "catalog")
    prior = load_prior(config.prior)  # a damaged one is found now, not by every actor
    published(config.catalog)  # likewise
    versions = {
        "prior": prior.fingerprint,
        "decoder": decoder.fingerprint(config.decoder),
        "code": rebeca_ray.__version__,
    }
    run_date = config.date()
    with (
        emptied_if_refused(config.catalog, first_ever),
        hold_lease(config.catalog, config.run_id or "starting", config.limits.lease_seconds) as lease,
    ):
        previous = published(config.catalog)
        described = describe_run(config, versions, previous.path if previous else None)
        run_id, begun = choose_run(config, run_date, described, resume=resume, retry_failed=retry_failed)
        lease.run_id = run_id
        start_ray()
        check_cluster(config)
        resumed = begun is not None
        begun = begun or begin(config.catalog, run_id, run_date, described)
        run = Run(
            root=config.catalog.rstrip("/"), run_date=begun["run_date"], run_id=run_id, epoch=lease.epoch
        )
        bind_run(run_id)
        if resumed:
            log.info(f"resuming run {run_id}, begun at {begun['begun_at']}")
        progress = Progress()
        begun_at = min(
            datetime.datetime.fromisoformat(begun["begun_at"]),
            since or datetime.datetime.max.replace(tzinfo=datetime.UTC),
        )
        with (
            forgotten_if_refused(run, lease, resumed=resumed),
            watchdog(progress, config.limits.stall_minutes, dump_to=run.work, on_stall=lease.release),
        ):
            manifest = make_snapshot(
                config,
                run,
                lease,
                prior,
                decoder,
                previous,
                versions,
                begun_at,
                requested,
                progress,
                retry_failed=retry_failed,
                force=force,
            )
        delete(run.work)
    return manifest


@contextmanager
def forgotten_if_refused(run: Run, lease: Lease, *, resumed: bool) -> Iterator[None]:
    """A new run that bad input ends before it has a plan leaves nothing; one that its store ends can be gone on with, and says so."""
    try:
        yield
    except Exception as error:
        found = user_error(error)
        if isinstance(found, StorageError):
            raise ResumableError(f"{found}. Start run {run.run_id} again: it resumes") from None
        if isinstance(found, InputError) and not resumed and not exists(join(run.work, "plan.json")):
            lease.check()
            delete(run.work)
        raise


@contextmanager
def emptied_if_refused(root: str, first_ever: bool) -> Iterator[None]:
    """Likewise a catalog in which that run was the first."""
    try:
        yield
    except Exception as error:
        found = user_error(error)
        if (
            isinstance(found, InputError | StorageError)
            and first_ever
            and read_pointer(root)[0] == Pointer(epoch=1)
            and not unfinished_runs(root)
        ):
            delete(root)
        raise


def make_snapshot(
    config: GenerateConfig,
    run: Run,
    lease: Lease,
    prior: TrainedPrior,
    decoder: DecoderIdentity,
    previous: Snapshot | None,
    versions: dict[str, str],
    begun_at: datetime.datetime,
    requested: int,
    progress: Progress,
    *,
    retry_failed: bool,
    force: bool,
) -> dict[str, Any]:
    """The stages, each of which a resumed run finds done or does."""
    with progress.stage("histories"):
        histories = request_histories(config, run)
    with progress.stage("decide"):
        decisions = decide_all(config, run, prior, histories, previous, versions["decoder"], progress.move)
    foreseen = foresee(config, decisions, requested, previous) if previous else None
    if foreseen:
        log.info(
            f"{foreseen.images:,} images to draw for {foreseen.planned_users:,} users; "
            f"ETA {60 * foreseen.hours:.1f} min"
        )
    plan_items(config, run, versions, histories, previous, decisions, progress)
    with progress.stage("test"):
        permutation, refused_plan = check_plan(run, config.gate)
    if refused_plan and not force:
        raise QualityGateError(
            f"{refused_plan}. Nothing was rendered or published; look at the prior's training.csv, or train it longer"
        )
    drawn_seconds = seconds_so_far(run, decisions) if config.limits.max_gpu_hours else 0.0
    deadline = deadline_of(config, begun_at, previous, drawn_seconds)
    rendered = render_all(config, run, decisions, progress, deadline=deadline, retry_failed=retry_failed)
    with progress.stage("assemble"):
        made = MadeOf(
            versions=versions,
            decoder_weights=decoder.weights,
            embed_dim=decoder.embed_dim,
            clip=prior.clip,
            num_buckets=config.layout.num_buckets,
            max_safety_probability=config.decoder.safety.max_probability,
            error_budget=config.error_budget,
        )
        parts = (read_json(join(run.work, "plan.json")) or {})["parts"]
        manifest = assemble(run, made, decisions, parts, rendered, previous, requested, progress.move)
        manifest["quality"] = {"permutation": permutation.figures() if permutation else None}
        refused = [
            *filter(None, [refused_plan]),
            *refusals(manifest, previous.manifest if previous else None, config.gate),
        ]
        manifest["gate"] = {"refused": refused, "forced": bool(refused) and force}
        manifest["measured"] = {"stages": measured(config, progress, previous)}
        manifest["foreseen"] = asdict(foreseen) if foreseen else None
        manifest["spent"] = asdict(spent(config, decisions, requested, progress, manifest["bytes_written"]))
        lease.check()
        write_json(manifest, run.manifest)
    if refused and not force:
        raise QualityGateError(
            f"run {run.run_id}: {'; '.join(refused)}. Its snapshot {run.snapshot} stays unpublished; look at it, then publish it with "
            f"`rebeca catalog publish {run.root} --run-id {run.run_id}`, or mend what is wrong"
        )
    lease.publish(run_id=run.run_id, run_date=run.run_date, snapshot=run.snapshot, forced=bool(refused))
    return {**manifest, "seconds": {name: stage["seconds"] for name, stage in progress.stages.items()}}


def check_cluster(config: GenerateConfig) -> None:
    """Raise UserError for actors that would never start, before anything is planned."""
    sampler, decoder = config.sampler, config.decoder
    require_room(
        "sampler.num_actors",
        workers=sampler.num_actors,
        cpus=sampler.cpus_per_actor,
        device=sampler.device,
        spare_cpus=1,
    )
    served = decoder.backend == "triton"  # then the GPU is the server's
    require_room(
        "decoder.num_actors",
        workers=decoder.num_actors,
        cpus=decoder.cpus_per_actor,
        device="cpu" if served else decoder.device,
        spare_cpus=1,
        decoder_slots=decoder.num_actors if served else 0,
    )
    check_renderer(decoder)


def deadline_of(
    config: GenerateConfig, begun_at: datetime.datetime, previous: Snapshot | None, drawn_seconds: float
) -> float | None:
    """When rendering must stop, in seconds since 1970: so that assembling ends by `publish_by`, or when the GPU hours are spent.

    Of those, `drawn_seconds` were spent by earlier attempts.
    """
    ends = []
    if config.limits.publish_by is not None:
        hour, minute = (int(part) for part in config.limits.publish_by.split(":"))
        end = begun_at.replace(hour=hour, minute=minute, second=0, microsecond=0)
        end += datetime.timedelta(days=end <= begun_at)
        last = previous.manifest["measured"]["stages"]["assemble"]["seconds"] if previous else 0.0
        ends.append(end.timestamp() - ASSEMBLE_RESERVE * last)
    if config.limits.max_gpu_hours is not None:
        ends.append(
            time.time() + (3600 * config.limits.max_gpu_hours - drawn_seconds) / config.decoder.num_actors
        )
    return min(ends, default=None)


def measured(
    config: GenerateConfig, progress: Progress, previous: Snapshot | None
) -> dict[str, dict[str, float]]:
    """What estimates are made from: the stages of this attempt, of those that actors did with their number.

    A stage in which there was nothing to do tells what it told the last time.
    """
    progress.pause()
    last = previous.manifest["measured"]["stages"] if previous else {}
    told = {name: {**stage} for name, stage in progress.stages.items()}
    for name, section in (("plan", config.sampler), ("render", config.decoder)):
        if told.get(name, {}).get("rows"):
            told[name]["actors"] = section.num_actors
        elif name in last:
            told[name] = last[name]
        else:
            told.pop(name, None)
    return told
