"""Noise schedules, and the timesteps of a sampling. This module needs no torch.

Shapes: T training timesteps.
"""

import math

import numpy as np

from rebeca_ray.config.sections import DiffusionSettings


def alphas_cumprod(settings: DiffusionSettings) -> np.ndarray:
    """Return the signal power at every training timestep, [T] in float64.

    `linear`: Ho et al. 2020, betas from 1e-4 to 0.02. `squaredcos_cap_v2`: Nichol & Dhariwal 2021, eq. 17.
    `laplace`: Hang et al. 2024, log-SNR at the quantiles of a Laplace law. The paper's authors used
    diffusers' form of it (the square root, the 1e-6), and so does this function. The latter two cap betas at
    0.999.
    """
    steps = settings.num_train_timesteps
    if settings.schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, steps))
    share = np.arange(steps + 1) / steps
    if settings.schedule == "laplace":
        half = 0.5 - share
        sign = np.where(half >= 0, 1.0, -1.0)  # 1 for zero, as copysign has it
        snr = np.exp(-0.5 * sign * np.log(1 - 2 * np.abs(half) + 1e-6))
        bar = np.sqrt(snr / (1 + snr))
    else:
        bar = np.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return np.cumprod(1 - betas)


def inference_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Return `num_inference_steps` timesteps from T-1 downwards, evenly spaced ("trailing")."""
    return [
        round(num_train_timesteps - index * num_train_timesteps / num_inference_steps) - 1
        for index in range(num_inference_steps)
    ]


def last_noise(settings: DiffusionSettings, num_inference_steps: int) -> float:
    """Return the noise per signal, sigma / alpha, that the last step of a sampling sees."""
    last = inference_timesteps(settings.num_train_timesteps, num_inference_steps)[-1]
    power = float(alphas_cumprod(settings)[last])
    return math.sqrt((1 - power) / power)


def fewest_steps(settings: DiffusionSettings, at_least: int, deviation: float) -> int | None:
    """Return the fewest steps, but `at_least` so many, that `check_steps` allows; None if it allows none."""
    steps = range(at_least, settings.num_train_timesteps + 1)
    return next((count for count in steps if last_noise(settings, count) < deviation), None)


def check_steps(settings: DiffusionSettings, num_inference_steps: int, deviation: float) -> None:
    """Raise ValueError if the last step would see as much noise as the data vary, by `deviation`.

    That step's answer is the sample: from so much noise, it would be a blur of several.
    """
    if last_noise(settings, num_inference_steps) < deviation:
        return
    enough = fewest_steps(settings, num_inference_steps + 1, deviation)
    remedy = f"take at least {enough}" if enough else "train the prior with another diffusion.schedule"
    raise ValueError(
        f"sampler.num_inference_steps is {num_inference_steps}; "
        f"the last of so few steps of schedule {settings.schedule} would see more noise than data; {remedy}"
    )
