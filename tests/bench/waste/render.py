"""Render: a pass on Ray with one actor, and a bare loop around the same decoder.

    python -m tests.bench.waste.render gaps IMAGES [SECONDS ACTORS]
    python -m tests.bench.waste.render pass|loop IMAGES

gaps: the decoder is a stand-in that sleeps SECONDS for each batch of 16 and returns JPEGs of some 63 kB. By
default 0.16: 100 images per second, a GPU with very few steps.
pass, loop: the bundled decoder, with its one thread pinned to one core.
"""

import io
import os
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.generation import render
from rebeca_ray.generation.context import Models, RunContext
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.progress import Progress
from rebeca_ray.identity import image_seed
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import write_record
from tests.bench.waste.machine import leave_the_work_core, processor_time, report, take_the_work_core

BUNDLED = DecoderSettings(
    model=str(DECODER), num_inference_steps=5, decoder_guidance_scale=3.0, batch_size=40, dtype="auto"
)
STAND_IN = BUNDLED.model_copy(update={"batch_size": 16})
TIMES = "REBECA_BENCH_TIMES"  # the file that receives start, end and process of each call
SECONDS = "REBECA_BENCH_SECONDS"  # of a batch of the stand-in


class StandIn:
    """A decoder that sleeps, one call at a time."""

    def __init__(self) -> None:
        self.drawing = threading.Lock()
        self.images = jpegs(16)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        with self.drawing:
            started = time.time()
            time.sleep(float(os.environ[SECONDS]))
            note(started)
        images = (self.images[seed % len(self.images)] for seed in rows.seeds)
        return [
            DecodedImage(seed=seed, image=image, thumbnail=image[:3000], width=512, height=512)
            for seed, image in zip(rows.seeds, images, strict=True)
        ]


def jpegs(count: int) -> list[bytes]:
    """Return different JPEGs of 512 pixels and some 63 kB."""
    encoded = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (90, 90, 3), np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=80)
        encoded.append(file.getvalue())
    return encoded


def note(started: float) -> None:
    with Path(os.environ[TIMES]).open("a") as lines:
        lines.write(f"{started} {time.time()} {os.getpid()}\n")


class TimedStandIn(render.RenderImages):
    """A render actor whose decoder is the stand-in."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.decoder = StandIn()


class TimedBundled(render.RenderImages):
    """A render actor on one core that notes each of its calls."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        self.decoder.threads = 1
        take_the_work_core()
        draw = self.decoder.loop.draw

        def timed(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
            started = time.time()
            drawn = draw(rows)
            note(started)
            return drawn

        self.decoder.loop.draw = timed


def random_embeds(count: int) -> np.ndarray:
    return 0.7 * np.random.default_rng(0).standard_normal((count, EMBED_DIM)).astype(np.float32)


def context_of(settings: DecoderSettings, folder: str, count: int) -> tuple[RunContext, Decisions]:
    """Write the plan of a run of `count` items; return its context and decisions."""
    run = Run(root=f"{folder}/catalog", run_date="2026-01-01", run_id="waste", fencing_token=1)
    columns = {
        "item_id": [f"{number:032x}" for number in range(count)],
        "image_embeds": pa.FixedSizeListArray.from_arrays(
            pa.array(random_embeds(count).ravel()), type=schemas.image_embeds(EMBED_DIM)
        ),
        "prompt": [""] * count,
        "negative_prompt": [""] * count,
        "bucket": pa.array([0] * count, pa.int32()),
    }
    written = write_table(pa.table(columns), f"{run.plan}/0.parquet", row_group_size=20_000)
    part = {"bucket": 0, "shard": 0, "attempt": 0, "path": "plan/0.parquet", "failed": 0, "busy_seconds": 0.0}
    write_record({"decisions": "any", "parts": [part | written]}, run.plan_marker)
    config = GenerateConfig(
        prior="any",
        decoder=settings,
        request="any",
        catalog=run.root,
        layout=LayoutSettings(num_buckets=1),
    )
    fingerprint = identify_decoder(settings).fingerprint(settings)
    models = Models(
        versions={"prior": "prior", "decoder": fingerprint, "code": "0"},
        decoder_weights={},
        safety_checker="none",
        embed_dim=EMBED_DIM,
        clip_fingerprint=None,
        can_rescore=True,
        user_encoder="none",
    )
    context = RunContext(
        config=config,
        run=run,
        models=models,
        previous=None,
        requested=count,
        began_at=datetime.now(UTC),
        in_process=False,
    )
    decisions = Decisions(
        pool=None, by_urgency=False, boundaries=[], planned_users=count, planned_items=count, shards=1
    )
    return context, decisions


def on_ray(actor: type, settings: DecoderSettings, count: int) -> None:
    """Render `count` images by one actor; report the seconds of its calls, and the processor time beside."""
    if actor is TimedBundled:
        leave_the_work_core()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TIMES] = f"{folder}/times"
        render.RenderImages = actor  # type: ignore[misc]
        start_ray()
        context, decisions = context_of(settings, folder, count)
        with processor_time() as measured:
            started = time.time()
            rendered = render.render_all(context, decisions, Progress(), deadline=None, retry_failed=False)
            ended = time.time()
        assert sum(record.rows for record in rendered.files) == count
        first = pq.read_table(f"{context.run.root}/{rendered.files[0].path}", columns=["image"])
        size = np.mean([len(value["bytes"]) for value in first.slice(0, 16)["image"].to_pylist()])
        spans = np.loadtxt(os.environ[TIMES])
    spans = spans[np.argsort(spans[:, 0])]
    start, end = spans[0, 0], spans[:, 1].max()
    busy = float((spans[:, 1] - spans[:, 0]).sum())
    processor = {
        kind: round(1000 * seconds / count, 2) for kind, seconds in measured.between(start, ended).items()
    }
    report(
        {
            "images": count,
            "kb_per_image": round(float(size) / 1000, 1),
            "busy_share": busy / settings.num_actors / (end - start),
            "images_per_second": (count - settings.batch_size) / (end - spans[0, 1]),
            "images_per_second_of_full_pool": settings.batch_size * full_rate(spans),
            "seconds_to_first_call": round(start - started, 2),
            "seconds_to_full_pool": round(full_from(spans) - started, 2),
            "seconds_after_last_call": round(ended - end, 2),
            "cpu_seconds_per_1000_images": processor,
        }
    )


def full_from(spans: np.ndarray) -> float:
    """Return when the last actor began its first call."""
    return float(max(spans[spans[:, 2] == actor, 0].min() for actor in np.unique(spans[:, 2])))


def full_rate(spans: np.ndarray) -> float:
    """Return the calls per second while every actor was at work."""
    until = min(spans[spans[:, 2] == actor, 1].max() for actor in np.unique(spans[:, 2]))
    ends = np.sort(spans[(spans[:, 0] >= full_from(spans)) & (spans[:, 1] <= until), 1])
    return float((len(ends) - 1) / (ends[-1] - ends[0]))


def bare_loop(count: int) -> None:
    """Decode `count` images, batch by batch, without anything around the decoder."""
    take_the_work_core()
    torch.set_num_threads(1)
    decoder = build_decoder(BUNDLED)
    embeds, size = random_embeds(count), BUNDLED.batch_size
    ended = []
    for start in range(0, count, size):
        seeds = [image_seed(f"{number:032x}") for number in range(start, min(start + size, count))]
        rows = Rows.of(BUNDLED, embeds[start : start + size], seeds)
        assert len(decoder.decode(rows)) == len(seeds)
        ended.append(time.time())
    report({"images": count, "images_per_second": (count - size) / (ended[-1] - ended[0])})


if __name__ == "__main__":
    arm, images, *rest = sys.argv[1:]
    if arm == "loop":
        bare_loop(int(images))
    elif arm == "pass":
        on_ray(TimedBundled, BUNDLED, int(images))
    else:
        pause, actors = rest or ("0.16", "1")
        os.environ[SECONDS] = pause
        share = {"num_actors": int(actors), "cpus_per_actor": min(1.0, 1 / int(actors))}
        on_ray(TimedStandIn, STAND_IN.model_copy(update=share), int(images))
