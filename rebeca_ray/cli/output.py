"""The jobs, and how one is run: read the config, do the work, end with a truthful exit code."""

import signal
from typing import TYPE_CHECKING

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import (
    DistillConfig,
    EmbedConfig,
    GenerateConfig,
    NightlyConfig,
    Resume,
    TrainConfig,
    dated,
)
from rebeca_ray.console import console
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.evaluation.permutation import personality_line
from rebeca_ray.storage.filesystem import join

if TYPE_CHECKING:
    from rebeca_ray.catalog.exports.key_values import Format
    from rebeca_ray.catalog.gc import Garbage
    from rebeca_ray.catalog.verify import Level
    from rebeca_ray.generation.pipeline import Generated


def embed(config: EmbedConfig) -> None:
    """Items with images -> the same items with CLIP embeddings."""
    from rebeca_ray.data.items import embed_items

    console.print(f"embedded {embed_items(config):,} items -> {config.out}")


def train(config: TrainConfig) -> None:
    """Interactions + embedded items -> a prior directory."""
    from rebeca_ray.training.train import train_prior

    metrics = train_prior(config)
    console.print(
        f"prior -> {config.out}  (validation loss {metrics['val_loss']:.4f}, epoch {metrics['best_epoch']:.0f})"
    )


def distill(config: DistillConfig) -> None:
    """A trained prior -> one that needs a few passes an embedding."""
    from rebeca_ray.training.distill import distill_prior

    figures = distill_prior(config)
    quality, passes = figures["student_quality"], config.num_inference_steps
    console.print(
        f"distilled prior -> {config.out}  ({quality:.1%} of the teacher's quality in {passes} passes)"
    )


def generate(
    config: GenerateConfig, *, resume: Resume = "auto", retry_failed: bool = False, force: bool = False
) -> None:
    """Prior + decoder + request -> a published snapshot."""
    from rebeca_ray.generation.pipeline import generate_catalog

    config = dated(config, config.date())
    print_published(
        generate_catalog(config, resume=resume, retry_failed=retry_failed, force=force), config.catalog
    )


def print_published(generated: "Generated", root: str) -> None:
    """What was published, in lines for a log."""
    manifest, seconds = generated.manifest, generated.seconds
    counts = manifest.counts
    told = ", ".join(
        f"{getattr(counts, kind):,} {kind}"
        for kind in ("new", "carried", "population", "failed", "filtered", "deferred")
        if getattr(counts, kind)
    )
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    console.print(
        f"published run {manifest.run_id} of {manifest.run_date} in {root}, with items of {counts.users:,} users"
    )
    console.print(f"items: {told}; {took}")
    if counts.stale_users:
        console.print(
            f"time ran out: {counts.stale_users:,} users are not of tonight; the next run draws them"
        )
    for refusal in manifest.gate.refused:
        console.print(f"forced, though {refusal}")
    if test := manifest.quality.permutation:
        console.print(personality_line(test))


def nightly(config: NightlyConfig) -> None:
    """One night, and the dates that were missed before it."""
    from rebeca_ray.nightly import run_nightly

    nights, garbage = run_nightly(config)
    for night in nights:
        print_published(night.generated, config.generate.catalog)
    if not nights:
        console.print(f"{config.generate.catalog}: a snapshot of this date is published; nothing to do")
    if garbage:
        print_garbage(garbage, "removed")


def estimate(config: GenerateConfig, *, images_per_second: float | None) -> None:
    """What a run would take, beside what the last one took."""
    from rich.table import Table

    from rebeca_ray.catalog.read import published
    from rebeca_ray.generation.estimate import estimate as foresee

    config = dated(config, config.date())
    found = foresee(config, images_per_second=images_per_second).model_dump()
    last = published(config.catalog)
    table = Table("", "tonight", "the last run", title_justify="left")
    for name, value in found.items():
        table.add_row(name, f"{value:,}", f"{getattr(last.manifest.actual, name, 0):,}" if last else "")
    console.print(table)


def list_catalog(root: str) -> None:
    """A line a snapshot."""
    from rich.table import Column, Table

    from rebeca_ray.catalog.pointer import read_pointer
    from rebeca_ray.catalog.snapshots import list_snapshots

    pointer, version = read_pointer(root)
    snapshots = list_snapshots(root)
    if version is None and not snapshots:
        raise InputError(f"catalog {root}: there is none (no latest.json); give the root of one")
    table = Table("run_date", Column("run_id", no_wrap=True), "items", "new", "")
    for manifest in snapshots:
        counts = manifest.counts
        items = counts.new + counts.carried + counts.population
        told = (
            "published"
            if manifest.run_id == pointer.run_id
            else "refused by the quality gate"
            if manifest.gate.refused
            else ""
        )
        table.add_row(manifest.run_date, manifest.run_id, f"{items:,}", f"{counts.new:,}", told)
    console.print(table)
    if pointer.run_id is None:
        console.print("none of them is published: `rebeca catalog publish --run-id` one of them")
    if pointer.lease:
        console.print(f"at work: run {pointer.lease['run_id']} (epoch {pointer.lease['epoch']})")


def show_snapshot(root: str, run_id: str | None) -> None:
    """What a manifest says, for a person."""
    from rich.table import Table

    from rebeca_ray.catalog.read import read_catalog
    from rebeca_ray.catalog.snapshots import find_snapshot

    manifest = find_snapshot(root, run_id) if run_id else read_catalog(root).manifest
    table = Table("", "", show_header=False)
    for key in (
        "run_date",
        "run_id",
        "fencing_token",
        "created_at",
        "previous_run_id",
        "embed_dim",
        "num_buckets",
        "carried_buckets",
        "bytes",
    ):
        table.add_row(key, str(getattr(manifest, key)))
    dumped = manifest.model_dump()
    for section in ("counts", "figures", "actual", "versions"):
        for key, value in (dumped[section] or {}).items():
            table.add_row(f"{section}.{key}", f"{value:,}" if isinstance(value, int) else str(value))
    for refusal in manifest.gate.refused:
        table.add_row("refused", refusal)
    console.print(table)


def verify_snapshot(root: str, run_id: str | None, level: "Level") -> None:
    """Say what is wrong, or that nothing is. Raises QualityGateError in the first case."""
    from rebeca_ray.catalog.read import open_snapshot, read_catalog
    from rebeca_ray.catalog.snapshots import find_snapshot
    from rebeca_ray.catalog.verify import verify

    snapshot = open_snapshot(root, find_snapshot(root, run_id).path) if run_id else read_catalog(root)
    wrong = verify(snapshot, level)
    for line in wrong:
        console.print(line)
    if wrong:
        raise QualityGateError(
            f"catalog {root}: run {snapshot.manifest.run_id} is damaged ({len(wrong)} things, above); `rebeca catalog rollback` it, "
            "or restore the files"
        )
    console.print(
        f"run {snapshot.manifest.run_id}: nothing wrong ({level}: {snapshot.files.num_rows:,} files)"
    )


def export_images(root: str, out: str, url_base: str) -> None:
    from rebeca_ray.catalog.exports.image_objects import export_images
    from rebeca_ray.catalog.read import read_catalog

    snapshot = read_catalog(root)
    done = export_images(snapshot, out, url_base)
    console.print(
        f"run {snapshot.run_id} -> {out}: {done.written:,} images written, {done.removed:,} removed, "
        f"{done.urls:,} rows of URLs in {len(done.files):,} files, which {join(out, 'latest.json')} names"
    )


def export_key_values(
    root: str, out: str, format: "Format", *, key_prefix: str, since: str | None, images: str | None
) -> None:
    from rebeca_ray.catalog.exports.key_values import export_key_values
    from rebeca_ray.catalog.read import read_catalog

    done = export_key_values(
        read_catalog(root), out, format, key_prefix=key_prefix, since=since, images=images
    )
    console.print(
        f"{done.users:,} users to set, {done.removed:,} to remove -> {len(done.files):,} files in {done.folder}"
    )


def register_iceberg(root: str, catalog: str, warehouse: str, namespace: str) -> None:
    from rebeca_ray.catalog.exports.iceberg import register_snapshot
    from rebeca_ray.catalog.read import read_catalog

    snapshot = read_catalog(root)
    for name, (added, dropped) in register_snapshot(snapshot, catalog, warehouse, namespace).items():
        console.print(
            f"{namespace}.{name}: run {snapshot.run_id}, {added:,} files added, {dropped:,} dropped"
        )


def collect_garbage(root: str, *, keep: int, grace_hours: float, dry_run: bool) -> None:
    from rebeca_ray.catalog.gc import collect

    garbage = collect(root, keep=keep, grace_hours=grace_hours, dry_run=dry_run)
    if dry_run:
        for uri in (*garbage.manifests, *garbage.folders, *garbage.files):
            console.print(uri)
    print_garbage(garbage, "would remove" if dry_run else "removed")


def print_garbage(garbage: "Garbage", did: str) -> None:
    console.print(
        f"{did} {len(garbage.manifests)} snapshots, {len(garbage.folders)} folders and {len(garbage.files)} files; "
        f"kept {len(garbage.kept)} snapshots"
    )


def serve(
    decoder: DecoderSettings, *, http_port: int, grpc_port: int, metrics_port: int, instances: int
) -> None:
    """Triton until it is interrupted, or told to stop."""
    from rebeca_ray.decoder.triton_server import triton_server

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with triton_server(
            decoder, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, instances=instances
        ) as process:
            console.print(
                f"ready: grpc 127.0.0.1:{grpc_port} (decoder.triton.url), http://127.0.0.1:{http_port}/v2/models/decoder, "
                f"metrics http://127.0.0.1:{metrics_port}/metrics"
            )
            if code := process.wait():
                raise InputError(f"tritonserver ended with code {code}; its own lines above say why")
    except KeyboardInterrupt:
        console.print("stopped")
