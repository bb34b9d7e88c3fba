"""An attempt of a job, as its reports see it: what it is made from, how far it came, and how it ended."""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from time import perf_counter

from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Manifest, StageFigures, read_manifest
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig, TrainConfig
from rebeca_ray.config.telemetry import Event, ReportSettings
from rebeca_ray.errors import LeaseHeldError, QualityGateError, describe
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import exists
from rebeca_ray.telemetry.sending import tolerating_errors
from rebeca_ray.telemetry.summary import Failure, Job, Outcome, Safety, Summary
from rebeca_ray.telemetry.traces import span
from rebeca_ray.termination import sigterm

MOST_FAILURES = 10  # kinds of failed items in a summary
MOST_CHARACTERS = 120  # of a kind
EXIT_ERROR, EXIT_INTERRUPT, EXIT_SIGTERM = 1, 130, 143


@dataclass(kw_only=True)
class Attempt:
    """One attempt of a job. The job fills it in while it runs; the reports read it at the end."""

    job: Job
    settings: ReportSettings
    out: str  # a catalog, or the folder of a prior
    inputs: dict[str, str | None]  # locations of the input tables, by name
    run_date: str | None = None
    attempt_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    began_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    parent: "Attempt | None" = None
    run: Run | None = None
    resumed: bool = False
    publish_by: datetime | None = None
    versions: dict[str, str] = field(default_factory=dict)
    previous: Manifest | None = None
    manifest: Manifest | None = None
    changed: bool = True  # False: there was nothing to do
    runs: list[str] = field(default_factory=list)
    stages: Callable[[], dict[str, StageFigures]] = field(default=dict)
    steps: dict[str, StageFigures] = field(default_factory=dict)
    notified: set[str] = field(default_factory=set)  # errors of parts that somebody was notified of

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step of a night. A step of several dates adds up."""
        began = perf_counter()
        try:
            with span(name):
                yield
        finally:
            before = self.steps[name].seconds if name in self.steps else 0.0
            self.steps[name] = StageFigures(seconds=round(before + perf_counter() - began, 3))


def generate_attempt(config: GenerateConfig, run_date: date) -> Attempt:
    """Return an attempt at a snapshot."""
    return Attempt(
        job="generate",
        settings=config.report,
        out=config.catalog,
        run_date=run_date.isoformat(),
        inputs={
            "prior": config.prior,
            "request": config.request,
            "items": config.items,
            "interactions": config.interactions.path if config.interactions else None,
        },
    )


def training_attempt(config: TrainConfig, run_date: date | None) -> Attempt:
    """Return an attempt at a prior."""
    return Attempt(
        job="train",
        settings=config.report,
        out=config.out,
        run_date=run_date.isoformat() if run_date else None,
        inputs={
            "interactions": config.interactions.path,
            "items": config.items,
            "rated": config.catalog,
        },
    )


def night_attempt(config: NightlyConfig, run_date: date) -> Attempt:
    """Return an attempt at a night. Its parts report their tables."""
    generate = config.generate
    return Attempt(
        job="nightly",
        settings=generate.report,
        out=generate.catalog,
        run_date=run_date.isoformat(),
        inputs={},
    )


def ending(error: BaseException | None, *, changed: bool) -> tuple[Outcome, int]:
    """Return how an attempt ended, and the exit code of its job."""
    if error is None:
        return (Outcome.PUBLISHED if changed else Outcome.NOTHING_TO_DO), 0
    if isinstance(error, KeyboardInterrupt):
        return Outcome.STOPPED, EXIT_SIGTERM if sigterm.is_set() else EXIT_INTERRUPT
    reason = user_error(error)
    if isinstance(reason, QualityGateError):
        return Outcome.REFUSED, reason.exit_code
    if isinstance(reason, LeaseHeldError):
        return Outcome.HELD, reason.exit_code
    return Outcome.FAILED, reason.exit_code if reason else EXIT_ERROR


def failure_of(error: BaseException | None) -> Failure | None:
    """Return the error of an attempt in one line, None for a success."""
    if error is None:
        return None
    reason = user_error(error)
    if reason:
        return Failure(type=type(reason).__name__, message=str(reason).splitlines()[0])
    if isinstance(error, KeyboardInterrupt):
        return Failure(type="Stopped", message="stopped by a signal; run the same command again")
    message = f"unexpected: {describe(error)}; read the traceback in the log"
    return Failure(type=type(error).__name__, message=message)


def summarize(attempt: Attempt, error: BaseException | None) -> Summary:
    """Return the summary of an attempt that ended now. It lacks what cannot be read."""
    ended_at = datetime.now(UTC)
    outcome, exit_code = ending(error, changed=attempt.changed)
    manifest = attempt.manifest or refused_manifest(attempt, outcome)
    stages = {**attempt.stages(), **attempt.steps}
    render = stages.get("render")
    images = (render.rows or 0) if render else None
    late = lateness(attempt, ended_at) if outcome is Outcome.PUBLISHED else None
    stale = manifest.counts.stale_users if manifest and outcome is Outcome.PUBLISHED else 0
    run_id = attempt.run.run_id if attempt.run else manifest.run_id if manifest else None
    return Summary(
        attempt_id=attempt.attempt_id,
        parent_id=attempt.parent.attempt_id if attempt.parent else None,
        job=attempt.job,
        outcome=outcome,
        events=events_of(outcome, exit_code, late=bool(late or stale)),
        exit_code=exit_code,
        error=failure_of(error),
        out=attempt.out,
        run_id=run_id,
        run_date=attempt.run.run_date if attempt.run else attempt.run_date,
        runs=attempt.runs,
        resumed=attempt.resumed,
        began_at=attempt.began_at.isoformat(timespec="milliseconds"),
        ended_at=ended_at.isoformat(timespec="milliseconds"),
        seconds=round((ended_at - attempt.began_at).total_seconds(), 3),
        stages=stages,
        images=images,
        images_per_second=round(images / render.seconds, 3) if render and images and render.seconds else None,
        publish_by=attempt.publish_by.isoformat(timespec="seconds") if attempt.publish_by else None,
        late_seconds=late,
        versions=attempt.versions,
        previous_run_id=attempt.previous.run_id if attempt.previous else None,
    ).model_copy(update=figures_of(attempt, manifest))


def figures_of(attempt: Attempt, manifest: Manifest | None) -> dict[str, object]:
    """Return the fields of a summary that its manifest holds."""
    if manifest is None:
        return {}
    root = attempt.out.rstrip("/")
    return {
        "counts": manifest.counts,
        "failures": failures_of(root, manifest),
        "safety": Safety(checker=manifest.safety_checker, filtered=manifest.counts.filtered),
        "figures": manifest.figures,
        "permutation": manifest.quality.permutation,
        "gate": manifest.gate,
        "actual": manifest.actual,
        "bytes": manifest.bytes,
        "bytes_written": manifest.bytes_written,
        "previous_run_id": manifest.previous_run_id,
        "snapshot": f"{root}/{manifest.path}",
        "manifest": f"{root}/{manifest.path}/manifest.json",
    }


def refused_manifest(attempt: Attempt, outcome: Outcome) -> Manifest | None:
    """Return the manifest of a snapshot that this attempt assembled and the gate refused."""
    run = attempt.run
    if outcome is not Outcome.REFUSED or run is None:
        return None
    with tolerating_errors("reading the manifest of the refused snapshot"):
        if not exists(run.manifest):
            return None
        manifest = read_manifest(run.root, run.snapshot)
        return manifest if manifest.fencing_token == run.fencing_token else None
    return None


def failures_of(root: str, manifest: Manifest) -> dict[str, int]:
    """Return the number of failed items by stage and error, the most frequent first."""
    if not manifest.counts.failed:
        return {}
    counts = Counter[str]()
    with tolerating_errors("counting the failed items"):
        errors = open_snapshot(root, manifest.path).table("errors", ["stage", "error"])
        for row in errors.group_by(["stage", "error"]).aggregate([([], "count_all")]).to_pylist():
            kind = f"{row['stage']}: {' '.join(row['error'].split())}"[:MOST_CHARACTERS]
            counts[kind] += row["count_all"]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_FAILURES])


def lateness(attempt: Attempt, ended_at: datetime) -> float | None:
    """Return the seconds from `publish_by` to now, 0 before it, None without it."""
    if attempt.publish_by is None or not attempt.changed:
        return None
    return round(max(0.0, (ended_at - attempt.publish_by).total_seconds()), 3)


def events_of(outcome: Outcome, exit_code: int, *, late: bool) -> list[Event]:
    """Return the events of an attempt. Somebody who presses Ctrl-C, or starts a second run, knows it."""
    events: list[Event] = []
    if outcome is Outcome.PUBLISHED:
        events.append("success")
    if outcome is Outcome.REFUSED:
        events.append("refused")
    if outcome is Outcome.FAILED or exit_code == EXIT_SIGTERM:
        events.append("failure")
    return [*events, "late"] if late else events
