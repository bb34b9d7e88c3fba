"""Images and TFLOP per second of Stable Diffusion 1.5 or XL on one NVIDIA GPU, by variant and batch size.

The exact configurations are built on the GPU in float16, with random weights: 512 pixels and 20 guided steps
for 1.5, 1024 pixels and 10 for XL. The variants are torch (channels last), guidance in a part of the steps,
shallow passes between whole ones, and the UNet compiled with CUDA graphs (`decoder.compile`). `--tensorrt`
exports Stable Diffusion 1.5, builds its engines and measures them, which takes minutes.
`--tiny` tries the script on a CPU with tiny models.

    python -m tests.bench.decoding_gpu {sd15,sdxl} [--compile] [--tensorrt] [--batch-sizes 1 4 16 32]
        [--out tests/bench/results] [--tiny]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.families import sd, sdxl
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import Networks
from tests.bench.gpu_report import RESULTS, GpuReport, count_tflop
from tests.gpu.sd15 import CONTEXT, EMBED_DIM, attach_adapter, build_sd15, write_sd15
from tests.gpu.sdxl import build_sdxl
from tests.tiny_decoder import write_tiny_decoder
from tests.tiny_sdxl import write_tiny_sdxl

BUILD_ENGINES = Path(__file__).parents[2] / "serving" / "build_engines.py"
WARM_STEPS = 3  # a guided, an unguided and a shallow pass; CUDA graphs are recorded at the second call
VARIANTS = {
    "torch": {},
    "guidance 0.2 to 0.8": {"guidance_interval": (0.2, 0.8)},
    "every 2nd pass shallow": {"cache_interval": 2},
}
COMPILED = {"compiled, CUDA graphs": {"compile": True}}
Load = Callable[[DecoderSettings], Networks]


def load_sd15(settings: DecoderSettings) -> Networks:
    pipeline = build_sd15(settings.device)
    attach_adapter(pipeline, CONTEXT)
    return sd.run_pipeline(settings, pipeline)


def load_sdxl(settings: DecoderSettings) -> Networks:
    return sdxl.run_pipeline(settings, build_sdxl(settings.device))


def model_of(name: str, folder: Path, *, tiny: bool) -> tuple[DecoderSettings, Load]:
    """Return the settings of a model and the function that loads it; tiny ones lie in `folder`."""
    if tiny:
        write = write_tiny_decoder if name == "sd15" else write_tiny_sdxl
        return write(folder, EMBED_DIM).model_copy(update={"num_inference_steps": 5}), load_networks
    steps, load = (20, load_sd15) if name == "sd15" else (10, load_sdxl)
    return DecoderSettings(model=name, num_inference_steps=steps, device="cuda", dtype="float16"), load


def rows_of(settings: DecoderSettings, count: int) -> Rows:
    embeds = np.random.default_rng(0).standard_normal((count, EMBED_DIM)).astype(np.float32)
    return Rows.of(settings, embeds, range(count))


def images_per_second(loop: DenoisingLoop, rows: Rows) -> float:
    started = time.perf_counter()
    loop.draw(rows)  # ends with a copy to the host, which waits for the GPU
    return len(rows) / (time.perf_counter() - started)


def measure_variant(
    report: GpuReport, labels: dict[str, str], settings: DecoderSettings, load: Load, batches: list[int]
) -> None:
    """Add the rate of each batch size to the report."""
    networks = load(settings)
    loop = DenoisingLoop(networks, settings)
    # A compiled UNet or an engine hides its products from the counter, so torch draws an image for it.
    plain = settings.model_copy(update={"compile": False, "engine": "torch", "engine_dir": None})
    counted = loop if plain == settings else DenoisingLoop(load(plain), plain)
    tflop = count_tflop(partial(counted.draw, rows_of(plain, 1)))
    few = DenoisingLoop(networks, settings.model_copy(update={"num_inference_steps": WARM_STEPS}))
    for batch in batches:
        rows = rows_of(settings, batch)
        torch.compiler.reset()  # a decoder has one batch size, and its graphs are compiled for that
        report.measure(
            {**labels, "batch": batch},
            tflop=tflop,
            warm=partial(few.draw, rows),
            rate=partial(images_per_second, loop, rows),
        )


def measure_tensorrt(report: GpuReport, batches: list[int], folder: Path) -> None:
    """Export Stable Diffusion 1.5, build its engines, and add their rates to the report."""
    settings, _ = model_of("sd15", folder, tiny=False)
    settings = settings.model_copy(update={"model": str(write_sd15(folder))})
    engines = folder / "engines"
    export_decoder(settings, engines)
    command = [sys.executable, str(BUILD_ENGINES), str(engines), "--batch-size", str(max(batches))]
    subprocess.run(command, check=True)
    settings = settings.model_copy(
        update={"engine": "tensorrt", "engine_dir": str(engines), "batch_size": max(batches)}
    )
    measure_variant(report, {"model": "sd15", "variant": "TensorRT"}, settings, load_networks, batches)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["sd15", "sdxl"], nargs="?", default="sd15")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tensorrt", action="store_true")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        Console().print("no NVIDIA GPU here: nothing to measure")
        return
    sd.quiet_libraries()
    report = GpuReport(arguments.out, tiny=arguments.tiny)
    batches = arguments.batch_sizes[: 1 if arguments.tiny else None]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tensorrt:
            measure_tensorrt(report, batches, Path(folder))
            return
        settings, load = model_of(arguments.model, Path(folder), tiny=arguments.tiny)
        for variant, changes in (COMPILED if arguments.compile else VARIANTS).items():
            labels = {"model": arguments.model, "variant": variant}
            measure_variant(report, labels, settings.model_copy(update=changes), load, batches)


if __name__ == "__main__":
    main()
