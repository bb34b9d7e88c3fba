"""The main job: decide, plan, test the plan, render, assemble, judge, publish.

No reader sees anything before the last step.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rebeca_ray.catalog.gc import adopt_runs
from rebeca_ray.catalog.layout import Run, work_folder
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.manifest import (
    GateOutcome,
    Manifest,
    manifest_version,
    write_manifest,
)
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import published
from rebeca_ray.catalog.runs import (
    read_records,
    remove_run,
    require_own_root,
    unfinished_runs,
    write_run_record,
)
from rebeca_ray.catalog.snapshots import check_user_key, require_pointer
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.data.histories import Histories
from rebeca_ray.decoder.build import check_decoder
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import (
    DamagedFilesError,
    InputError,
    QualityGateError,
    ResumableError,
    StorageError,
)
from rebeca_ray.generation.assemble import assemble, describe_snapshot
from rebeca_ray.generation.compact import MAX_FILES
from rebeca_ray.generation.context import RunContext, identify_models, with_current_versions
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.estimate import deadline_of, forecast
from rebeca_ray.generation.gate import check_plan, refusals
from rebeca_ray.generation.plan import plan_items, request_histories
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import busy_seconds, render_all
from rebeca_ray.generation.rendering.checks import check_renderer, with_choices
from rebeca_ray.generation.repair.previous import note_damage
from rebeca_ray.generation.request import check_request, input_digests, require_same_inputs
from rebeca_ray.generation.runs import (
    begin,
    choose_run,
    describe_run,
    described_inputs,
    inputs_digest,
    is_made_already,
    record_of,
)
from rebeca_ray.identity import read_user_key
from rebeca_ray.log import set_run_id
from rebeca_ray.provenance.signing import check_signing
from rebeca_ray.ray_runtime import require_room, start_ray
from rebeca_ray.storage.failures import only_warn, user_error
from rebeca_ray.storage.filesystem import delete, exists, remove_empty_folders
from rebeca_ray.storage.writable import require_writable
from rebeca_ray.telemetry import metrics
from rebeca_ray.telemetry.attempt import Attempt, generate_attempt
from rebeca_ray.telemetry.reporting import reported
from rebeca_ray.watchdog import watchdog

log = logging.getLogger(__name__)

MAX_REPAIRS = 3  # times that stages run again because files were damaged
MAX_CLOCK_DIFFERENCE = datetime.timedelta(minutes=5)  # between the machines of two nights
MAX_FILE_NUMBER = 2**31 - 1  # `items.image_file` is an int32


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A published snapshot: its manifest, and the seconds of each stage of this attempt."""

    manifest: Manifest
    seconds: dict[str, float]


@metrics.running(metrics.Command.GENERATE)
def generate_catalog(
    config: GenerateConfig,
    *,
    resume: Resume = "auto",
    retry_failed: bool = False,
    force: bool = False,
    since: datetime.datetime | None = None,
    in_process: bool = False,
) -> Generated:
    """Generate and publish one snapshot, and report the attempt however it ends.

    An unfinished run of the same date, made from the same things, is resumed. (`resume`: `require` accepts
    nothing else, `never` starts a new run.) `retry_failed` renders its failed rows again. `force` publishes a
    snapshot that the quality gate refuses; manifest and pointer record it. `limits.publish_by` is the next
    such time after `since`, or after the run began. `in_process` runs all stages in this process, without
    Ray. If the published snapshot is what this job would make, nothing is done. Raises UserErrors; their exit
    codes are the job's.
    """
    run_date = config.date(since)  # read once: the run may begin before midnight and check its input after it
    with reported(generate_attempt(config, run_date)) as attempt:
        generated = generate(
            config,
            attempt,
            since,
            resume=resume,
            retry_failed=retry_failed,
            force=force,
            in_process=in_process,
        )
        attempt.manifest = generated.manifest
    return generated


def generate(
    config: GenerateConfig,
    attempt: Attempt,
    since: datetime.datetime | None,
    *,
    resume: Resume,
    retry_failed: bool,
    force: bool,
    in_process: bool,
) -> Generated:
    """Generate and publish one snapshot, as `generate_catalog` says, and note everything in `attempt`."""
    run_date = datetime.date.fromisoformat(str(attempt.run_date))
    # Everything that bad input can break is checked before the first write.
    decoder = identify_decoder(config.decoder)
    check_signing(config.decoder)
    pinned = with_current_versions(config)
    requested = check_request(pinned, decoder)
    first_ever = not exists(config.catalog)
    require_writable(config.catalog, "catalog")
    require_own_root(config.catalog)
    require_pointer(config.catalog)
    check_user_key(config.catalog, read_user_key(config.user_key))
    config = with_choices(config, in_process)
    pinned = pinned.model_copy(update={"decoder": config.decoder})
    models = identify_models(pinned, decoder)
    published(config.catalog)
    progress = Progress()
    attempt.versions, attempt.stages = models.versions, progress.figures
    minutes = config.limits.stall_minutes
    with (
        hold_lease(config.catalog, config.run_id or "starting", config.limits.lease_seconds) as lease,
        remove_empty_catalog_on_error(config.catalog, lease, first_ever=first_ever),
        watchdog(progress, minutes, on_stall=lease.release),
    ):
        previous = published(config.catalog)
        adopt_runs(config.catalog, lease.catalog_id)
        description = describe_run(
            config, models.versions, previous.path if previous else None, input_digests(pinned)
        )
        if previous:
            attempt.previous = previous.manifest
            delete(work_folder(config.catalog, previous.run_id))  # of a run that was killed past its end
            same = is_made_already(previous.manifest, config, run_date, description)
            if same and resume != "never" and not retry_failed:
                log.info(f"run {previous.run_id} has published exactly this already: nothing is done")
                attempt.changed = False
                return Generated(manifest=previous.manifest, seconds={})
        run_id, begun = choose_run(config, run_date, description, resume=resume, retry_failed=retry_failed)
        lease.run_id = run_id
        progress.enter("check")
        check_executors(config, in_process)
        resumed = begun is not None
        begun = begun or begin(config.catalog, run_id, run_date, description)
        set_run_id(run_id)
        if resumed:
            write_run_record(config.catalog, record_of(config.catalog, begun))  # it may be damaged
            log.info(f"resuming run {run_id}, begun at {begun.begun_at}")
        context = RunContext(
            config=pinned,
            run=Run(
                root=config.catalog.rstrip("/"),
                run_date=begun.run_date,
                run_id=run_id,
                fencing_token=lease.fencing_token,
            ),
            models=models,
            previous=previous,
            requested=requested,
            # A clock that was ahead counts as now.
            began_at=min(begun.began_at, since or begun.began_at, datetime.datetime.now(datetime.UTC)),
            inputs=described_inputs(description),
            inputs_digest=inputs_digest(description),
            in_process=in_process,
        )
        attempt.run, attempt.resumed = context.run, resumed
        attempt.publish_by = context.due_at
        progress.dump_to = context.run.work
        with remove_work_on_error(context.run, lease, resumed=resumed):
            manifest = make_snapshot(context, lease, progress, retry_failed=retry_failed, force=force)
        with only_warn(f"removing {context.run.work}"):
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
            remove_run(run.root, run.run_id)
        raise


@contextmanager
def remove_empty_catalog_on_error(root: str, lease: Lease, *, first_ever: bool) -> Iterator[None]:
    """Remove a catalog that this job created, if bad input ends its first run: the pointer last."""
    try:
        yield
    except Exception as error:
        if (
            isinstance(user_error(error), InputError | StorageError)
            and first_ever
            and read_pointer(root)[0].run_id is None
            and not unfinished_runs(root)
        ):
            lease.check()
            for record in read_records(root, lease.catalog_id):
                remove_run(root, record.run_id)
            lease.remove_pointer()
            remove_empty_folders(root)
        raise


def make_snapshot(
    context: RunContext, lease: Lease, progress: Progress, *, retry_failed: bool, force: bool
) -> Manifest:
    """Run the stages one after the other. A resumed run finds some of them done.

    Stages that read a damaged file run again without it.
    """
    record_beginning(context)
    with progress.stage("histories"):
        histories = request_histories(context.config, context.run, progress)
    for _ in range(MAX_REPAIRS):
        try:
            return run_stages(context, histories, lease, progress, retry_failed=retry_failed, force=force)
        except DamagedFilesError as error:
            note_damage(context, error.reasons)
            retry_failed = retry_failed and "render" not in progress.stages  # or it was done already
    return run_stages(context, histories, lease, progress, retry_failed=retry_failed, force=force)


def run_stages(
    context: RunContext,
    histories: Histories | None,
    lease: Lease,
    progress: Progress,
    *,
    retry_failed: bool,
    force: bool,
) -> Manifest:
    """Decide, plan, test the plan, render, assemble, judge and publish."""
    config, run, previous = context.config, context.run, context.previous
    with progress.stage("decide"):
        decisions = decide_all(context, histories, progress.move)
        require_same_inputs(config, context.inputs, "this run was deciding")
        check_file_numbers(context, decisions)
        check_clock(context)
    if previous:
        expected = forecast(context, decisions)
        log.info(
            f"{expected.images:,} images to render for {expected.planned_users:,} users, "
            f"ETA {60 * expected.hours:.1f} min"
        )
    plan_items(context, histories, decisions, progress)

    with progress.stage("test"):
        permutation, refusal = check_plan(run, config.gate)
    metrics.REFUSALS.record(bool(refusal), metrics.Refused.PLAN)
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
        metrics.REFUSALS.record(len(reasons), metrics.Refused.SNAPSHOT)
        reasons = [refusal, *reasons] if refusal else reasons
        gate = GateOutcome(refused=reasons, forced=bool(reasons) and force)
        manifest = manifest.model_copy(update={"gate": gate, "catalog_id": lease.catalog_id})
        version = manifest_version(run.manifest)  # before the check: see there
        lease.check()
        write_manifest(manifest, run.root, version)
    if reasons and not force:
        raise QualityGateError(
            f"run {run.run_id}: {'; '.join(reasons)}. Its snapshot {run.snapshot} stays unpublished; "
            f"look at it, then publish it with `rebeca catalog publish {run.root} --run-id {run.run_id}`, "
            "or remove the cause"
        )
    lease.publish(run_id=run.run_id, run_date=run.run_date, snapshot=run.snapshot, forced=bool(reasons))
    metrics.record_snapshot(manifest)
    if end := context.due_at:
        metrics.LATENESS.record(time.time() - end.timestamp())
    return manifest


def record_beginning(context: RunContext) -> None:
    """Record the aims of a run, and the snapshot that it follows."""
    metrics.REQUESTED.record(context.requested)
    metrics.ERROR_BUDGET.record(context.config.error_budget)
    if context.previous:
        metrics.record_snapshot(context.previous.manifest)
    if end := context.due_at:
        metrics.PUBLISH_BY.record(end.timestamp())


def check_file_numbers(context: RunContext, decisions: Decisions) -> None:
    """Raise InputError if the numbers of image files could pass the largest int32 tonight.

    A rendered item needs at most one file, and compaction numbers MAX_FILES per bucket.
    """
    first = context.previous.manifest.next_file if context.previous else 0
    needed = decisions.planned_items + context.num_buckets * MAX_FILES
    if first + needed > MAX_FILE_NUMBER:
        raise InputError(
            f"catalog {context.run.root}: the next image file has number {first:,}, and this run may need "
            f"{needed:,} more; numbers end at {MAX_FILE_NUMBER:,}: generate into another root"
        )


def check_clock(context: RunContext) -> None:
    """Warn of a previous snapshot from the future: its dates count as tonight's."""
    now = datetime.datetime.now(datetime.UTC)
    made = context.previous.manifest.created_at if context.previous else now.isoformat()
    if datetime.datetime.fromisoformat(made) > now + MAX_CLOCK_DIFFERENCE:
        log.warning(
            f"catalog {context.run.root}: the previous snapshot was made at {made}, and it is "
            f"{now.isoformat(timespec='seconds')} now; set the clock that is wrong"
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
    check_renderer(decoder, config.limits.stall_minutes)
