"""Cost and false alarms of the bundled safety checker.

Cost: CPU time per image of drawing on the bundled decoder, by number format, and of checking, in turn, and
their ratio. False alarms: bundled stickers above some values of `max_probability`, with and without Sexy.

    python -m tests.bench.safety [--rounds 5] [--threads 1]
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.choices import computes_bfloat16
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.safety_model.network import BundledChecker
from rebeca_ray.stickers import DECODER, EMBED_DIM, ITEMS

RESULTS = Path(__file__).parent / "results" / "safety.json"
BATCH = 40
LIMITS = (0.5, 0.7, 0.9)
Dtype = Literal["float32", "bfloat16"]
SETTINGS = DecoderSettings(
    model=str(DECODER), num_inference_steps=5, decoder_guidance_scale=3.0, batch_size=BATCH
)


def cpu_ms(run: Callable[[], object]) -> float:
    """Return the CPU time of a call, in milliseconds per image."""
    started = time.process_time()
    run()
    return 1e3 * (time.process_time() - started) / BATCH


def cost(dtype: Dtype, rounds: int) -> dict[str, float]:
    """Return medians of CPU milliseconds per image, and the share of the check."""
    decoder = LocalDecoder(SETTINGS.model_copy(update={"dtype": dtype}))
    checker = decoder.checker
    assert checker is not None
    embeds = np.random.default_rng(0).standard_normal((BATCH, EMBED_DIM)).astype(np.float32)
    rows = Rows.of(SETTINGS, embeds, range(BATCH))
    images = np.stack([image for image in decoder.draw(rows) if not isinstance(image, str)])
    draws, checks = [], []
    for _ in range(rounds):
        draws.append(cpu_ms(lambda: decoder.draw(rows)))
        checks.append(cpu_ms(lambda: checker(images)))
    draw, check = statistics.median(draws), statistics.median(checks)
    return {"draw_ms": draw, "check_ms": check, "check_per_draw": check / draw}


def false_alarms(checker: BundledChecker) -> dict[str, int]:
    """Return the number of stickers above each limit."""
    column = pq.read_table(ITEMS, columns=["image"])["image"].to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in column])
    classes = checker.classify(images)
    unsafe, without_sexy = classes[:, checker.unsafe].sum(1), classes[:, [1, 3]].sum(1)
    counts = {"stickers": len(images)}
    for limit in LIMITS:
        counts[f"above {limit}"] = int((unsafe > limit).sum())
        counts[f"above {limit} without Sexy"] = int((without_sexy > limit).sum())
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    formats: tuple[Dtype, ...] = ("float32", "bfloat16") if computes_bfloat16() else ("float32",)
    results = {dtype: cost(dtype, arguments.rounds) for dtype in formats}
    table = Table("", *results)
    for name in results["float32"]:
        table.add_row(name, *(f"{figures[name]:.3g}" for figures in results.values()))
    alarms = false_alarms(BundledChecker("cpu"))
    Console().print(table, alarms)
    RESULTS.write_text(json.dumps({"threads": arguments.threads, **results, **alarms}, indent=2) + "\n")


if __name__ == "__main__":
    main()
