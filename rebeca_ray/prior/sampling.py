"""Sample embeddings. A sampler is one function: `(denoise, noise, timesteps, diffusion) -> denoised`.

Shapes: N items, B items of a tile, G users, C users of a tile, D embed dim, U user tokens, H width, F
factors of the selector.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.noise import item_noise
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.denoisers import LIKE, NULL_RATING
from rebeca_ray.prior.diffusion import Denoiser, Diffusion
from rebeca_ray.prior.users import UserVectors

USERS_PADDED_TO = 64
RATINGS_FOR_HALF = 4.0  # of a history, that get half of the guidance


class NoisedItems(NamedTuple):
    """Items [N, D] in the prior's space that a sampling begins at, once noised to its first timestep."""

    x0_ND: torch.Tensor
    timesteps: Sequence[int]

    def noise(
        self, index_B: np.ndarray, noise: Iterator[torch.Tensor], diffusion: Diffusion
    ) -> Iterator[torch.Tensor]:
        """Yield the noised items of some rows, then the rest of `noise`, as a sampler takes them."""
        first_BD = next(noise)
        timestep_1 = torch.tensor([self.timesteps[0]], device=first_BD.device)
        x0_BD = self.x0_ND[torch.from_numpy(index_B)].to(first_BD.device)
        yield diffusion.add_noise(x0_BD, first_BD, timestep_1)
        yield from noise


def guided_denoiser(
    prior: TrainedPrior,
    diffusion: Diffusion,
    users: UserVectors,
    row_B: torch.Tensor,
    sampler: SamplerSettings,
) -> Denoiser:
    """Return a denoiser that is guided towards the likes of user `row_B[i]`, by a resolved `sampler`.

    Classifier-free guidance is Ho & Salimans 2022, eq. 6. Both halves are one doubled batch. The
    unconditional half has neither user nor rating: one condition for all its rows. At scale 1 it is left out.
    Guidance acts on the network's prediction. `denoised` is affine in the prediction with weights that sum to
    one, so acting on `denoised` would be the same. The condition holds at every timestep and is computed
    once, here.
    """
    assert sampler.prior_guidance_scale
    users_C, device = len(users.token_GUH), users.token_GUH.device
    token_CUH, is_guided = users.token_GUH, sampler.prior_guidance_scale != 1
    rating_C = torch.full((users_C,), LIKE, device=device)
    condition_row, scale_B1 = row_B, scale_by_ratings(users, sampler.prior_guidance_scale)[row_B, None]
    if is_guided:
        token_CUH = torch.cat([token_CUH, prior.network.null_user_UH[None]])
        rating_C = torch.cat([rating_C, torch.tensor([NULL_RATING], device=device)])
        condition_row = torch.cat([row_B, torch.full_like(row_B, users_C)])
    condition = prior.network.condition(token_CUH, rating_C).expand(condition_row)
    pull = selector_guidance(prior, users.factor_GF, row_B, sampler.selector_guidance_scale or 0.0)

    def denoise(x_BD: torch.Tensor, timestep: int) -> torch.Tensor:
        timestep_1 = torch.tensor([timestep], device=device)
        prediction = prior.network(x_BD, timestep_1, condition)
        if is_guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + scale_B1 * (conditional - unconditional)
        x0_BD = diffusion.denoised(prediction, x_BD, timestep_1)
        return pull(x0_BD, diffusion.posterior_variance(timestep, prior.scaler.deviation))

    return denoise


def scale_by_ratings(users: UserVectors, scale: float) -> torch.Tensor:
    """Return the classifier-free guidance scale of each user [G].

    A taste that a few ratings tell is uncertain, and full guidance would give one sample many times. The part
    above 1 therefore grows with the number of ratings.
    """
    if users.num_ratings_G is None:
        return torch.full((len(users.token_GUH),), scale, device=users.token_GUH.device)
    count_G = users.num_ratings_G.float()
    return 1 + (scale - 1) * count_G / (count_G + RATINGS_FOR_HALF)


def selector_guidance(
    prior: TrainedPrior, factor_GF: torch.Tensor | None, row_B: torch.Tensor, scale: float
) -> Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor]:
    """Return a function that moves `denoised` [B, D] to what the selector says the users of `row_B` like.

    It is the gradient of the log probability of a like (Dhariwal & Nichol 2021, eq. 10), times `scale` and
    the variance of `denoised`. The selector is bilinear, so a user's gradient is one vector: neither a
    backward nor a second forward pass is made. Each user's vector gets the length of the deviation, so that a
    scale means the same to users with much and with little to tell.
    """
    if scale == 0 or prior.selector is None or factor_GF is None:
        return lambda x0_BD, _: x0_BD
    with torch.no_grad():  # distillation trains beneath the guide, not the guide itself
        gradient_GD, offset_G = prior.selector.linear(factor_GF)
    gradient_BD, offset_B = gradient_GD[row_B], offset_G[row_B]
    direction_BD = prior.scaler.deviation * F.normalize(gradient_BD)

    def pull(x0_BD: torch.Tensor, variance: float | torch.Tensor) -> torch.Tensor:
        dislike_B = torch.sigmoid(-((x0_BD * gradient_BD).sum(1) + offset_B))
        return x0_BD + scale * variance * dislike_B[:, None] * direction_BD

    return pull


def ddpm(
    denoise: Denoiser,
    noise: Iterator[torch.Tensor],
    timesteps: Sequence[int],
    diffusion: Diffusion,
    clip: float,
) -> torch.Tensor:
    """Return [B, D] by ancestral sampling (Ho et al. 2020, algorithm 2), the paper's sampler.

    `noise` gives x_T and every step's noise. `denoised` is clipped to ±`clip`, the range of the scaled
    embeddings.
    """
    x = next(noise)
    for index, timestep in enumerate(timesteps):
        x0 = denoise(x, timestep).clamp(-clip, clip)
        if index + 1 == len(timesteps):
            return x0
        previous = timesteps[index + 1]
        signal, signal_previous = diffusion.alpha[timestep] ** 2, diffusion.alpha[previous] ** 2
        alpha = signal / signal_previous
        mean = (signal_previous.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - signal_previous) * x) / (
            1 - signal
        )
        variance = ((1 - signal_previous) / (1 - signal) * (1 - alpha)).clamp(min=1e-20)
        x = mean + variance.sqrt() * next(noise)
    return x


def ddim(
    denoise: Denoiser,
    noise: Iterator[torch.Tensor],
    timesteps: Sequence[int],
    diffusion: Diffusion,
    clip: float,
) -> torch.Tensor:
    """Return [B, D] by DDIM without added noise (Song et al. 2021, eq. 12, eta = 0).

    The noise is computed from the clipped `denoised`, so that x stays within the clip.
    """
    x = next(noise)
    for index, timestep in enumerate(timesteps):
        x0 = denoise(x, timestep).clamp(-clip, clip)
        if index + 1 == len(timesteps):
            return x0
        epsilon = (x - diffusion.alpha[timestep] * x0) / diffusion.sigma[timestep]
        x = diffusion.alpha[timesteps[index + 1]] * x0 + diffusion.sigma[timesteps[index + 1]] * epsilon
    return x


def dpm_solver_pp_2m(
    denoise: Denoiser,
    noise: Iterator[torch.Tensor],
    timesteps: Sequence[int],
    diffusion: Diffusion,
    clip: float,
) -> torch.Tensor:
    """Return [B, D] by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), ending at zero noise.

    The first and the last step are first-order: at the last, log-SNR is infinite.
    """
    x = next(noise)
    x0_before, step_before = x, 0.0
    for index, timestep in enumerate(timesteps):
        x0 = denoise(x, timestep).clamp(-clip, clip)
        if index + 1 == len(timesteps):
            return x0
        step = diffusion.log_snr_step(timestep, timesteps[index + 1])
        slope = (x0 - x0_before) * (step / (2 * step_before)) if index else torch.zeros_like(x0)
        x = first_order(x, x0 + slope, timestep, timesteps[index + 1], diffusion)
        x0_before, step_before = x0, step
    return x


def unipc(
    denoise: Denoiser,
    noise: Iterator[torch.Tensor],
    timesteps: Sequence[int],
    diffusion: Diffusion,
    clip: float,
) -> torch.Tensor:
    """Return [B, D] by UniPC of second order, B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 1 and 2).

    It predicts as DPM-Solver++(2M) does. Then it corrects each point with the network's answer at that point,
    which costs no further passes.
    """
    x = next(noise)
    x_before, x0_before, x0_before_that, step_before = x, x, x, 0.0
    for index, timestep in enumerate(timesteps):
        x0 = denoise(x, timestep).clamp(-clip, clip)
        if index:  # correct the predictor's point
            step = diffusion.log_snr_step(timesteps[index - 1], timestep)
            change = x0 - x0_before
            if index == 1:
                slope = 0.5 * change
            else:
                ratio = -step_before / step  # the older point's distance per the newer's
                rho_old, rho_new = corrector_weights(ratio, step)
                slope = rho_old * (x0_before_that - x0_before) / ratio + rho_new * change
            x = first_order(x_before, x0_before + slope, timesteps[index - 1], timestep, diffusion)
            step_before = step
        if index + 1 == len(timesteps):
            return x0
        step = diffusion.log_snr_step(timestep, timesteps[index + 1])
        slope = (x0 - x0_before) * (step / (2 * step_before)) if index else torch.zeros_like(x0)
        x_before, x0_before_that, x0_before = x, x0_before, x0
        x = first_order(x, x0 + slope, timestep, timesteps[index + 1], diffusion)
    return x


def corrector_weights(ratio: float, step: float) -> tuple[float, float]:
    """Return UniPC's weights for the older and newer difference (Zhao et al. 2023, eq. 5, two points)."""
    growth = float(np.expm1(-step))
    phi_2 = growth / -step - 1
    phi_3 = phi_2 / -step - 0.5
    weights = np.linalg.solve(np.array([[1, 1], [ratio, 1]]), np.array([phi_2 / growth, 2 * phi_3 / growth]))
    return float(weights[0]), float(weights[1])


def first_order(
    x: torch.Tensor, x0: torch.Tensor, timestep: int, following: int, diffusion: Diffusion
) -> torch.Tensor:
    """Return the exact solution from `timestep` to `following` for a network that always answers `x0`."""
    ratio = diffusion.sigma[following] / diffusion.sigma[timestep]
    growth = np.expm1(-diffusion.log_snr_step(timestep, following))
    return ratio * x - diffusion.alpha[following] * float(growth) * x0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver_pp_2m, "unipc": unipc}


@torch.inference_mode()
def sample_liked(
    prior: TrainedPrior,
    diffusion: Diffusion,
    users: UserVectors,
    row_N: np.ndarray,
    seeds: Sequence[int],
    sampler: SamplerSettings,
    start: NoisedItems | None = None,
) -> torch.Tensor:
    """Sample one embedding per row that user `row_N[i]` would like: [N, D] in the prior's space, on the CPU.

    `sampler` is a resolved one. Sampling begins at noise, or at the noised items of `start`. Rows go in tiles
    of `sampler.batch_size`, and copies of a row fill the last tile. In float32 on a CPU a row's bits then
    depend on its user, start and seed alone: matrix products round all rows alike from a dozen rows on, but
    not below.
    """
    assert sampler.name
    assert sampler.num_inference_steps
    device, clip = users.token_GUH.device, prior.scaler.clip or math.inf
    timesteps: Sequence[int] = diffusion.inference_timesteps(sampler.num_inference_steps)
    if start is not None:
        timesteps = start.timesteps
    tiles = []
    for first in range(0, len(row_N), sampler.batch_size):
        # Fill the tile, and the users of the tile, so that every matrix product has many rows.
        index_B = np.arange(first, min(first + sampler.batch_size, len(row_N)))
        count = len(index_B)
        index_B = np.pad(index_B, (0, sampler.batch_size - count), mode="edge")
        users_of_tile, row_B = np.unique(row_N[index_B], return_inverse=True)
        users_of_tile = np.pad(users_of_tile, (0, -len(users_of_tile) % USERS_PADDED_TO), mode="edge")
        denoise = guided_denoiser(
            prior,
            diffusion,
            users.take(torch.from_numpy(users_of_tile).to(device)),
            torch.from_numpy(row_B).to(device),
            sampler,
        )
        noise = item_noise([seeds[index] for index in index_B.tolist()], prior.scaler.embed_dim, device)
        if start is not None:
            noise = start.noise(index_B, noise, diffusion)
        sampled = SAMPLERS[sampler.name](denoise, noise, timesteps, diffusion, clip)
        tiles.append(sampled[:count].cpu())
    return torch.cat(tiles)
