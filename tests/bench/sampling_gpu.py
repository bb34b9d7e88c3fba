"""Embeddings per second of the prior on one NVIDIA GPU: 20 guided steps of DPM-Solver++ in large batches.

The network has its default size at D = 1024, in float32 with random weights. A batch is one call of
`sample_liked`. `--tiny` tries the script on a CPU.

    python -m tests.bench.sampling_gpu [--out tests/bench/results] [--tiny]
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from rebeca_ray.config.sections import DiffusionSettings
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.users import UserTable
from tests.bench.gpu_report import RESULTS, GpuReport, count_tflop
from tests.bench.sampling import GUIDANCE, NETWORK, PER_USER, D, ours, wake


def measure_prior(report: GpuReport, steps: int, batches: list[int]) -> None:
    """Add the rate of each batch size to the report."""
    prior = wake(Prior(NETWORK, D)).to(report.device)
    diffusion = Diffusion.build(DiffusionSettings(), report.device)
    users_UH = UserTable(max(batches) // PER_USER + 1, 1, NETWORK.width).rows_VUH.to(report.device)

    def rate(rows: int) -> float:
        return ours(
            prior, diffusion, users_UH, sampler="dpm_solver", steps=steps, guidance=GUIDANCE, rows=rows
        )

    tflop = count_tflop(lambda: rate(batches[0])) / batches[0]
    for rows in batches:
        labels = {"model": "prior", "variant": f"{steps} guided steps", "batch": rows}
        run = partial(rate, rows)
        report.measure(labels, tflop=tflop, warm=run, rate=run)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        Console().print("no NVIDIA GPU here: nothing to measure")
        return
    steps, batches = (2, [16, 32]) if arguments.tiny else (20, [256, 2048, 8192, 32768])
    measure_prior(GpuReport(arguments.out, tiny=arguments.tiny), steps, batches)


if __name__ == "__main__":
    main()
