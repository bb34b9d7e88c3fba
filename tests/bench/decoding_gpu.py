"""Images and TFLOP per second of Stable Diffusion 1.5 at 512 pixels on one NVIDIA GPU, by engine and batch.

The weights are random, in its exact configuration: float16, 25 guided steps, as `decoder:` runs them. The
variants are torch (channels last), torch compiled with CUDA graphs (`decoder.compile`), TensorRT if it is
installed, and the reference: one image at a time in float32 with 50 steps.

    python -m tests.bench.decoding_gpu [--batch-sizes 1 8 16 32] [--image-size 512] [--steps 25] [--device …]

`--device cpu --image-size 64 --steps 2 --batch-sizes 1` tries the script on a machine without a GPU.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.interface import Rows
from tests.gpu.sd15 import EMBED_DIM, write_sd15

RESULTS = Path(__file__).parent / "results"
BUILD_ENGINES = Path(__file__).parents[2] / "serving" / "build_engines.py"
# One 512-pixel image: a pass of the UNet, and of the autoencoder's decoder.
UNET_TFLOP, VAE_TFLOP = 0.803, 2.515
ROUNDS = 3


def images_per_second(settings: DecoderSettings, batch_size: int) -> float:
    """Return the median of some rounds, after one that compiles, captures and warms up."""
    loop = DenoisingLoop(load_networks(settings), settings)
    embeds = np.random.default_rng(0).standard_normal((batch_size, EMBED_DIM)).astype(np.float32)
    rows = Rows.of(settings, embeds, range(batch_size))
    rates = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        loop.draw(rows)  # ends with a copy to the host, which waits for the GPU
        rates.append(batch_size / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def ways(
    half: DecoderSettings, folder: Path, batch_sizes: list[int]
) -> Iterator[tuple[str, DecoderSettings, list[int]]]:
    """Yield each variant: its name, its settings and its batch sizes."""
    reference = {"dtype": "float32", "num_inference_steps": 2 * half.num_inference_steps, "scheduler": "ddim"}
    yield "reference: float32, twice the steps", half.model_copy(update=reference), [1]
    yield "torch, channels last", half, batch_sizes
    if half.device == "cuda":
        yield "torch, compiled, CUDA graphs", half.model_copy(update={"compile": True}), batch_sizes
    if importlib.util.find_spec("tensorrt"):
        export_decoder(half, folder / "engines")
        command = [
            sys.executable,
            str(BUILD_ENGINES),
            str(folder / "engines"),
            "--batch-size",
            str(max(batch_sizes)),
        ]
        subprocess.run(command, check=True)
        yield (
            "TensorRT",
            half.model_copy(update={"engine": "tensorrt", "engine_dir": str(folder / "engines")}),
            batch_sizes,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        Console().print("no NVIDIA GPU here: nothing to measure")
        return
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    tflop = (2 * UNET_TFLOP * arguments.steps + VAE_TFLOP) * (arguments.image_size / 512) ** 2
    rates: dict[str, dict[str, float]] = {}
    table = Table(f"{name}, {arguments.image_size} pixels", "batch", "images/s", "TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        half = DecoderSettings(
            model=str(write_sd15(Path(folder))),
            num_inference_steps=arguments.steps,
            decoder_guidance_scale=5.0,
            image_size=arguments.image_size,
            batch_size=max(arguments.batch_sizes),
            device=arguments.device,
            dtype="float16" if arguments.device == "cuda" else "float32",
        )
        for way, settings, batch_sizes in ways(half, Path(folder), arguments.batch_sizes):
            for batch_size in batch_sizes:
                rate = images_per_second(settings, batch_size)
                passes = settings.num_inference_steps / arguments.steps
                rates.setdefault(way, {})[str(batch_size)] = rate
                table.add_row(way, str(batch_size), f"{rate:.2f}", f"{rate * tflop * passes:.1f}")
    Console().print(table)
    if arguments.device == "cuda":
        path = RESULTS / f"decoding-{name.lower().replace(' ', '-')}.json"
        path.write_text(
            json.dumps({"device": name, "steps": arguments.steps, "images_per_second": rates}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
