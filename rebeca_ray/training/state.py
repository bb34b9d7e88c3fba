"""The state of a training, complete enough to resume it, and its loss.

Shapes: B samples, D embed dim, U user tokens, H width, G draws that share a history.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.prior.denoisers import NULL_RATING, Prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.users import History, UserTable


class TrainState:
    """The state that resumes a killed run: network, user table, running average, optimizer, rates, curve."""

    def __init__(self, config: TrainConfig, embed_dim: int, num_users: int, device: torch.device) -> None:
        optimization, network = config.optimization, config.network
        torch.manual_seed(optimization.seed)
        self.prior = Prior(network, embed_dim).to(device)
        self.table = None
        if network.user_encoder == "id":
            self.table = UserTable(
                num_users,
                network.num_user_tokens,
                network.width,
                seed=optimization.seed,
                weight_decay=optimization.weight_decay if optimization.user_optimizer == "adamw" else None,
                device=device,
            )
        self.average, self.num_averaged = copy.deepcopy(self.prior).requires_grad_(False).eval(), 0
        self.ema_decay = optimization.ema_decay
        self.optimizer = torch.optim.AdamW(
            self.prior.parameters(),
            lr=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
            fused=True,
        )
        self.schedule: LRScheduler
        if optimization.schedule == "plateau":
            self.schedule = ReduceLROnPlateau(
                self.optimizer, factor=optimization.plateau_factor, patience=optimization.plateau_patience
            )
        else:
            epochs = optimization.max_epochs
            self.schedule = LambdaLR(
                self.optimizer, lambda epoch: min(1.0, 1.6 * (1 - epoch / (epochs + 0.5)))
            )
        self.user_learning_rate_per_step = optimization.user_learning_rate / optimization.learning_rate
        self.epoch, self.best_loss, self.stale_epochs, self.diverged = 0, math.inf, 0, ""
        self.curve: list[list[float]] = []

    @torch.no_grad()
    def update_average(self) -> None:
        """Add the weights of one step to their running average.

        The decay rises to its value, so that a short training does not keep the random weights it began with.
        """
        decay = min(self.ema_decay, (1 + self.num_averaged) / (10 + self.num_averaged))
        self.num_averaged += 1
        torch._foreach_lerp_(list(self.average.parameters()), list(self.prior.parameters()), 1 - decay)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def end_epoch(self, train_loss: float, val_loss: float, samples_per_second: float) -> None:
        self.epoch += 1
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(val_loss)
        else:
            self.schedule.step()
        self.stale_epochs = 0 if val_loss < self.best_loss else self.stale_epochs + 1
        self.best_loss = min(self.best_loss, val_loss)
        self.curve.append(
            [
                self.epoch,
                round(train_loss, 6),
                round(val_loss, 6),
                self.learning_rate,
                round(samples_per_second),
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.prior.state_dict(),
            "table": self.table.state_dict() if self.table else None,
            "average": self.average.state_dict(),
            "num_averaged": self.num_averaged,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "stale_epochs": self.stale_epochs,
            "diverged": self.diverged,
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prior.load_state_dict(state["network"])
        if self.table:
            self.table.load_state_dict(state["table"])
        self.average.load_state_dict(state["average"])
        self.num_averaged = state["num_averaged"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best_loss, self.stale_epochs = (
            state["epoch"],
            state["best_loss"],
            state["stale_epochs"],
        )
        self.diverged, self.curve = state["diverged"], state["curve"]


class DenoisingLoss(nn.Module):
    """The loss of one batch, as a module that data-parallel training can wrap."""

    def __init__(self, prior: Prior, diffusion: Diffusion, config: TrainConfig) -> None:
        super().__init__()
        self.prior, self.diffusion, self.optimization = prior, diffusion, config.optimization

    def forward(
        self,
        x0_BD: torch.Tensor,
        users: History | torch.Tensor | None,
        row_B: torch.Tensor,
        like_B: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the loss, with user and rating hidden at times (Ho & Salimans 2022, algorithm 1)."""
        device, optimization = x0_BD.device, self.optimization
        drop = torch.rand(2, len(x0_BD), device=device, generator=generator)
        is_hidden = drop < drop.new_tensor([[optimization.user_dropout], [optimization.rating_dropout]])
        if optimization.joint_dropout:
            drop_both = torch.rand(len(x0_BD), device=device, generator=generator)
            is_hidden |= drop_both < optimization.joint_dropout
        user_BUH = user_tokens(self.prior, users, row_B)
        user_BUH = torch.where(is_hidden[0, :, None, None], self.prior.null_user_UH, user_BUH)
        rating_B = torch.where(is_hidden[1], NULL_RATING, like_B)
        timestep_B = torch.randint(
            0, self.diffusion.settings.num_train_timesteps, (len(x0_BD),), device=device, generator=generator
        )
        noise_BD = torch.randn(x0_BD.shape, device=device, generator=generator)
        prediction = self.prior(
            self.diffusion.add_noise(x0_BD, noise_BD, timestep_B),
            timestep_B,
            self.prior.condition(user_BUH, rating_B),
        )
        return self.diffusion.loss(prediction, self.diffusion.target(x0_BD, noise_BD, timestep_B))


def user_tokens(prior: Prior, users: History | torch.Tensor | None, row_B: torch.Tensor) -> torch.Tensor:
    """Return user tokens [B, U, H]: from histories, from rows of the user table, or the null user's."""
    if users is None:
        return prior.null_user_UH.expand(len(row_B), -1, -1)
    return (prior.encode(users) if isinstance(users, History) else users)[row_B]
