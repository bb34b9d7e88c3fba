"""Format the results of commands as text or a table, or as a dictionary for JSON. Nothing is printed here.

Keys of the JSON forms are stable: scripts read them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from rebeca_ray.catalog.exports.atlas import Atlas
    from rebeca_ray.catalog.exports.image_objects import Exported
    from rebeca_ray.catalog.exports.key_values import KeyValues
    from rebeca_ray.catalog.gc import Garbage
    from rebeca_ray.catalog.manifest import Cost, Manifest
    from rebeca_ray.catalog.pointer import Pointer
    from rebeca_ray.catalog.provenance import ProvenanceCheck
    from rebeca_ray.catalog.read import Snapshot
    from rebeca_ray.data.published.write import Written
    from rebeca_ray.doctor import Finding
    from rebeca_ray.evaluation.quantization import Cosines
    from rebeca_ray.generation.pipeline import Generated
    from rebeca_ray.halves.decode import Decoded
    from rebeca_ray.halves.sample import Sampled
    from rebeca_ray.nightly import Night
    from rebeca_ray.storage.objects import JsonObject
    from rebeca_ray.studies.metrics import Metrics

ESTIMATE_LABELS = {
    "requested_items": "requested items",
    "planned_users": "users to plan",
    "images": "images to render",
    "plan_seconds": "time to plan",
    "render_seconds": "time to render",
    "other_seconds": "time of other stages",
    "hours": "total time",
    "gpu_hours": "GPU time",
    "cpu_hours": "CPU time",
    "bytes_written": "data written",
    "requests": "write requests",
    "cost": "cost, in the currency of `prices`",
}
SHOWN_FIRST = (
    "run_date",
    "run_id",
    "fencing_token",
    "created_at",
    "previous_run_id",
    "embed_dim",
    "num_buckets",
    "carried_buckets",
    "bytes",
)
SHOWN_SECTIONS = ("counts", "figures", "actual", "versions")
EMBED_CONFIG = "jobs/configs/embed_openclip.yaml"
PAPER_SCALE = (1.0, 5.0)
LIKE_FRACTION = 0.75  # of a scale, as 4 is of 1 to 5
ITEM_KINDS = ("new", "carried", "population", "failed", "filtered", "deferred")


def duration(seconds: float) -> str:
    """Return seconds in a unit that a person reads: `12.3 s`, `1.2 min` or `4.5 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def size(num_bytes: float) -> str:
    """Return bytes in a decimal unit: `512 B`, `3.3 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:,.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} TB"


def figure(name: str, value: object) -> str:
    """Return a figure for a person. The name tells its unit: `…seconds`, `…hours`, `…bytes…`, `cost`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if name.endswith("seconds"):
        return duration(value)
    if name.endswith("hours"):
        return duration(3600 * value)
    if "bytes" in name.split("_"):
        return size(value)
    if name == "cost":
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def imported(written: Written, out: str) -> str:
    """Return the counts of an imported data set, and the commands that embed it and train on it."""
    splits = ", ".join(
        f"{number:,} of {'training' if split == 'interactions' else split}"
        for split, number in written.ratings.items()
    )
    folder = out.rstrip("/")
    embed = ["rebeca", "embed", "--config", EMBED_CONFIG, f"items={folder}/items", f"out={folder}/embedded"]
    train = ["rebeca", "train", "--config", "train.yaml", f"interactions.path={folder}/interactions.parquet"]
    train.append(f"items={folder}/embedded")
    if written.rating_scale != PAPER_SCALE:
        low, high = written.rating_scale
        threshold = low + LIKE_FRACTION * (high - low)
        train.append(f"interactions.rating_scale=[{low:g},{high:g}]")
        train.append(f"interactions.like_threshold={threshold:g}")
    return "\n".join(
        [
            f"imported {sum(written.ratings.values()):,} ratings ({splits}) of {written.users:,} users "
            f"on {written.items:,} images -> {out}",
            f"next: {shlex.join(embed)}",
            f"then: {shlex.join(train)}",
        ]
    )


def embedded(num_items: int, out: str) -> str:
    return f"embedded {num_items:,} items -> {out}"


def trained(metrics: Mapping[str, float], out: str) -> str:
    return f"prior -> {out}  (validation loss {metrics['val_loss']:.4f}, epoch {metrics['best_epoch']:.0f})"


def distilled(figures: Mapping[str, float], out: str, passes: int) -> str:
    quality = figures["student_quality"]
    return f"distilled prior -> {out}  ({quality:.1%} of the teacher's quality in {passes} passes)"


def sampled(sampled: Sampled, out: str) -> str:
    line = f"sampled {sampled.embeddings:,} embeddings of {sampled.users:,} users -> {out}"
    if unknown := sampled.cold_start_users:
        line += f"; {unknown:,} of the users are unknown to the prior and share the population's"
    return line


def findings(findings: Sequence[Finding]) -> str:
    """Return a line per part of the machine, and one below it with the remedy where something is missing."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.part:16} {finding.detail}")
        lines += [f"{'':25} -> {finding.remedy}"] if finding.remedy else []
    return "\n".join(lines)


def decoded(decoded: Decoded, out: str) -> str:
    line = f"decoded {decoded.images:,} of {decoded.rows:,} embeddings -> {out}"
    if without := decoded.rows - decoded.images:
        line += f"; {without:,} rows have no image ({decoded.error or 'unsafe'})"
    return line


def published(generated: Generated, catalog: str) -> str:
    """Return the lines on a snapshot that a run has published."""
    from rebeca_ray.evaluation.permutation import personality_line

    manifest = generated.manifest
    counts = manifest.counts.model_dump()
    items = ", ".join(f"{counts[kind]:,} {kind}" for kind in ITEM_KINDS if counts[kind])
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in generated.seconds.items())
    lines = [
        f"published run {manifest.run_id} of {manifest.run_date} in {catalog}, "
        f"with items of {counts['users']:,} users",
        f"items: {items}; {stages}",
    ]
    if generated.seconds and (spent := manifest.actual):
        rate = f" at {spent.images / spent.render_seconds:,.1f} per second" if spent.render_seconds else ""
        lines.append(
            f"images: {spent.images:,} rendered{rate}, {figure('gpu_hours', spent.gpu_hours)} of GPUs; "
            f"{size(manifest.bytes_written)} written of {size(manifest.bytes)}"
        )
    if counts["stale_users"]:
        lines.append(
            f"time ran out: {counts['stale_users']:,} users have no new items; the next run draws them"
        )
    lines += [f"forced, though {refusal}" for refusal in manifest.gate.refused]
    if test := manifest.quality.permutation:
        lines.append(personality_line(test))
    return "\n".join(lines)


def nightly(nights: Sequence[Night], garbage: Garbage | None, catalog: str) -> str:
    """Return the lines on each night that was published, and on the garbage."""
    lines = [published(night.generated, catalog) for night in nights]
    lines = lines or [f"{catalog}: a snapshot of this date is published; nothing to do"]
    return "\n".join([*lines, *([collected(garbage)] if garbage else [])])


def estimate_table(forecast: Cost, last: Cost | None) -> Table:
    """Return the forecast of a run beside the actual cost of the last one."""
    table = Table("", "tonight", "previous run")
    last_figures = last.model_dump() if last else {}
    for name, value in forecast.model_dump().items():
        label = ESTIMATE_LABELS.get(name, name)
        table.add_row(label, figure(name, value), figure(name, last_figures.get(name)))
    return table


def estimate_json(forecast: Cost, last: Cost | None) -> JsonObject:
    """Return the same figures, unrounded; `last_run` is null before the first run."""
    return {"tonight": forecast.model_dump(), "last_run": last.model_dump() if last else None}


def snapshot_list(pointer: Pointer, snapshots: Sequence[Manifest]) -> RenderableType:
    """Return a table of snapshots, and lines on the published one and on a run in progress."""
    table = Table("run_date", Column("run_id", no_wrap=True), "items", "new", "status")
    for row in snapshot_list_json(pointer, snapshots)["snapshots"]:
        status = {"refused": "refused by the quality gate"}.get(row["status"], row["status"])
        table.add_row(row["run_date"], row["run_id"], f"{row['items']:,}", f"{row['new']:,}", status)
    lines = []
    if pointer.run_id is None:
        lines.append("no snapshot is published: `rebeca catalog publish --run-id ID` publishes one")
    if pointer.lease:
        lines.append(
            f"in progress: run {pointer.lease['run_id']} (fencing token {pointer.lease['fencing_token']})"
        )
    return Group(table, *lines)


def snapshot_list_json(pointer: Pointer, snapshots: Sequence[Manifest]) -> JsonObject:
    """Return the published run, the lease of a run in progress, and a row per snapshot, oldest first.

    A row's status is `published`, `refused` (by the quality gate) or empty.
    """
    rows = []
    for manifest in snapshots:
        refused = "refused" if manifest.gate.refused else ""
        rows.append(
            {
                "run_date": manifest.run_date,
                "run_id": manifest.run_id,
                "created_at": manifest.created_at,
                "items": manifest.counts.published,
                "new": manifest.counts.new,
                "users": manifest.counts.users,
                "bytes": manifest.bytes,
                "status": "published" if manifest.run_id == pointer.run_id else refused,
            }
        )
    return {"published": pointer.run_id, "lease": pointer.lease, "snapshots": rows}


def manifest_table(manifest: Manifest) -> Table:
    """Return the keys of a manifest that matter to a person."""
    table = Table("", "", show_header=False)
    values = manifest.model_dump()
    for key in SHOWN_FIRST:
        table.add_row(key, size(values[key]) if key == "bytes" else str(values[key]))
    for section in SHOWN_SECTIONS:
        for key, value in (values[section] or {}).items():
            table.add_row(f"{section}.{key}", figure(key, value))
    for refusal in manifest.gate.refused:
        table.add_row("refused", escape(refusal))
    return table


def manifest_json(manifest: Manifest) -> JsonObject:
    """Return the manifest under the key names of the current version."""
    return manifest.model_dump()


def verified(
    snapshot: Snapshot, level: str, damage: Sequence[str], marks: ProvenanceCheck | None = None
) -> str:
    """Return a line per thing that is wrong with a snapshot, or that nothing is."""
    lines = list(damage)
    if marks:
        kinds = ", ".join(f"{count:,} {mark}" for mark, count in marks.checked.items()) or "none"
        lines.append(f"provenance: {marks.total:,} images checked ({kinds}), {marks.failed:,} failed")
    if not damage:
        lines.append(f"run {snapshot.run_id}: nothing wrong ({level}: {snapshot.files.num_rows:,} files)")
    return "\n".join(lines)


def verified_json(
    snapshot: Snapshot, level: str, damage: Sequence[str], marks: ProvenanceCheck | None = None
) -> JsonObject:
    """Return the same; `ok` says whether the list `damage` is empty."""
    return {
        "run_id": snapshot.run_id,
        "level": level,
        "files": snapshot.files.num_rows,
        "ok": not damage,
        "damage": list(damage),
        **({"provenance": {"checked": marks.checked, "failed": marks.failed}} if marks else {}),
    }


def quantized(cosines: Cosines, out: Path) -> str:
    return (
        f"exported decoder -> {out}: mean cosine to the given embeddings {cosines.int8:.4f} in int8, "
        f"{cosines.float32:.4f} in float32"
    )


def exported_images(snapshot: Snapshot, exported: Exported, out: str) -> str:
    return (
        f"run {snapshot.run_id} -> {out}: {exported.written:,} images written, {exported.removed:,} removed, "
        f"{exported.urls:,} rows of URLs in {len(exported.files):,} files, "
        f"named by {out.rstrip('/')}/latest.json"
    )


def exported_atlas(atlas: Atlas, out: str) -> str:
    return (
        f"{atlas.items:,} of {atlas.total:,} items -> {out}; look at them with\n"
        f"uvx embedding-atlas {out} --x x --y y --neighbors neighbors --image image"
    )


def exported_key_values(exported: KeyValues) -> str:
    return (
        f"{exported.users:,} users to set, {exported.removed:,} to remove "
        f"-> {len(exported.files):,} files in {exported.folder}"
    )


def registered(snapshot: Snapshot, namespace: str, changes: Mapping[str, tuple[int, int]]) -> str:
    """Return a line per Iceberg table: files added and dropped."""
    return "\n".join(
        f"{namespace}.{name}: run {snapshot.run_id}, {added:,} files added, {dropped:,} dropped"
        for name, (added, dropped) in changes.items()
    )


def collected(garbage: Garbage, *, dry_run: bool = False) -> str:
    """Return a line on collected garbage; of a dry run also each path that would go."""
    paths = [*garbage.manifests, *garbage.work, *garbage.files] if dry_run else []
    summary = (
        f"{'would remove' if dry_run else 'removed'} {len(garbage.manifests):,} snapshots, "
        f"the work of {len(garbage.work):,} dead runs and {len(garbage.files):,} files; "
        f"kept {len(garbage.kept):,} snapshots"
    )
    return "\n".join([*paths, summary])


def serving(*, http_port: int, grpc_port: int, metrics_port: int) -> str:
    return (
        f"ready: grpc 127.0.0.1:{grpc_port} (decoder.triton.url), "
        f"http://127.0.0.1:{http_port}/v2/models/decoder, metrics http://127.0.0.1:{metrics_port}/metrics"
    )


def tuned(trials: pa.Table, out: str) -> Table:
    """Return the trials of `rebeca tune` as a table, the best first."""
    table = Table(*trials.column_names, title=f"{trials.num_rows} trials -> {out}/trials.parquet", box=None)
    for row in trials.to_pylist():
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def evaluated(metrics: Metrics, page: str) -> str:
    """Return the lines of `rebeca evaluate`: a line per set, the comparisons of liking, and the report."""
    tested = metrics.verifier.seen
    lines = [
        f"verifier: AUC {tested.auc.value:.3f} [{tested.auc.low:.3f}, {tested.auc.high:.3f}], "
        f"pairs ranked right {tested.pairwise_accuracy.value:.1%}, on {tested.auc.num_users:,} users"
    ]
    for figures in metrics.sets:
        space = "clip" if "clip" in figures.spaces else next(iter(figures.spaces))
        judged = figures.spaces[space]
        like, test = judged.like_probability, judged.permutation[0]
        line = (
            f"{figures.name} ({space}): like probability {like.mean:.3f} [{like.low:.3f}, {like.high:.3f}], "
            f"for others {test.shuffled:.3f} (z = {test.z:.0f}, p = {test.p_value:.4f})"
        )
        if truth := figures.true_like_probability:
            line += f", true {truth.mean:.3f} [{truth.low:.3f}, {truth.high:.3f}]"
        lines.append(line)
    lines += [
        f"{row.left} against {row.right}, {row.figure}: "
        f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], {row.win_share:.0%} of users gain"
        for row in metrics.comparisons
        if row.figure.endswith("like_probability")
    ]
    return "\n".join([*lines, f"report -> {page}"])
