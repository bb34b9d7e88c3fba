"""Rendering: planned items become encoded images in Parquet files, unit by unit, the most urgent first. One Ray Data graph a unit.

work/…/plan/unit=…/ -> those not yet drawn -> decode and encode -> images/run_id=…/bucket=…/ -> records, then the unit's marker

A record is written after its file, the marker after all of a unit's records: an attempt that takes over draws what has no record.
(Ray Data's own checkpoints were tried. Their filter keeps actors of its own, which on two cores wait for the stages that wait
for them, and their recovery deletes files that another attempt may still write.)
"""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.build import build_decoder, check_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.errors import ServerLostError
from rebeca_ray.generation.decide import Decisions
from rebeca_ray.generation.parts import BUSY, WRITER_CPUS, WriteParts, with_busy_seconds
from rebeca_ray.generation.progress import Progress
from rebeca_ray.ray_runtime import ExcludeIds
from rebeca_ray.storage.filesystem import arrow_filesystem, join, list_files, open_filesystem
from rebeca_ray.storage.objects import read_json, write_json

log = logging.getLogger(__name__)

ROW_GROUP = 100
CLOCKS_DIFFER = 60  # seconds at most, those of actors from ours
BATCHES_PER_CALL = 4  # of a server, which waits for nothing but between calls


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What there is of a run's images: their files, and whether time ran out before all were drawn."""

    files: list[dict[str, Any]]  # records of parts.py, with bucket, unit, attempt
    late: bool


def render_all(
    config: GenerateConfig,
    run: Run,
    decisions: Decisions,
    progress: Progress,
    *,
    deadline: float | None,
    retry_failed: bool,
) -> Rendered:
    """Draw every planned item, but those that `deadline` (seconds since 1970) leaves no time for.

    A row that fails keeps its place, with a null image and the reason. With `retry_failed` such rows of an attempt before are
    drawn again, as an attempt of their own.
    """
    files: list[dict[str, Any]] = []
    late = False
    for unit in range(decisions.units):
        marker = read_json(run.unit(unit))
        late_no_more = marker is not None and marker["late"] and (deadline is None or time.time() < deadline)
        if marker is None or late_no_more or (retry_failed and marker["failed"]):
            marker = render_unit(config, run, unit, None if late_no_more else marker, progress, deadline)
        files += marker["files"]
        late = late or marker["late"]
    return Rendered(files=files, late=late)


def render_unit(
    config: GenerateConfig,
    run: Run,
    unit: int,
    marker: dict[str, Any] | None,
    progress: Progress,
    deadline: float | None,
) -> dict[str, Any]:
    """Draw what is not yet drawn of one unit, and write its marker; returns it. A `marker` that is there says: draw what failed again."""
    attempt = marker["attempt"] + 1 if marker else 0
    records = read_records(run, unit)
    attempt = max([attempt, *(record["attempt"] for record in records)])
    done = drawn_items(run, records, failed_too=lambda record: marker is None or record["attempt"] == attempt)
    parts = [part for part in (read_json(join(run.work, "plan.json")) or {})["parts"] if part["unit"] == unit]
    parts.sort(key=lambda part: part["bucket"])  # so that few files hold parts of two
    total = sum(part["rows"] for part in parts)
    if len(done) < total and (deadline is None or time.time() < deadline):
        stages = graph(config, run, unit, parts, done, attempt, deadline)
        progress.follow("render", stages, of=total - len(done))
        records = read_records(run, unit)
    drawn = sum(record["rows"] for record in records)
    failed = sum(record["failed"] for record in records)
    if drawn != total or attempt:  # drawn twice, or not at all: the ids tell
        everything = drawn_items(run, records, failed_too=lambda record: True)
        drawn, failed = (
            len(everything),
            len(everything) - len(drawn_items(run, records, failed_too=lambda record: False)),
        )
    whole = drawn == total
    written = {
        "attempt": attempt,
        "files": [{name: value for name, value in record.items() if name != BUSY} for record in records],
        "late": not whole,
        "failed": failed,
    }
    if not whole and (
        deadline is None or time.time() < deadline - CLOCKS_DIFFER
    ):  # rows were lost: no marker, so that the next attempt draws them
        return {**written, "late": False}
    write_json(written, run.unit(unit))
    return written


def graph(
    config: GenerateConfig,
    run: Run,
    unit: int,
    parts: list[dict[str, Any]],
    done: pa.Array,
    attempt: int,
    deadline: float | None,
) -> Any:
    """The stages of one unit, as a Ray Data dataset of records that is not yet run."""
    import ray

    decoder, served = config.decoder, config.decoder.backend == "triton"
    rows = decoder.batch_size * (BATCHES_PER_CALL if served else 1)
    filesystem, work = open_filesystem(run.work)
    writer = WriteParts(
        run.root,
        run.images,
        by=["bucket"],
        epoch=run.epoch,
        row_group_size=ROW_GROUP,
        records=run.records(unit),
        metadata=schemas.IMAGES.metadata,
        note={"unit": unit, "attempt": attempt},
    )
    planned = ray.data.read_parquet(
        [join(work, part["path"]) for part in parts],
        filesystem=arrow_filesystem(filesystem),
        partitioning=None,
    ).select_columns(["item_id", "bucket", "image_embeds", "prompt", "negative_prompt"])
    if len(done):
        planned = planned.map_batches(
            ExcludeIds(ray.put(done)), batch_format="pyarrow", batch_size=None, num_cpus=WRITER_CPUS
        )
    return (
        planned.repartition(target_num_rows_per_block=rows)
        .map_batches(
            RenderImages,
            fn_constructor_args=(decoder, deadline),
            batch_size=rows,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=decoder.num_actors),
            num_cpus=decoder.cpus_per_actor,
            num_gpus=0 if served or decoder.device == "cpu" else 1,
            resources={"decoder_slot": 1} if served else None,
        )
        .map_batches(
            writer, batch_size=config.layout.images_per_file, batch_format="pyarrow", num_cpus=WRITER_CPUS
        )
    )


def read_records(run: Run, unit: int) -> list[dict[str, Any]]:
    """The records of a unit's files: of all that were written to the end."""
    with ThreadPoolExecutor(16) as pool:
        return [record for record in pool.map(read_json, list_files(run.records(unit), ".json")) if record]


def seconds_so_far(run: Run, decisions: Decisions) -> float:
    """What all actors together have drawn for in this run."""
    return float(sum(record[BUSY] for unit in range(decisions.units) for record in read_records(run, unit)))


def drawn_items(run: Run, records: list[dict[str, Any]], failed_too: Any) -> pa.Array:
    """The ids in some files, each once; those that failed only of the files that `failed_too` says."""
    filesystem, root = open_filesystem(run.root)

    def items(record: dict[str, Any]) -> pa.Array:
        with filesystem.open(
            join(root, record["path"]), "rb", cache_type="none"
        ) as file:  # not the pixels between
            table = pq.read_table(file, columns=["item_id", "error"])
        return (table if failed_too(record) else table.filter(pc.is_null(table["error"])))[
            "item_id"
        ].combine_chunks()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(items, records))
    return pc.unique(pa.concat_arrays(found)) if found else pa.array([], pa.string())


def check_renderer(decoder: DecoderSettings) -> None:
    """Where a render actor would run, see whether its server or its safety checker is there, before anything is planned."""
    if decoder.backend == "local" and not decoder.safety.checker:
        return
    import ray

    served = decoder.backend == "triton"
    needed = {
        "num_cpus": decoder.cpus_per_actor,
        "num_gpus": 0 if served or decoder.device == "cpu" else 1,  # a checker may be on the GPU
        "resources": {"decoder_slot": 1.0} if served else {},
    }
    work = ray.remote(max_retries=0)(check_decoder).options(**needed)
    try:
        ray.get(work.remote(decoder))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


class RenderImages:
    """One planned row in, one row of `schemas.IMAGES` out, in the same order, with its bucket; none once `deadline` has passed."""

    def __init__(self, settings: DecoderSettings, deadline: float | None = None) -> None:
        self.settings, self.decoder, self.deadline = settings, build_decoder(settings), deadline

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.deadline is not None and time.time() > self.deadline:
            batch = batch.slice(0, 0)
        started = time.perf_counter()
        images = self.draw(batch) if batch.num_rows else schemas.IMAGES.empty_table()
        return with_busy_seconds(
            images.append_column("bucket", batch["bucket"]), time.perf_counter() - started
        )

    def draw(self, batch: pa.Table) -> pa.Table:
        item_ids = batch["item_id"].to_pylist()
        rows = Rows.of(
            self.settings,
            batch["image_embeds"].combine_chunks().flatten().to_numpy().reshape(batch.num_rows, -1),
            [identity.image_seed(item) for item in item_ids],
            batch["prompt"].to_pylist(),
            batch["negative_prompt"].to_pylist(),
        )
        kind = self.settings.image_format.lower()
        images = [
            {
                **asdict(drawn),
                "item_id": item,
                "image": drawn.image and {"bytes": drawn.image, "path": f"{item}.{kind}"},
            }
            for item, drawn in zip(item_ids, self.decode(rows), strict=True)
        ]
        assert len(images) == batch.num_rows
        return pa.Table.from_pylist(images, schema=schemas.IMAGES)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """An actor whose server is lost ends, so that Ray starts another where a decoder slot is free, and tries these rows again."""
        try:
            return self.decoder.decode(rows)
        except ServerLostError as error:
            log.error(f"render actor ends: {error}")
            os._exit(
                1
            )  # an exception would fail the run, and Ray takes a polite exit for the actor's own wish
