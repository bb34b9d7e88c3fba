"""Embeddings sampled per second, against the reference loop, on the default network at D = 1024.

The reference has 1000 ancestral DDPM steps, two separate forward passes per step, one user and 10
embeddings per call, in float32. All variants use the same weights and threads, in turn, for several rounds.
The table gives medians. Long loops run a part of their steps, and the time is scaled up. Every step costs
the same, so only the start is neglected.

    python tests/bench/sampling.py [--rounds 3] [--threads 2] [--no-compile]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.sections import DiffusionSettings, NetworkSettings, PriorSampling, SamplerSettings
from rebeca_ray.noise import item_noise
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.denoisers import LIKE, NULL_RATING, Prior
from rebeca_ray.prior.diffusion import Denoiser, Diffusion
from rebeca_ray.prior.sampling import SAMPLERS, sample_liked
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.users import UserTable, UserVectors

RESULTS = Path(__file__).parent / "results"
D, NUM_USERS, PER_USER, GUIDANCE = 1024, 210, 10, 4.0
STEPS, DISTILLED_STEPS, TILE, SELECTOR_GUIDANCE = 8, 4, 256, 12.0
NETWORK = NetworkSettings(user_encoder="id")


def wake(prior: Prior) -> Prior:
    """Replace the zeros of an untrained network by random numbers."""
    torch.manual_seed(0)
    for parameter in prior.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return prior.eval()


def two_passes(prior: Prior, diffusion: Diffusion, user_BUH: torch.Tensor) -> Denoiser:
    """Return the guidance of the reference: two calls of the network per step, nothing kept."""
    rows = len(user_BUH)
    null_BUH = prior.null_user_UH.expand(rows, -1, -1)

    def denoise(x_BD: torch.Tensor, timestep: int) -> torch.Tensor:
        timestep_B = torch.full((rows,), timestep)
        conditional = prior(x_BD, timestep_B, prior.condition(user_BUH, torch.full((rows,), LIKE)))
        unconditional = prior(x_BD, timestep_B, prior.condition(null_BUH, torch.full((rows,), NULL_RATING)))
        return diffusion.denoised(
            unconditional + GUIDANCE * (conditional - unconditional), x_BD, timestep_B[:1]
        )

    return denoise


@torch.inference_mode()
def plain(
    prior: Prior,
    diffusion: Diffusion,
    users_UH: torch.Tensor,
    *,
    sampler: str,
    steps: int,
    run: int,
    rows: int,
) -> float:
    """Return embeddings per second of `steps` steps of `rows` embeddings, scaled up from the last `run`."""
    timesteps = diffusion.inference_timesteps(steps)[-run:]
    user_BUH = users_UH[np.arange(rows) // PER_USER % len(users_UH)]
    noise = item_noise(range(rows), D)
    denoise = two_passes(prior, diffusion, user_BUH)
    started = time.perf_counter()
    SAMPLERS[sampler](denoise, noise, timesteps, diffusion, clip=5.0)
    return rows / ((time.perf_counter() - started) * steps / run)


def ours(
    prior: Prior,
    diffusion: Diffusion,
    users_UH: torch.Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    rows: int = TILE,
) -> float:
    """Return embeddings per second of `sample_liked`: one tile, conditions kept, guided by a selector."""
    settings = SamplerSettings.model_validate(
        {
            "name": sampler,
            "num_inference_steps": steps,
            "prior_guidance_scale": guidance,
            "selector_guidance_scale": SELECTOR_GUIDANCE,
            "batch_size": rows,
        }
    )
    selector = Selector(D).eval().to(users_UH.device)
    trained = TrainedPrior(
        network=prior,
        settings=NETWORK,
        diffusion=diffusion.settings,
        scaler=EmbedScaler(embed_dim=D, norm=1.0),
        sampling=PriorSampling(prior_guidance_scale=guidance),
        condition_dropout=0.15,
        clip=None,
        selector=selector,
    )
    factors = torch.randn(len(users_UH), selector.factors.out_features + 1, device=users_UH.device)
    users = UserVectors(token_GUH=users_UH, factor_GF=factors)
    started = time.perf_counter()
    sample_liked(trained, diffusion, users, np.arange(rows) // PER_USER, range(rows), settings)
    return rows / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prior = wake(Prior(NETWORK, D))
    users_UH = UserTable(NUM_USERS, 1, 128).rows_VUH
    diffusion = Diffusion.build(DiffusionSettings())

    def autocast() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(prior, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, guidance=1.0)

    variants: dict[str, Callable[[], float]] = {
        "reference: DDPM, 1000 steps, two passes, 10 per call": lambda: plain(
            prior, diffusion, users_UH, sampler="ddpm", steps=1000, run=10, rows=PER_USER
        ),
        f"+ few steps: DPM-Solver++(2M), {STEPS}": lambda: plain(
            prior, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, run=STEPS, rows=PER_USER
        ),
        f"+ batches: {TILE} of many users": lambda: plain(
            prior, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, run=STEPS // 4, rows=TILE
        ),
        "+ conditions kept, one doubled batch": lambda: ours(
            prior, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, guidance=GUIDANCE
        ),
        "+ selector guidance alone (the default)": lambda: ours(
            prior, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, guidance=1.0
        ),
        f"+ distilled: {DISTILLED_STEPS} passes": lambda: ours(
            prior, diffusion, users_UH, sampler="ddim", steps=DISTILLED_STEPS, guidance=1.0
        ),
    }
    # Without AVX-512, bfloat16 is emulated, hundreds of times slower.
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        variants["the default in bfloat16"] = autocast
    if not arguments.no_compile:
        compiled = cast(Prior, torch.compile(prior, dynamic=False))
        variants["the default, compiled"] = lambda: ours(
            compiled, diffusion, users_UH, sampler="dpm_solver", steps=STEPS, guidance=1.0
        )
    for variant in variants.values():
        variant()  # warm
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            rates[name].append(variant())
    median = {name: statistics.median(values) for name, values in rates.items()}
    reference = next(iter(median.values()))
    table = Table("", "embeddings/s", "times the reference")
    for name, rate in median.items():
        table.add_row(name, f"{rate:.2f}", f"{rate / reference:.1f}")
    Console().print(table)
    capability = torch.backends.cpu.get_cpu_capability()
    processor = platform.processor() or platform.machine()
    result = {
        "device": f"{arguments.threads} threads of {processor}, {capability}",
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "embeddings_per_second": median,
        "times_the_reference": {name: rate / reference for name, rate in median.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sampling-cpu-{capability.lower()}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
