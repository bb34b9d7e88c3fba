"""Assemble one snapshot, bucket by bucket.

decisions + plan + images + previous snapshot -> items, users, errors, changes -> the file list

Every item is accounted for: requested = new + carried + population + failed + filtered, and deferred where
time ran out before a user's first items. Each is counted by itself (outcomes.py).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import OUTCOMES
from rebeca_ray.catalog.figures import GateFigures, figures_of
from rebeca_ray.catalog.file_list import write_file_list
from rebeca_ray.catalog.layout import POPULATION_USER, Run
from rebeca_ray.catalog.manifest import (
    Counts,
    DecisionCounts,
    FileList,
    FileRow,
    Manifest,
    Measured,
    PermutationFigures,
    Quality,
    StageFigures,
)
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import (
    DamagedFilesError,
    ErrorBudgetExceededError,
    InputError,
    QualityGateError,
    ResumableError,
)
from rebeca_ray.evaluation.permutation import PermutationTest
from rebeca_ray.generation.assembly import Assembly, BucketInput, BucketResult, ImageFile, Pool
from rebeca_ray.generation.bucket import Bucket, UnrenderedItemsError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Action, Decisions
from rebeca_ray.generation.estimate import actual_cost, forecast
from rebeca_ray.generation.outcomes import COUNTED, num_filtered
from rebeca_ray.generation.parts import PartRecord, num_shared
from rebeca_ray.generation.plan import read_plan
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import Rendered
from rebeca_ray.generation.repair.previous import damage_of_tables
from rebeca_ray.identity import read_user_key
from rebeca_ray.ray_runtime import for_each
from rebeca_ray.schemas import SCHEMA_VERSION
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.storage.records import damaged_files

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """The tables of a snapshot, written and counted. The manifest is made of it."""

    created_at: datetime
    counts: Counts
    decisions: DecisionCounts
    carried_buckets: int
    figures: GateFigures
    next_file: int
    bytes: int
    bytes_written: int
    files: FileList


def assemble(
    context: RunContext, decisions: Decisions, rendered: Rendered, on_progress: Callable[[], None]
) -> Assembled:
    """Write the snapshot's tables and its file list.

    Raises ResumableError if an item is unaccounted for, DamagedFilesError for files that must be made again,
    ErrorBudgetExceededError if too many items failed, QualityGateError if none is fit to be shown.
    """
    inputs = inputs_of(context, decisions, rendered)
    work = assembly_of(context, decisions, rendered, inputs)

    def assemble_bucket(bucket: BucketInput) -> BucketResult:
        try:
            return Bucket.read(work, bucket).assemble()
        except DamagedFilesError as error:
            return BucketResult(files=[], images=[], counts={}, sums={}, live_rows={}, damaged=error.reasons)
        except InputError:  # of a reader, which did not compare the whole file
            if context.previous is None:
                raise
            damaged = damage_of_tables(context.previous, context, bucket.bucket)
            if not damaged.keys() - work.damaged.keys():
                raise
            return BucketResult(files=[], images=[], counts={}, sums={}, live_rows={}, damaged=damaged)

    results = for_each(assemble_bucket, inputs, on_progress, name="assemble", in_process=context.in_process)
    if damaged := {path: reason for result in results for path, reason in result.damaged.items()}:
        raise damaged_files(damaged)
    if unrendered := sum(result.unrendered for result in results):
        raise incomplete(
            context.run, f"{unrendered:,} of {decisions.planned_items:,} planned items were not rendered"
        )
    counts = check_counts(context, results)
    check_failures(context, counts, results)
    if counts.published == 0 and not counts.deferred:
        raise QualityGateError(
            f"run {context.run.run_id}: not one of {counts.requested} items has an image fit to be shown; "
            "look at decoder.safety. Nothing is published"
        )
    images = image_rows(context, [file for bucket in inputs for file in bucket.files], results)
    tables = [row for result in results for row in result.files]
    rows = sorted(tables + images, key=lambda row: (row["table"], row["bucket"], row["file"]))
    run = context.run
    return Assembled(
        created_at=work.now,
        counts=counts,
        decisions=DecisionCounts(
            planned_users=decisions.planned_users,
            planned_items=decisions.planned_items,
            shards=decisions.shards,
            shared_items=num_shared([part for bucket in inputs for part in bucket.parts]),
        ),
        carried_buckets=sum(result.by_reference for result in results),
        figures=figures_of(
            counts.requested, counts.failed, counts.filtered, [result.sums for result in results]
        ),
        next_file=1 + max([work.first_file - 1, *(row["file"] for row in images)]),
        bytes=sum(row["bytes"] for row in rows),
        bytes_written=sum(row["bytes"] for row in rows if f"run_id={run.run_id}/" in row["path"]),
        files=write_file_list(run.root, run.snapshot, run.fencing_token, rows),
    )


def inputs_of(context: RunContext, decisions: Decisions, rendered: Rendered) -> list[BucketInput]:
    """Number the image files, and give each bucket its decisions, its part of the plan and its images."""
    first = context.previous.manifest.next_file if context.previous else 0
    parts, files = defaultdict[int, list[PartRecord]](list), defaultdict[int, list[ImageFile]](list)
    for part in read_plan(context.run):
        parts[part.bucket].append(part)
    for index, record in enumerate(sorted(rendered.files, key=lambda record: record.path)):
        files[record.bucket].append(ImageFile(number=first + index, record=record))
    decided = {file.bucket: file for file in decisions.files if not file.to_plan}
    return [
        BucketInput(bucket=bucket, decided=decided[bucket], parts=parts[bucket], files=files[bucket])
        for bucket in range(context.num_buckets)
    ]


def assembly_of(
    context: RunContext, decisions: Decisions, rendered: Rendered, inputs: list[BucketInput]
) -> Assembly:
    """Put together the inputs that all buckets share, the population pool among them."""
    first = context.previous.manifest.next_file if context.previous else 0
    work = Assembly(
        context=context,
        timed_out=rendered.timed_out,
        now=datetime.now(UTC),
        metadata=file_metadata(context.versions),
        first_file=first,
        first_compacted=first + len(rendered.files),
        pool_decision=decisions.pool,
        damaged=decisions.damaged,
    )
    if decisions.pool is None:
        return work
    try:
        bucket = Bucket(work, inputs[decisions.pool.bucket], [decisions.pool])
        tables = bucket.join()
    except UnrenderedItemsError as error:
        raise incomplete(
            context.run, f"{error.count} items of the population pool were not rendered"
        ) from None
    last = bucket.last.get(POPULATION_USER)
    filtered = tables.filtered.get(POPULATION_USER, 0)
    if last and decisions.pool.action in (Action.CARRY, Action.RESCORE):
        filtered = num_filtered(last)
    pool = Pool(
        decision=decisions.pool,
        items=tables.items,
        num_failed=tables.errors.num_rows,
        num_filtered=filtered,
        stale=bool(tables.stale),
    )
    return replace(work, pool=pool)


def incomplete(run: Run, reason: str) -> ResumableError:
    return ResumableError(f"run {run.run_id}: {reason}; nothing is published, start it again to resume")


def total(parts: Iterable[Mapping[T, int]]) -> Counter[T]:
    """Return the sum of several counts."""
    counter: Counter[T] = Counter()
    for part in parts:
        counter.update(part)
    return counter


def check_counts(context: RunContext, results: list[BucketResult]) -> Counts:
    """Return the counts of all buckets.

    Raises ResumableError unless every requested item is accounted for.
    """
    for bucket, result in enumerate(results):
        accounted = sum(result.counts[outcome] for outcome in OUTCOMES)
        if accounted != result.counts["requested"]:
            raise incomplete(
                context.run,
                f"{result.counts['requested']:,} items requested in bucket {bucket}, {accounted:,} accounted "
                f"for ({result.counts})",
            )
    summed = total([result.counts for result in results])
    accounted = sum(summed[outcome] for outcome in OUTCOMES)
    if accounted != context.requested:
        raise incomplete(
            context.run,
            f"{context.requested:,} items requested, {accounted:,} accounted for ({dict(summed)})",
        )
    return Counts(**{name: summed[name] for name in COUNTED})


def check_failures(context: RunContext, counts: Counts, results: list[BucketResult]) -> None:
    """Raise ErrorBudgetExceededError if more items failed than the budget allows."""
    budget = context.config.error_budget
    if counts.failed <= budget * counts.requested:
        return
    reasons: list[str] = []
    for row in (row for result in results for row in result.files if row["table"] == "errors"):
        errors = read_table(join(context.run.root, row["path"]), "errors", ["error"])
        reasons += pc.unique(errors["error"]).to_pylist()
        if len(reasons) >= 3:
            break
    raise ErrorBudgetExceededError(
        f"run {context.run.run_id}: {counts.failed} of {counts.requested} items failed "
        f"({', '.join(dict.fromkeys(reasons[:3]))}), the budget is {budget:.2%}; nothing is published. "
        "Mend it, and draw them again with --retry-failed"
    )


def image_rows(context: RunContext, files: list[ImageFile], results: list[BucketResult]) -> list[FileRow]:
    """Return the image files of this run, and those of earlier runs in use, as rows of `schemas.FILES`."""
    live = total([result.live_rows for result in results])
    rendered: list[FileRow] = [
        {
            "table": "images",
            "bucket": file.record.bucket,
            "file": file.number,
            "path": file.record.path,
            "rows": file.record.rows,
            "bytes": file.record.bytes,
            "sha256": file.record.sha256,
        }
        for file in files
    ]
    compacted = [row for result in results for row in result.images]
    previous = context.previous
    earlier: list[FileRow] = [
        row
        for row in (previous.files.to_pylist() if previous else [])
        if row["table"] == "images" and live[row["file"]]
    ]
    return [{**row, "live_rows": live[row["file"]]} for row in earlier + rendered + compacted]


def file_metadata(versions: dict[str, str]) -> dict[str, str]:
    """Return the metadata of every table but images, which carry the schema version alone."""
    return {
        schemas.VERSION_KEY: str(schemas.SCHEMA_VERSION),
        **{f"rebeca.{name}": value for name, value in versions.items()},
    }


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
    quality, key = Quality(), read_user_key(context.config.user_key)
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
        safety_checker=models.safety_checker,
        embed_dim=models.embed_dim,
        clip_fingerprint=models.clip_fingerprint,
        user_key_fingerprint=key.fingerprint if key else None,
        num_buckets=context.num_buckets,
        next_file=assembled.next_file,
        bytes=assembled.bytes,
        bytes_written=assembled.bytes_written,
        files=assembled.files,
        inputs=context.inputs_digest,
        quality=quality,
        measured=Measured(stages=stages),
        forecast=forecast(context, decisions) if previous else None,
        actual=actual_cost(context, decisions, progress, assembled.bytes_written),
    )


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
