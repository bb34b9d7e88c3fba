"""Assembling: decisions, plan, images and last night's snapshot become the public tables of one snapshot, bucket by bucket.

Every item is accounted for: requested = new + carried + population + failed + filtered, and deferred where time ran out before a
user's first items.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import KINDS
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.errors import ErrorBudgetExceededError, QualityGateError, ResumableError
from rebeca_ray.generation.assembly import Assembled, Assembly
from rebeca_ray.generation.bucket import Bucket
from rebeca_ray.generation.decide import Decisions
from rebeca_ray.generation.render import Rendered
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import read_table, write_table


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """What a snapshot says of how it was made."""

    versions: dict[str, str]
    decoder_weights: dict[str, str]
    embed_dim: int
    clip: str | None
    num_buckets: int
    max_safety_probability: float
    error_budget: float


def assemble(
    run: Run,
    made: MadeOf,
    decisions: Decisions,
    parts: list[dict[str, Any]],
    rendered: Rendered,
    previous: Snapshot | None,
    requested: int,
    moved: Callable[[], None],
) -> dict[str, Any]:
    """Write the snapshot's tables and its file list; returns its manifest, which the caller judges, completes and writes.

    Raises ResumableError if an item is unaccounted for, ErrorBudgetExceededError if too many failed, QualityGateError if none is fit
    to be shown.
    """
    first = previous.manifest["next_file"] if previous else 0
    numbered = [
        {**file, "file": first + number}
        for number, file in enumerate(sorted(rendered.files, key=lambda file: str(file["path"])))
    ]
    work = with_pool(
        Assembly(
            run=run,
            previous=previous,
            num_buckets=made.num_buckets,
            embed_dim=made.embed_dim,
            prior=made.versions["prior"],
            parts=parts,
            files=numbered,
            late=rendered.late,
            max_safety_probability=made.max_safety_probability,
            now=datetime.now(UTC),
            metadata=file_metadata(made.versions),
            first_compacted=first + len(numbered),
            pool=decisions.pool,
        )
    )
    found = for_each_bucket(
        lambda bucket: Bucket.read(work, bucket).assemble(), range(made.num_buckets), moved
    )
    counts = total([part.counts for part in found])
    accounted = sum(counts.get(kind, 0) for kind in KINDS)
    if undrawn := sum(part.undrawn for part in found):
        raise incomplete(run, f"{undrawn:,} of {decisions.planned_items:,} planned items were not rendered")
    if accounted != requested:
        raise incomplete(run, f"{requested:,} items requested, {accounted:,} accounted for ({counts})")
    refuse_failures(run, counts, requested, made.error_budget, found)
    if sum(counts[kind] for kind in ("new", "carried", "population")) == 0 and not counts["deferred"]:
        raise QualityGateError(
            f"run {run.run_id}: not one of {requested} items has an image fit to be shown; look at decoder.safety. Nothing is published"
        )
    images = image_files(work, found)
    listing = f"{run.snapshot}/files-{run.epoch:06d}.parquet"
    rows = sorted(
        [row for part in found for row in part.files] + images,
        key=lambda row: (row["table"], row["bucket"], row["file"]),
    )
    list_written = write_table(
        pa.Table.from_pylist(rows, schema=schemas.FILES), join(run.root, listing), row_group_size=10_000
    )
    return {
        "schema_version": schemas.SCHEMA_VERSION,
        "run_id": run.run_id,
        "run_date": run.run_date,
        "epoch": run.epoch,
        "created_at": work.now.isoformat(timespec="seconds"),
        "previous": previous.manifest["run_id"] if previous else None,
        "previous_path": previous.path if previous else None,
        "counts": {
            "requested": requested,
            **{kind: counts[kind] for kind in (*KINDS, "users", "late_users")},
        },
        "decisions": {
            "planned_users": decisions.planned_users,
            "planned_items": decisions.planned_items,
            "units": decisions.units,
        },
        "carried_buckets": sum(part.by_reference for part in found),
        "figures": figures(counts, total([part.sums for part in found]), requested),
        "versions": made.versions,
        "decoder_weights": made.decoder_weights,
        "embed_dim": made.embed_dim,
        "clip": made.clip,
        "num_buckets": made.num_buckets,
        "next_file": max([first - 1, *(row["file"] for row in images)]) + 1,
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_written": sum(row["bytes"] for row in rows if f"run_id={run.run_id}/" in row["path"]),
        "files": {"path": listing, **list_written},
    }


def with_pool(work: Assembly) -> Assembly:
    """The same, with the items that strangers share."""
    if work.pool is None:
        return work
    found = Bucket(work, work.pool["bucket"], [work.pool]).put_together()
    if found.undrawn:
        raise incomplete(work.run, f"{found.undrawn} items of the strangers' pool were not rendered")
    return replace(
        work, pool_items=found.items, pool_failed=found.errors.num_rows, pool_late=bool(found.late)
    )


def incomplete(run: Run, told: str) -> ResumableError:
    return ResumableError(f"run {run.run_id}: {told}; nothing is published, start it again to resume")


def total(parts: list[dict[str, Any]]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for part in parts:
        counted.update(part)
    return counted


def refuse_failures(
    run: Run, counts: Counter[str], requested: int, error_budget: float, found: list[Assembled]
) -> None:
    """Raise ErrorBudgetExceededError if more failed than may."""
    if counts["failed"] <= error_budget * requested:
        return
    reasons: list[str] = []
    for path in [
        row["path"] for part in found for row in part.files if row["table"] == "errors" and row["rows"]
    ]:
        reasons += pc.unique(read_table(join(run.root, path), "errors", ["error"])["error"]).to_pylist()
        if len(reasons) >= 3:
            break
    raise ErrorBudgetExceededError(
        f"run {run.run_id}: {counts['failed']} of {requested} items failed ({', '.join(dict.fromkeys(reasons[:3]))}), the budget is "
        f"{error_budget:.2%}; nothing is published. Mend it, and draw them again with --retry-failed"
    )


def image_files(work: Assembly, found: list[Assembled]) -> list[dict[str, Any]]:
    """Rows of schemas.FILES: tonight's image files, and those of earlier runs that are still pointed to."""
    live: Counter[int] = Counter()
    for part in found:
        live.update(part.live)
    new = [
        {
            "table": "images",
            **{name: file[name] for name in ("bucket", "file", "path", "rows", "bytes", "sha256")},
        }
        for file in [*work.files, *(file for part in found for file in part.images)]
    ]
    old = (
        [row for row in work.previous.files.to_pylist() if row["table"] == "images" and live[row["file"]]]
        if work.previous
        else []
    )
    return [{**row, "live_rows": live[row["file"]]} for row in old + new]


def figures(counts: Counter[str], sums: Counter[str], requested: int) -> dict[str, float | None]:
    """What the quality gate looks at: shares of the request, and means over the items that were put together tonight."""

    def mean(total: str, of: str) -> float | None:
        return round(sums[total] / sums[of], 5) if sums[of] else None

    return {
        "failed": round(counts["failed"] / requested, 6),
        "filtered": round(counts["filtered"] / requested, 6),
        "duplicates": mean("duplicates", "items"),
        "like_probability": mean("like", "judged"),
        "diversity": mean("distance", "users_with_several"),
        "judged_items": int(sums["items"]),
    }


def file_metadata(versions: dict[str, str]) -> dict[str, str]:
    """Every table but images says what made it; images say the version alone, and the manifest the rest."""
    return {
        schemas.VERSION_KEY: str(schemas.SCHEMA_VERSION),
        **{f"rebeca.{name}": value for name, value in versions.items()},
    }
