"""Render planned items into image files, shard by shard, the most urgent first. One graph per shard.

work/…/plan/shard=…/ -> items without an image -> decode, encode (sign) -> images/run_id=…/bucket=…/ ->
records, then the shard's marker

A record is written after its file, the marker after all records of a shard: an attempt that takes over
renders the items without a record. (Why not Ray Data's checkpoints: infra/docs/log.md.)
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.errors import InputError, ServerLostError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.parts import BusyClock, PartRecord, WriteParts, with_busy_seconds
from rebeca_ray.generation.plan import read_plan
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.repair.previous import HashedBytes
from rebeca_ray.generation.repair.suspects import Suspects, was_started_again
from rebeca_ray.provenance.signing import load_signer
from rebeca_ray.ray_runtime import ExcludeIds, whole_blocks
from rebeca_ray.storage.filesystem import delete_files, join, list_files, open_filesystem, storage_errors
from rebeca_ray.storage.records import (
    damage_among,
    read_columns,
    read_record,
    read_recorded,
    write_record,
)
from rebeca_ray.telemetry import metrics

log = logging.getLogger(__name__)

ROW_GROUP = 100
MAX_CLOCK_DIFFERENCE = 60  # seconds, between the actors' clocks and ours
HASHED_BYTES = 16 * 2**30  # of the images of finished shards, when a run is resumed
# Batches per call of a server or a GPU, which waits for nothing but between calls. The driver orders calls
# one by one, some fifty a second, so many images mean long calls, yet enough of them for each actor.
FEWEST_BATCHES, MOST_BATCHES, CALLS_PER_ACTOR = 4, 16, 16
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
        values = read_record(run.shard_marker(shard))
        if values is None:
            return None
        return cls(**{**values, "files": [PartRecord.from_dict(record) for record in values["files"]]})

    def write(self, run: Run, shard: int) -> None:
        write_record(asdict(self), run.shard_marker(shard))


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
    markers = [ShardMarker.read(context.run, shard) for shard in range(decisions.shards)]
    lost = lost_images(context.run, [record for marker in markers if marker for record in marker.files])
    parts = defaultdict[int, list[PartRecord]](list)
    for part in sorted(read_plan(context.run), key=lambda part: part.bucket):
        parts[part.shard].append(part)  # by bucket, so that few files hold rows of two buckets
    for shard, marker in enumerate(markers):
        if marker and any(record.path in lost for record in marker.files):
            marker = None
        can_continue = marker is not None and marker.timed_out and has_time(deadline)
        if marker is None or can_continue or (retry_failed and marker.failed):
            earlier = None if can_continue else marker
            marker = render_shard(context, shard, parts[shard], earlier, progress, deadline)
        files += marker.files
        timed_out = timed_out or marker.timed_out
    return Rendered(files=files, timed_out=timed_out)


def lost_images(run: Run, records: list[PartRecord]) -> set[str]:
    """Return the image files, of those that markers name, that are missing or damaged.

    Beyond HASHED_BYTES, the sizes in one listing are compared.
    """
    if not records:
        return set()
    filesystem, root = open_filesystem(run.root)
    filesystem.invalidate_cache()
    with storage_errors(run.root, "list"):
        sizes = {
            str(path): info["size"]
            for path, info in filesystem.find(join(root, run.images), detail=True).items()
        }
    unlisted = [record for record in records if sizes.get(join(root, record.path)) != record.bytes]
    damaged = damage_among(run.root, unlisted, hashed=False)  # a listing may miss a file
    rest = [record for record in records if record.path not in damaged]
    return {*damaged, *HashedBytes(HASHED_BYTES).check(run.root, rest, sized=False)}


def has_time(deadline: float | None, margin: float = 0.0) -> bool:
    return deadline is None or time.time() < deadline - margin


def render_shard(
    context: RunContext,
    shard: int,
    parts: list[PartRecord],
    earlier: ShardMarker | None,
    progress: Progress,
    deadline: float | None,
) -> ShardMarker:
    """Render the items of one shard that have no image yet, write its marker, and return it.

    `parts` are the shard's files of the plan. With the marker of an `earlier` attempt, its failed rows are
    rendered again.
    """
    run = context.run
    records = intact_records(run, shard)
    attempt = max([earlier.attempt + 1 if earlier else 0, *(record.attempt for record in records)])
    done = rendered_ids(run, records, with_failed=lambda record: earlier is None or record.attempt == attempt)
    planned = planned_ids(run, parts)
    remaining = len(planned) - (pc.sum(pc.is_in(planned, value_set=done)).as_py() or 0)
    if remaining and has_time(deadline):
        decoder = context.config.decoder
        files = [join(run.work, part.path) for part in parts]
        stages = render_stages(context, shard, done, attempt, deadline, rows_per_call(decoder, remaining))
        pulse = None if context.in_process else progress.listen()
        batches = run_graph(files, stages, columns=COLUMNS, in_process=context.in_process, pulse=pulse)
        written = progress.follow("render", batches, total=remaining, actors=decoder.num_actors)
        # A listing may miss a record, so those that the graph returned count too.
        by_path = {record.path: record for record in [*records, *written, *read_records(run, shard)]}
        records = list(by_path.values())
    # Some items may have been rendered twice, or not at all: the ids tell.
    every = rendered_ids(run, records, with_failed=lambda record: True)
    good = every
    if any(record.failed for record in records):
        good = rendered_ids(run, records, with_failed=lambda record: False)
    missing, failed = (
        pc.sum(pc.invert(pc.is_in(planned, value_set=ids))).as_py() or 0 for ids in (every, good)
    )
    marker = ShardMarker(attempt=attempt, files=records, timed_out=missing > 0, failed=failed - missing)
    if missing and has_time(deadline, margin=MAX_CLOCK_DIFFERENCE):
        # Rows were lost. Without a marker the next attempt renders them.
        return replace(marker, timed_out=False)
    marker.write(run, shard)
    return marker


def planned_ids(run: Run, parts: list[PartRecord]) -> pa.Array:
    """Return the ids of the items in some files of the plan. Raises DamagedFilesError for a damaged one."""
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda part: read_recorded(run.work, part, ["item_id"]), parts))
    return pa.concat_tables(tables)["item_id"].combine_chunks() if tables else pa.array([], pa.string())


def render_stages(
    context: RunContext, shard: int, done: pa.Array, attempt: int, deadline: float | None, rows: int
) -> list[Stage]:
    """Return the stages that render a shard's items, except those that are `done`, by calls of some rows."""
    decoder, served = context.config.decoder, context.config.decoder.backend == "triton"
    renderer = Stage(
        name=metrics.Stage.RENDER,
        work=RenderImages,
        arguments=(
            decoder,
            deadline,
            context.in_process,
            # Per attempt: rows that killed are drawn again once `retry_failed` begins another.
            join(context.run.work, "suspects", f"attempt={attempt}"),
            context.versions["decoder"],
        ),
        batch_size=rows,
        rows_per_block=rows,
        actors=Actors(
            count=decoder.num_actors,
            cpus=decoder.cpus_per_actor,
            gpus=0 if served or decoder.device == "cpu" else 1,
            decoder_slots=1 if served else 0,
            # One draws while the other checks and encodes. A client has one call at a time, and CUDA graphs
            # belong to the thread that recorded them.
            calls=1 if served or decoder.compile else 2,
        ),
    )
    writer = WriteParts(
        root=context.run.root,
        folder=context.run.images,
        by=("bucket",),
        fencing_token=context.run.fencing_token,
        row_group_size=ROW_GROUP,
        records=context.run.records(shard),
        metadata=schemas.with_mark(schemas.IMAGES, decoder.provenance).metadata,
        shard=shard,
        attempt=attempt,
    )
    per_file = whole_blocks(context.config.layout.images_per_file, rows)
    stages = [renderer, Stage(work=writer, batch_size=per_file)]
    if not len(done):
        return stages
    return [Stage(work=ExcludeIds(done, in_process=context.in_process), batch_size=None), *stages]


def rows_per_call(decoder: DecoderSettings, images: int) -> int:
    """Return the rows that an actor draws per call, in whole batches, when `images` are left in all."""
    if decoder.backend != "triton" and decoder.device == "cpu":
        return decoder.batch_size
    batches = images // (decoder.batch_size * decoder.num_actors * CALLS_PER_ACTOR)
    return decoder.batch_size * min(max(batches, FEWEST_BATCHES), MOST_BATCHES)


def read_records(run: Run, shard: int) -> list[PartRecord]:
    """Return the records of a shard's complete files."""
    return list(records_by_uri(run, shard).values())


def records_by_uri(run: Run, shard: int) -> dict[str, PartRecord]:
    uris = list_files(run.records(shard), ".json")
    with ThreadPoolExecutor(16) as pool:
        values = dict(zip(uris, pool.map(read_record, uris), strict=True))
    return {uri: PartRecord.from_dict(record) for uri, record in values.items() if record}


def intact_records(run: Run, shard: int) -> list[PartRecord]:
    """Return the records of a shard whose files are as they were written. The others are removed."""
    records = records_by_uri(run, shard)
    damaged = damage_among(run.root, records.values())
    for path, reason in damaged.items():
        log.warning(f"{join(run.root, path)}: {reason}; its items are rendered again")
    delete_files([uri for uri, record in records.items() if record.path in damaged])
    delete_files([join(run.root, path) for path in damaged])
    return [record for record in records.values() if record.path not in damaged]


def busy_seconds(run: Run, decisions: Decisions) -> float:
    """Return the time that all render actors together spent on this run so far."""
    records = (record for shard in range(decisions.shards) for record in read_records(run, shard))
    return sum(record.busy_seconds for record in records)


def rendered_ids(run: Run, records: list[PartRecord], with_failed: Callable[[PartRecord], bool]) -> pa.Array:
    """Return the ids of the items in some files, each once.

    Failed items count only in files that `with_failed` accepts.
    """

    def ids(record: PartRecord) -> pa.Array:
        table = read_columns(run.root, record.path, ["item_id", "error"])
        if not with_failed(record):
            table = table.filter(pc.is_null(table["error"]))
        return table["item_id"].combine_chunks()

    with ThreadPoolExecutor(16) as pool:
        arrays = list(pool.map(ids, records))
    return pc.unique(pa.concat_arrays(arrays)) if arrays else pa.array([], pa.string())


class RenderImages:
    """Actor: one planned row in, one row of `schemas.IMAGES` with its bucket out, in order.

    Two calls may run at a time. A call after `deadline` returns no row; both that run by then are drawn. With
    a folder for `suspects`, a row that kills its process costs no other row. `fingerprint` is that of the
    run's decoder: raises InputError if the files are those of another decoder by now.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        deadline: float | None = None,
        in_process: bool = False,
        suspects: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.settings, self.deadline, self.in_process = settings, deadline, in_process
        self.suspects: Suspects | None = None
        if suspects:
            # In this process a death ends the attempt, and nothing else would tell of it.
            self.suspects = Suspects(suspects, watchful=in_process or was_started_again())
        self.decoder = build_decoder(settings)
        # After loading, so that files which were replaced meanwhile are seen too.
        present = identify_decoder(settings).fingerprint(settings)
        if fingerprint not in (None, present):
            raise InputError(
                f"decoder {settings.model}: was replaced while this run was rendering; run again"
            )
        self.signer = load_signer(settings, present)
        self.clock = BusyClock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not has_time(self.deadline):
            batch = batch.slice(0, 0)
        images, seconds = schemas.IMAGES.empty_table(), 0.0
        if batch.num_rows:
            self.clock.start()
            try:
                images = self.drawn(batch)
            finally:
                seconds = self.clock.stop()
        return with_busy_seconds(images.append_column("bucket", batch["bucket"]), seconds)

    def drawn(self, batch: pa.Table) -> pa.Table:
        return self.suspects.render(batch, self.render) if self.suspects else self.render(batch)

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
        outcomes = self.decode(rows)
        record_unsafe(rows, outcomes, self.settings.safety.max_probability)
        encoded = [outcome.image for outcome in outcomes]
        if self.signer:  # last, because two signatures differ
            encoded = self.signer.sign_all(encoded, item_ids)
        images = [
            {
                **asdict(outcome),
                "item_id": item,
                "image": image and {"bytes": image, "path": f"{item}.{suffix}"},
            }
            for item, outcome, image in zip(item_ids, outcomes, encoded, strict=True)
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


def record_unsafe(rows: Rows, outcomes: list[DecodedImage], limit: float) -> None:
    """Record the images that the safety checker objected to: each once, by its last treatment."""
    for seed, outcome in zip(rows.seeds, outcomes, strict=True):
        probability = outcome.safety_probability
        if probability is not None and not probability <= limit:
            treatment = metrics.Treatment.FLAGGED if outcome.image else metrics.Treatment.LEFT_OUT
            metrics.UNSAFE.record(1, treatment)
        elif outcome.image and outcome.seed != seed:
            metrics.UNSAFE.record(1, metrics.Treatment.REGENERATED)
