"""Embed: `rebeca embed` with one actor, and a bare open_clip loop over the same files.

    python -m tests.bench.waste.embed pass|loop stickers|photos IMAGES

Both have one thread on one core. The images are the bundled stickers of 64 pixels, or JPEGs of 512 pixels.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data import embedding
from rebeca_ray.pixels import open_image
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.stickers import CLIP, ITEMS
from tests.bench.waste.machine import leave_the_work_core, processor_time, report, take_the_work_core
from tests.bench.waste.render import TIMES, jpegs, note

BATCH, ROWS_PER_FILE = 64, 1000


class TimedEmbed(embedding.EmbedImages):
    """An actor on one core that notes each of its calls."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        take_the_work_core()

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.time()
        embedded = super().__call__(batch)
        note(started)
        return embedded


def write_items(folder: str, kind: str, count: int) -> None:
    """Write `count` items in files of ROWS_PER_FILE rows."""
    os.makedirs(folder)
    if kind == "stickers":
        images = [value["bytes"] for value in pq.read_table(ITEMS, columns=["image"])["image"].to_pylist()]
    else:
        images = jpegs(64)
    for start in range(0, count, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, count))
        rows = [
            {"item_id": f"item-{number}", "image": {"bytes": images[number % len(images)], "path": None}}
            for number in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), f"{folder}/{start:08d}.parquet")


def on_ray(items: str, folder: str, count: int) -> None:
    """Embed by one actor. The end is that of the command, with the written and published version."""
    leave_the_work_core()
    os.environ[TIMES] = f"{folder}/times"
    embedding.EmbedImages = TimedEmbed  # type: ignore[misc]
    start_ray()
    config = EmbedConfig(
        items=items,
        out=f"{folder}/out",
        clip=f"local-dir:{CLIP}",
        batch_size=BATCH,
        num_actors=1,
        cpus_per_actor=0.5,
    )
    with processor_time() as measured:
        started = time.time()
        assert embedding.embed_items(config) == count
        ended = time.time()
    spans = np.sort(np.loadtxt(os.environ[TIMES]), axis=0)
    start = spans[0, 0]
    processor = {
        kind: round(1000 * seconds / count, 2) for kind, seconds in measured.between(start, ended).items()
    }
    report(
        {
            "images_per_second": (count - BATCH) / (ended - spans[0, 1]),
            "busy_share": float((spans[:, 1] - spans[:, 0]).sum() / (spans[-1, 1] - start)),
            "seconds_to_first_call": round(start - started, 2),
            "seconds_after_last_call": round(ended - spans[-1, 1], 2),
            "cpu_seconds_per_1000_images": processor,
        }
    )


def bare_loop(items: str, folder: str, count: int) -> None:
    """Embed as the shortest script does: read, decode, preprocess, encode, write."""
    take_the_work_core()
    torch.set_num_threads(1)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    model.eval()
    ended, embeds = [], []
    for path in sorted(Path(items).iterdir()):
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            images = [open_image(value["bytes"]).convert("RGB") for value in batch["image"].to_pylist()]
            with torch.inference_mode():
                embeds.append(model.encode_image(torch.stack([preprocess(image) for image in images])))
            ended.append(time.time())
    flat = torch.cat(embeds).numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    ids = pa.concat_tables(
        [pq.read_table(path, columns=["item_id"]) for path in sorted(Path(items).iterdir())]
    )
    pq.write_table(ids.append_column("image_embeds", column), f"{folder}/embeds.parquet")
    report({"images_per_second": (count - BATCH) / (time.time() - ended[0])})


if __name__ == "__main__":
    arm, kind, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory() as work:
        write_items(f"{work}/items", kind, number)
        (on_ray if arm == "pass" else bare_loop)(f"{work}/items", work, number)
