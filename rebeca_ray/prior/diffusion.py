"""Define the forward process: noise, the training loss, and `denoised` from any `prediction_type`.

Shapes: B batch, D embed dim, T training timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import DiffusionSettings
from rebeca_ray.prior import schedules

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]  # (x_BD, timestep) -> denoised_BD


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving process `x_t = alpha_t x_0 + sigma_t noise`, and the reading of predictions."""

    settings: DiffusionSettings
    alpha: torch.Tensor  # [T]
    sigma: torch.Tensor  # [T]
    half_log_snr: torch.Tensor  # [T], on the CPU

    @classmethod
    def build(cls, settings: DiffusionSettings, device: torch.device | str = "cpu") -> "Diffusion":
        power = torch.from_numpy(schedules.alphas_cumprod(settings))
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
        """Return the timesteps of a sampling; see `schedules.inference_timesteps`."""
        return schedules.inference_timesteps(self.settings.num_train_timesteps, num_inference_steps)

    def posterior_variance(self, timestep: int, deviation: float) -> float:
        """Return the variance of `x_0` given `x_t`, if the data had this `deviation` and no structure."""
        alpha, sigma = float(self.alpha[timestep]), float(self.sigma[timestep])
        return sigma**2 * deviation**2 / (sigma**2 + alpha**2 * deviation**2)
