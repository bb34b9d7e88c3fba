"""Samplers: one function each, `(denoiser, x, timesteps, diffusion, …) -> denoised embeddings`, and their noise.

Shapes: B batch, D embed dim, S sampling steps.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rebeca_ray.diffusion import Denoiser, Diffusion
from rebeca_ray.prior import Prior

LIKE = 1


def item_noise(seeds: Sequence[int], num_draws: int, embed_dim: int) -> torch.Tensor:
    """`num_draws` standard normal vectors an item, from its own seed alone, [num_draws, B, D] float32.

    Counter-based (Philox keyed by the seed), so that an item's noise is the same in any batch, order or process.
    """
    draws = [np.random.Generator(np.random.Philox(key=seed)).standard_normal((num_draws, embed_dim), np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(draws, axis=1))


def guided_denoiser(prior: Prior, diffusion: Diffusion, user_index_B: torch.Tensor, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance to what each user likes (Ho & Salimans 2022, eq. 6) as one doubled batch.

    The unconditional half has neither user nor rating. At scale 1 it is left out. Guidance acts on the network's
    prediction; since `denoised` is affine in it with weights that sum to one, acting on `denoised` is the same.
    """
    like_B = torch.full_like(user_index_B, LIKE)
    if guidance_scale == 1:
        return lambda x_BD, t_B: diffusion.denoised(prior(x_BD, t_B, user_index_B, like_B), x_BD, t_B)
    users = torch.cat([user_index_B, torch.full_like(user_index_B, prior.null_user_index)])
    ratings = torch.cat([like_B, torch.full_like(like_B, prior.null_rating_index)])

    def denoise(x_BD: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = prior(x_BD.repeat(2, 1), t_B.repeat(2), users, ratings).chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        return diffusion.denoised(prediction, x_BD, t_B)

    return denoise


def ddpm(denoise: Denoiser, noise_SBD: torch.Tensor, timesteps: Sequence[int], diffusion: Diffusion, clip: float = 1.0) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), the paper's sampler: `noise_SBD` holds x_T and the S-1 steps' noise.

    `denoised` is clipped to ±`clip`, the range of the scaled embeddings. Returns [B, D].
    """
    x = noise_SBD[0]
    for index, timestep in enumerate(timesteps):
        t = torch.full((len(x),), timestep, device=x.device)
        x0 = denoise(x, t).clamp(-clip, clip)
        if index + 1 == len(timesteps):
            return x0
        previous = timesteps[index + 1]
        signal, signal_previous = diffusion.alpha[timestep] ** 2, diffusion.alpha[previous] ** 2
        alpha = signal / signal_previous
        mean = (signal_previous.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - signal_previous) * x) / (1 - signal)
        variance = ((1 - signal_previous) / (1 - signal) * (1 - alpha)).clamp(min=1e-20)
        x = mean + variance.sqrt() * noise_SBD[index + 1]
    return x


def dpm_solver_pp_2m(
    denoise: Denoiser, noise_SBD: torch.Tensor, timesteps: Sequence[int], diffusion: Diffusion, clip: float = 1.0
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), ending at zero noise: reads x_T = `noise_SBD[0]`. Returns [B, D].

    The first and the last step are first-order, the last because log-SNR is infinite there.
    """
    x = noise_SBD[0]
    log_snr = torch.log(diffusion.alpha / diffusion.sigma)
    x0_before, step_before = x, 0.0
    for index, timestep in enumerate(timesteps):
        x0 = denoise(x, torch.full((len(x),), timestep, device=x.device)).clamp(-clip, clip)
        if index + 1 == len(timesteps):
            return x0
        following = timesteps[index + 1]
        step = float(log_snr[following] - log_snr[timestep])
        estimate = x0 if index == 0 else x0 + step / (2 * step_before) * (x0 - x0_before)
        ratio = diffusion.sigma[following] / diffusion.sigma[timestep]
        x = ratio * x - diffusion.alpha[following] * torch.expm1(torch.tensor(-step)) * estimate
        x0_before, step_before = x0, step
    return x


@torch.inference_mode()
def sample_liked(
    prior: Prior,
    diffusion: Diffusion,
    user_index: Sequence[int],
    seeds: Sequence[int],
    *,
    sampler: str,
    num_inference_steps: int,
    guidance_scale: float,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw one embedding an entry that its user would like, in the prior's space, [B, D] on the CPU."""
    users = torch.tensor(user_index, device=device)
    timesteps = diffusion.inference_timesteps(num_inference_steps)
    denoise = guided_denoiser(prior, diffusion, users, guidance_scale)
    if sampler == "ddpm":
        noise = item_noise(seeds, len(timesteps), prior.embed_dim).to(device)
        return ddpm(denoise, noise, timesteps, diffusion).cpu()
    noise = item_noise(seeds, 1, prior.embed_dim).to(device)
    return dpm_solver_pp_2m(denoise, noise, timesteps, diffusion).cpu()
