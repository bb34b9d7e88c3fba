"""Define the forward process: noise schedules, the training loss, and `denoised` from any `prediction_type`.

Shapes: B batch, D embed dim, T training timesteps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import DiffusionSettings

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]  # (x_BD, timestep) -> denoised_BD


def alphas_cumprod(settings: DiffusionSettings) -> torch.Tensor:
    """Return the signal power at every training timestep, [T] in float64.

    `linear`: Ho et al. 2020, betas from 1e-4 to 0.02. `squaredcos_cap_v2`: Nichol & Dhariwal 2021, eq. 17.
    `laplace`: Hang et al. 2024, log-SNR at the quantiles of a Laplace law. The paper's authors used
    diffusers' form of it (the square root, the 1e-6), and so does this function. The latter two cap betas at
    0.999.
    """
    steps = settings.num_train_timesteps
    if settings.schedule == "linear":
        return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    if settings.schedule == "laplace":
        half = 0.5 - share
        sign = torch.where(half >= 0, 1.0, -1.0)  # 1 for zero, as copysign has it
        snr = torch.exp(-0.5 * sign * torch.log(1 - 2 * half.abs() + 1e-6))
        bar = torch.sqrt(snr / (1 + snr))
    else:
        bar = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving process `x_t = alpha_t x_0 + sigma_t noise`, and the reading of predictions."""

    settings: DiffusionSettings
    alpha: torch.Tensor  # [T]
    sigma: torch.Tensor  # [T]
    half_log_snr: torch.Tensor  # [T], on the CPU

    @classmethod
    def build(cls, settings: DiffusionSettings, device: torch.device | str = "cpu") -> "Diffusion":
        power = alphas_cumprod(settings)
        half_log_snr = 0.5 * (power.log() - (1 - power).log())
        return cls(
            settings, power.sqrt().float().to(device), (1 - power).sqrt().float().to(device), half_log_snr
        )

    def coefficients(self, timestep_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma at `timestep_T` (one per row, or one for all), each [T, 1]."""
        return self.alpha[timestep_T][:, None], self.sigma[timestep_T][:, None]

    def add_noise(
        self, x0_BD: torch.Tensor, noise_BD: torch.Tensor, timestep_T: torch.Tensor
    ) -> torch.Tensor:
        """Return `x_t` [B, D] (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self.coefficients(timestep_T)
        return alpha * x0_BD + sigma * noise_BD

    def target(self, x0_BD: torch.Tensor, noise_BD: torch.Tensor, timestep_T: torch.Tensor) -> torch.Tensor:
        """Return the training target of the network: the noise, the sample, or v (Salimans & Ho 2022)."""
        if self.settings.prediction_type == "epsilon":
            return noise_BD
        if self.settings.prediction_type == "sample":
            return x0_BD
        alpha, sigma = self.coefficients(timestep_T)
        return alpha * noise_BD - sigma * x0_BD

    def denoised(
        self, prediction_BD: torch.Tensor, x_BD: torch.Tensor, timestep_T: torch.Tensor
    ) -> torch.Tensor:
        """Return the estimate of `x_0` [B, D] that a prediction stands for."""
        if self.settings.prediction_type == "sample":
            return prediction_BD
        alpha, sigma = self.coefficients(timestep_T)
        if self.settings.prediction_type == "epsilon":
            return (x_BD - sigma * prediction_BD) / alpha
        return alpha * x_BD - sigma * prediction_BD

    def loss(self, prediction_BD: torch.Tensor, target_BD: torch.Tensor) -> torch.Tensor:
        """Return the simplified mean squared error (Ho et al. 2020, eq. 14), a scalar."""
        return F.mse_loss(prediction_BD, target_BD)

    def log_snr_step(self, timestep: int, following: int) -> float:
        """Return the change of half the log-SNR between two timesteps (lambda in Lu et al. 2022)."""
        return float(self.half_log_snr[following] - self.half_log_snr[timestep])

    def inference_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return `num_inference_steps` timesteps from T-1 downwards, evenly spaced ("trailing")."""
        steps = self.settings.num_train_timesteps
        return [
            round(steps - index * steps / num_inference_steps) - 1 for index in range(num_inference_steps)
        ]
