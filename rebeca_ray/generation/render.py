"""Render planned items into image files, shard by shard, the most urgent first. One graph per shard.

work/…/plan/shard=…/ -> items without an image -> decode, encode -> images/run_id=…/bucket=…/ -> records,
then the shard's marker

A record is written after its file, the marker after all records of a shard: an attempt that takes over
renders the items without a record. (Why not Ray Data's checkpoints: infra/docs/log.md.)
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.build import build_decoder, check_decoder
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.errors import InputError, ServerLostError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.parts import PartRecord, WriteParts, with_busy_seconds
from rebeca_ray.generation.plan import read_plan
from rebeca_ray.generation.progress import Progress
from rebeca_ray.ray_runtime import ExcludeIds
from rebeca_ray.storage.filesystem import join, list_files, open_filesystem
from rebeca_ray.storage.objects import read_json, write_json

log = logging.getLogger(__name__)

ROW_GROUP = 100
MAX_CLOCK_DIFFERENCE = 60  # seconds, between the actors' clocks and ours
BATCHES_PER_CALL = 4  # of a server, which waits for nothing but between calls
COLUMNS = ["item_id", "bucket", "image_embeds", "prompt", "negative_prompt"]


@dataclass(frozen=True, kw_only=True)
class ShardMarker:
    """The state of one shard after an attempt: its files, its failed rows, and whether time ran out."""

    attempt: int
    files: list[PartRecord]
    timed_out: bool
    failed: int

    @classmethod
    def read(cls, run: Run, shard: int) -> Self | None:
        values = read_json(run.shard_marker(shard))
        if values is None:
            return None
        return cls(**{**values, "files": [PartRecord.from_dict(record) for record in values["files"]]})

    def write(self, run: Run, shard: int) -> None:
        write_json(asdict(self), run.shard_marker(shard))


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The images of a run: their files, and whether time ran out before all were rendered."""

    files: list[PartRecord]
    timed_out: bool


def render_all(
    context: RunContext,
    decisions: Decisions,
    progress: Progress,
    *,
    deadline: float | None,
    retry_failed: bool,
) -> Rendered:
    """Render every planned item, except those that `deadline` (seconds since 1970) leaves no time for.

    A row that fails keeps its place, with a null image and the reason. With `retry_failed`, rows that failed
    in an earlier attempt are rendered again, as an attempt of their own.
    """
    files: list[PartRecord] = []
    timed_out = False
    for shard in range(decisions.shards):
        marker = ShardMarker.read(context.run, shard)
        can_continue = marker is not None and marker.timed_out and has_time(deadline)
        if marker is None or can_continue or (retry_failed and marker.failed):
            earlier = None if can_continue else marker
            marker = render_shard(context, shard, earlier, progress, deadline)
        files += marker.files
        timed_out = timed_out or marker.timed_out
    return Rendered(files=files, timed_out=timed_out)


def has_time(deadline: float | None, margin: float = 0.0) -> bool:
    return deadline is None or time.time() < deadline - margin


def render_shard(
    context: RunContext,
    shard: int,
    earlier: ShardMarker | None,
    progress: Progress,
    deadline: float | None,
) -> ShardMarker:
    """Render the items of one shard that have no image yet, write its marker, and return it.

    With the marker of an `earlier` attempt, its failed rows are rendered again.
    """
    run = context.run
    records = read_records(run, shard)
    attempt = max([earlier.attempt + 1 if earlier else 0, *(record.attempt for record in records)])
    done = rendered_ids(run, records, with_failed=lambda record: earlier is None or record.attempt == attempt)
    # Sorted by bucket, so that few files hold rows of two buckets.
    parts = sorted((part for part in read_plan(run) if part.shard == shard), key=lambda part: part.bucket)
    total = sum(part.rows for part in parts)
    if len(done) < total and has_time(deadline):
        files = [join(run.work, part.path) for part in parts]
        stages = render_stages(context, shard, done, attempt, deadline)
        batches = run_graph(files, stages, columns=COLUMNS, in_process=context.in_process)
        progress.follow("render", batches, total=total - len(done))
        records = read_records(run, shard)
    rendered = sum(record.rows for record in records)
    failed = sum(record.failed for record in records)
    if rendered != total or attempt:
        # Some items were rendered twice, or not at all: count their ids.
        every = rendered_ids(run, records, with_failed=lambda record: True)
        good = rendered_ids(run, records, with_failed=lambda record: False)
        rendered, failed = len(every), len(every) - len(good)
    complete = rendered == total
    marker = ShardMarker(attempt=attempt, files=records, timed_out=not complete, failed=failed)
    if not complete and has_time(deadline, margin=MAX_CLOCK_DIFFERENCE):
        # Rows were lost. Without a marker the next attempt renders them.
        return ShardMarker(attempt=attempt, files=records, timed_out=False, failed=failed)
    marker.write(run, shard)
    return marker


def render_stages(
    context: RunContext, shard: int, done: pa.Array, attempt: int, deadline: float | None
) -> list[Stage]:
    """Return the stages that render a shard's items, except those that are `done`."""
    decoder, served = context.config.decoder, context.config.decoder.backend == "triton"
    rows = decoder.batch_size * (BATCHES_PER_CALL if served else 1)
    renderer = Stage(
        work=RenderImages,
        arguments=(decoder, deadline, context.in_process, context.versions["decoder"]),
        batch_size=rows,
        rows_per_block=rows,
        actors=Actors(
            count=decoder.num_actors,
            cpus=decoder.cpus_per_actor,
            gpus=0 if served or decoder.device == "cpu" else 1,
            decoder_slots=1 if served else 0,
        ),
    )
    writer = WriteParts(
        root=context.run.root,
        folder=context.run.images,
        by=("bucket",),
        fencing_token=context.run.fencing_token,
        row_group_size=ROW_GROUP,
        records=context.run.records(shard),
        metadata=schemas.IMAGES.metadata,
        shard=shard,
        attempt=attempt,
    )
    exclude = [Stage(work=ExcludeIds(done), batch_size=None)] if len(done) else []
    return [*exclude, renderer, Stage(work=writer, batch_size=context.config.layout.images_per_file)]


def read_records(run: Run, shard: int) -> list[PartRecord]:
    """Return the records of a shard's complete files."""
    with ThreadPoolExecutor(16) as pool:
        values = pool.map(read_json, list_files(run.records(shard), ".json"))
        return [PartRecord.from_dict(record) for record in values if record]


def busy_seconds(run: Run, decisions: Decisions) -> float:
    """Return the time that all render actors together spent on this run so far."""
    records = (record for shard in range(decisions.shards) for record in read_records(run, shard))
    return sum(record.busy_seconds for record in records)


def rendered_ids(run: Run, records: list[PartRecord], with_failed: Callable[[PartRecord], bool]) -> pa.Array:
    """Return the ids of the items in some files, each once.

    Failed items count only in files that `with_failed` accepts.
    """
    filesystem, root = open_filesystem(run.root)

    def ids(record: PartRecord) -> pa.Array:
        # Without a cache, so that the pixels between the columns are not read.
        with filesystem.open(join(root, record.path), "rb", cache_type="none") as file:
            table = pq.read_table(file, columns=["item_id", "error"])
        if not with_failed(record):
            table = table.filter(pc.is_null(table["error"]))
        return table["item_id"].combine_chunks()

    with ThreadPoolExecutor(16) as pool:
        arrays = list(pool.map(ids, records))
    return pc.unique(pa.concat_arrays(arrays)) if arrays else pa.array([], pa.string())


def check_renderer(decoder: DecoderSettings) -> None:
    """Check the server or safety checker where a render actor would run, before anything is planned."""
    if decoder.backend == "local" and not decoder.safety.checker:
        return
    import ray

    served = decoder.backend == "triton"
    options: dict[str, Any] = {
        "num_cpus": decoder.cpus_per_actor,
        "num_gpus": 0 if served or decoder.device == "cpu" else 1,  # a checker may be on the GPU
        "resources": {"decoder_slot": 1.0} if served else {},
    }
    check = ray.remote(max_retries=0)(check_decoder).options(**options)
    try:
        ray.get(check.remote(decoder))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


class RenderImages:
    """Actor: one planned row in, one row of `schemas.IMAGES` with its bucket out, in order.

    After `deadline`, no row comes out. `fingerprint` is that of the run's decoder. Raises InputError if the
    files are those of another decoder by now.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        deadline: float | None = None,
        in_process: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        self.settings, self.deadline, self.in_process = settings, deadline, in_process
        self.decoder = build_decoder(settings)
        # After loading, so that files which were replaced meanwhile are seen too.
        if fingerprint not in (None, identify_decoder(settings).fingerprint(settings)):
            raise InputError(
                f"decoder {settings.model}: was replaced while this run was rendering; run again"
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not has_time(self.deadline):
            batch = batch.slice(0, 0)
        started = time.perf_counter()
        images = self.render(batch) if batch.num_rows else schemas.IMAGES.empty_table()
        images = images.append_column("bucket", batch["bucket"])
        return with_busy_seconds(images, time.perf_counter() - started)

    def render(self, batch: pa.Table) -> pa.Table:
        item_ids = batch["item_id"].to_pylist()
        rows = Rows.of(
            self.settings,
            batch["image_embeds"].combine_chunks().flatten().to_numpy().reshape(batch.num_rows, -1),
            [identity.image_seed(item) for item in item_ids],
            batch["prompt"].to_pylist(),
            batch["negative_prompt"].to_pylist(),
        )
        suffix = self.settings.image_format.lower()
        images = [
            {
                **asdict(decoded),
                "item_id": item,
                "image": decoded.image and {"bytes": decoded.image, "path": f"{item}.{suffix}"},
            }
            for item, decoded in zip(item_ids, self.decode(rows), strict=True)
        ]
        return pa.Table.from_pylist(images, schema=schemas.IMAGES)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Decode some rows. An actor that loses its server ends.

        Ray then starts another actor where a decoder slot is free, and retries these rows there.
        """
        try:
            return self.decoder.decode(rows)
        except ServerLostError as error:
            if self.in_process:
                raise
            log.error(f"render actor ends: {error}")
            # An exception would fail the run, and Ray takes a polite exit for the actor's own wish.
            os._exit(1)
