"""How busy the networks of a render actor are, with one call at a time and with two.

One actor on Ray renders a plan; the share is the time in the networks, from the first image to the last one.
The decoders are the bundled one with one thread, and a stand-in for a GPU: it draws 16 images of 512 pixels
by waiting a second. Checks and encoding are real.

    python -m tests.bench.rendering [--batches 12]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.render import COLUMNS, RenderImages
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.stickers import DECODER, EMBED_DIM

RESULTS = Path(__file__).parent / "results" / "rendering.json"
BUNDLED = DecoderSettings(
    model=str(DECODER), num_inference_steps=5, decoder_guidance_scale=3.0, batch_size=40, dtype="auto"
)
STAND_IN = BUNDLED.model_copy(update={"batch_size": 16})
SECONDS, PIXELS = 1.0, 512  # of a batch and of an image of the stand-in


class TimedActor(RenderImages):
    """A render actor that writes the start and the end of each batch in its networks to a file."""

    def __init__(self, settings: DecoderSettings, file: str, stand_in: bool) -> None:
        super().__init__(settings)
        torch.set_num_threads(1)
        self.decoder.threads = 1
        networks = waiting if stand_in else self.decoder.loop.draw

        def timed(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
            started = time.time()
            drawn = networks(rows)
            with Path(file).open("a") as lines:
                lines.write(f"{started} {time.time()}\n")
            return drawn

        self.decoder.loop.draw = timed


def waiting(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Stand in for a GPU: wait, and return smooth images, which encode like drawn ones."""
    started = time.perf_counter()
    coarse = torch.rand(
        (len(rows), 3, 16, 16), generator=torch.Generator().manual_seed(rows.seeds[0] % 2**31)
    )
    smooth = torch.nn.functional.interpolate(coarse, (PIXELS, PIXELS), mode="bicubic").clamp(0, 1)
    images = (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().numpy()
    time.sleep(max(0.0, SECONDS - (time.perf_counter() - started)))
    return images, np.ones(len(rows), bool)


def busy_share(settings: DecoderSettings, batches: int, calls: int, stand_in: bool) -> float:
    """Return the share of the time that the networks of one actor are busy."""
    count = batches * settings.batch_size
    embeds = np.random.default_rng(0).standard_normal(count * EMBED_DIM).astype(np.float32)
    columns = {
        "item_id": [f"item-{number}" for number in range(count)],
        "bucket": pa.array([0] * count, pa.int32()),
        "image_embeds": pa.FixedSizeListArray.from_arrays(pa.array(embeds), EMBED_DIM),
        "prompt": [""] * count,
        "negative_prompt": [""] * count,
    }
    with tempfile.TemporaryDirectory() as folder:
        plan, times = f"{folder}/plan.parquet", f"{folder}/times"
        pq.write_table(pa.table(columns), plan)
        stage = Stage(
            work=TimedActor,
            arguments=(settings, times, stand_in),
            batch_size=settings.batch_size,
            rows_per_block=settings.batch_size,
            actors=Actors(count=1, cpus=1, calls=calls),
        )
        drawn = sum(batch.num_rows for batch in run_graph([plan], [stage], columns=COLUMNS, in_process=False))
        assert drawn == count
        spans = np.sort(np.loadtxt(times), axis=0)
    return float((spans[:, 1] - spans[:, 0]).sum() / (spans[-1, 1] - spans[0, 0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=12)
    arguments = parser.parse_args()
    start_ray()
    table, results = Table("decoder", "calls at a time", "networks busy"), {}
    for name, settings in (("bundled, one thread", BUNDLED), ("stand-in for a GPU", STAND_IN)):
        for calls in (1, 2):
            share = busy_share(settings, arguments.batches, calls, settings is STAND_IN)
            results[f"{name}, {calls} calls"] = share
            table.add_row(name, str(calls), f"{share:.1%}")
    Console().print(table)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
