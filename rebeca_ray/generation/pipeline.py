"""The main job: decide, plan, test the plan, render, assemble, judge, publish.

No reader sees anything before the last step.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.manifest import (
    GateOutcome,
    Manifest,
    Measured,
    PermutationFigures,
    Quality,
    StageFigures,
)
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.read import Snapshot, published
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.decoder.build import check_decoder
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError, QualityGateError, ResumableError, StorageError
from rebeca_ray.evaluation.permutation import PermutationTest
from rebeca_ray.generation.assemble import Assembled, assemble
from rebeca_ray.generation.context import RunContext, identify_models
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.estimate import actual_cost, forecast
from rebeca_ray.generation.gate import check_plan, refusals
from rebeca_ray.generation.plan import plan_items, request_histories
from rebeca_ray.generation.progress import Progress, watchdog
from rebeca_ray.generation.render import busy_seconds, check_renderer, render_all
from rebeca_ray.generation.request import check_request, require_same_inputs
from rebeca_ray.generation.runs import begin, choose_run, describe_run, described_inputs
from rebeca_ray.log import set_run_id
from rebeca_ray.ray_runtime import require_room, start_ray
from rebeca_ray.schemas import SCHEMA_VERSION
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import delete, exists
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.writable import require_writable

log = logging.getLogger(__name__)

ASSEMBLE_RESERVE = 1.5  # times the last assembling: rendering stops so long before `publish_by`


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A published snapshot: its manifest, and the seconds of each stage of this attempt."""

    manifest: Manifest
    seconds: dict[str, float]


def generate_catalog(
    config: GenerateConfig,
    *,
    resume: Resume = "auto",
    retry_failed: bool = False,
    force: bool = False,
    since: datetime.datetime | None = None,
    in_process: bool = False,
) -> Generated:
    """Generate and publish one snapshot.

    An unfinished run of the same date, made from the same things, is resumed. (`resume`: `require` accepts
    nothing else, `never` starts a new run.) `retry_failed` renders its failed rows again. `force` publishes a
    snapshot that the quality gate refuses; manifest and pointer record it. `limits.publish_by` is the next
    such time after `since`, or after the run began. `in_process` runs all stages in this process, without
    Ray. Raises UserErrors; their exit codes are the job's.
    """
    # Everything that bad input can break is checked before the first write.
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    first_ever = not exists(config.catalog)
    require_writable(config.catalog, "catalog")
    models = identify_models(config, decoder)
    published(config.catalog)
    with (
        remove_empty_catalog_on_error(config.catalog, first_ever),
        hold_lease(config.catalog, config.run_id or "starting", config.limits.lease_seconds) as lease,
    ):
        previous = published(config.catalog)
        description = describe_run(config, models.versions, previous.path if previous else None)
        run_id, begun = choose_run(
            config, config.date(), description, resume=resume, retry_failed=retry_failed
        )
        lease.run_id = run_id
        check_executors(config, in_process)
        resumed = begun is not None
        begun = begun or begin(config.catalog, run_id, config.date(), description)
        set_run_id(run_id)
        if resumed:
            log.info(f"resuming run {run_id}, begun at {begun.begun_at}")
        context = RunContext(
            config=config,
            run=Run(
                root=config.catalog.rstrip("/"),
                run_date=begun.run_date,
                run_id=run_id,
                fencing_token=lease.fencing_token,
            ),
            models=models,
            previous=previous,
            requested=requested,
            began_at=min(begun.began_at, since or begun.began_at),
            inputs=described_inputs(description),
            in_process=in_process,
        )
        progress = Progress()
        with (
            remove_work_on_error(context.run, lease, resumed=resumed),
            watchdog(progress, config.limits.stall_minutes, dump_to=context.run.work, on_stall=lease.release),
        ):
            manifest = make_snapshot(context, lease, progress, retry_failed=retry_failed, force=force)
        delete(context.run.work)
    seconds = {name: stage.seconds for name, stage in progress.stages.items()}
    return Generated(manifest=manifest, seconds=seconds)


def check_executors(config: GenerateConfig, in_process: bool) -> None:
    """Start Ray and check that all actors can start; in this process, check the decoder alone."""
    if in_process:
        check_decoder(config.decoder)
        return
    start_ray()
    check_cluster(config)


@contextmanager
def remove_work_on_error(run: Run, lease: Lease, *, resumed: bool) -> Iterator[None]:
    """Remove the work of a new run that bad input ends before it has a plan.

    A run that its store ends can be resumed. Its error says so.
    """
    try:
        yield
    except Exception as error:
        cause = user_error(error)
        if isinstance(cause, StorageError):
            raise ResumableError(f"{cause}. Start run {run.run_id} again: it resumes") from None
        if isinstance(cause, InputError) and not resumed and not exists(run.plan_marker):
            lease.check()
            delete(run.work)
        raise


@contextmanager
def remove_empty_catalog_on_error(root: str, first_ever: bool) -> Iterator[None]:
    """Remove a catalog that this job created, if bad input ends its first run."""
    try:
        yield
    except Exception as error:
        if (
            isinstance(user_error(error), InputError | StorageError)
            and first_ever
            and read_pointer(root)[0] == Pointer(fencing_token=1)
            and not unfinished_runs(root)
        ):
            delete(root)
        raise


def make_snapshot(
    context: RunContext, lease: Lease, progress: Progress, *, retry_failed: bool, force: bool
) -> Manifest:
    """Run the stages one after the other. A resumed run finds some of them done."""
    config, run, previous = context.config, context.run, context.previous
    with progress.stage("histories"):
        histories = request_histories(config, run)
    with progress.stage("decide"):
        decisions = decide_all(context, histories, progress.move)
        require_same_inputs(config, context.inputs, "this run was deciding")
    if previous:
        expected = forecast(context, decisions)
        log.info(
            f"{expected.images:,} images to render for {expected.planned_users:,} users, "
            f"ETA {60 * expected.hours:.1f} min"
        )
    plan_items(context, histories, decisions, progress)

    with progress.stage("test"):
        permutation, refusal = check_plan(run, config.gate)
    if refusal and not force:
        raise QualityGateError(
            f"{refusal}. Nothing was rendered or published; "
            "look at the prior's training.csv, or train it longer"
        )
    spent = busy_seconds(run, decisions) if config.limits.max_gpu_hours else 0.0
    rendered = render_all(
        context, decisions, progress, deadline=deadline_of(context, spent), retry_failed=retry_failed
    )
    with progress.stage("assemble"):
        assembled = assemble(context, decisions, rendered, progress.move)
        manifest = describe_snapshot(context, decisions, assembled, permutation, progress)
        reasons = refusals(manifest, previous.manifest if previous else None, config.gate)
        reasons = [refusal, *reasons] if refusal else reasons
        gate = GateOutcome(refused=reasons, forced=bool(reasons) and force)
        manifest = manifest.model_copy(update={"gate": gate})
        lease.check()
        write_json(manifest.model_dump(), run.manifest)
    if reasons and not force:
        raise QualityGateError(
            f"run {run.run_id}: {'; '.join(reasons)}. Its snapshot {run.snapshot} stays unpublished; "
            f"look at it, then publish it with `rebeca catalog publish {run.root} --run-id {run.run_id}`, "
            "or remove the cause"
        )
    lease.publish(run_id=run.run_id, run_date=run.run_date, snapshot=run.snapshot, forced=bool(reasons))
    return manifest


def describe_snapshot(
    context: RunContext,
    decisions: Decisions,
    assembled: Assembled,
    permutation: PermutationTest | None,
    progress: Progress,
) -> Manifest:
    """Return the manifest of an assembled snapshot, before the gate judges it."""
    run, previous, models = context.run, context.previous, context.models
    stages = measured_stages(context.config, progress, previous)  # first: the cost counts this stage too
    quality = Quality()
    if permutation:
        quality = Quality(permutation=PermutationFigures.model_validate(permutation.figures()))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        run_id=run.run_id,
        run_date=run.run_date,
        fencing_token=run.fencing_token,
        created_at=assembled.created_at.isoformat(timespec="seconds"),
        previous_run_id=previous.run_id if previous else None,
        previous_path=previous.path if previous else None,
        counts=assembled.counts,
        decisions=assembled.decisions,
        carried_buckets=assembled.carried_buckets,
        figures=assembled.figures,
        versions=models.versions,
        decoder_weights=models.decoder_weights,
        embed_dim=models.embed_dim,
        clip_fingerprint=models.clip_fingerprint,
        num_buckets=context.num_buckets,
        next_file=assembled.next_file,
        bytes=assembled.bytes,
        bytes_written=assembled.bytes_written,
        files=assembled.files,
        quality=quality,
        measured=Measured(stages=stages),
        forecast=forecast(context, decisions) if previous else None,
        actual=actual_cost(context, decisions, progress, assembled.bytes_written),
    )


def check_cluster(config: GenerateConfig) -> None:
    """Raise InputError for actors that would never start, before anything is planned."""
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


def deadline_of(context: RunContext, spent_seconds: float) -> float | None:
    """Return when rendering must stop, in seconds since 1970; None without a limit.

    Assembling must end by `publish_by`, and the GPU hours must last. Earlier attempts used `spent_seconds` of
    the latter.
    """
    limits, previous = context.config.limits, context.previous
    ends = []
    if limits.publish_by is not None:
        hour, minute = (int(part) for part in limits.publish_by.split(":"))
        end = context.began_at.replace(hour=hour, minute=minute, second=0, microsecond=0)
        end += datetime.timedelta(days=end <= context.began_at)
        last = previous.manifest.measured.stages["assemble"].seconds if previous else 0.0
        ends.append(end.timestamp() - ASSEMBLE_RESERVE * last)
    if limits.max_gpu_hours is not None:
        remaining = 3600 * limits.max_gpu_hours - spent_seconds
        ends.append(time.time() + remaining / context.config.decoder.num_actors)
    return min(ends, default=None)


def measured_stages(
    config: GenerateConfig, progress: Progress, previous: Snapshot | None
) -> dict[str, StageFigures]:
    """Return the stages that the next forecast is made from. A stage without work keeps its last figures."""
    progress.pause()
    last = previous.manifest.measured.stages if previous else {}
    stages = {name: stage.figures() for name, stage in progress.stages.items()}
    for name, section in (("plan", config.sampler), ("render", config.decoder)):
        if name in progress.stages and progress.stages[name].rows:
            stages[name] = progress.stages[name].figures(section.num_actors)
        elif name in last:
            stages[name] = last[name]
        else:
            stages.pop(name, None)
    return stages
