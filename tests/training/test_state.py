"""The running average of the weights: exact, and soon free of the random weights it began with."""

import pytest
import torch

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.prior.denoisers import NULL_RATING, Prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.training.state import DenoisingLoss, TrainState


def configure(**optimization: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "interactions": {"path": "none"},
            "items": "none",
            "out": "none",
            "network": {"num_layers": 1, "num_heads": 1, "width": 8, "num_tokens": 2},
            "optimization": optimization,
        }
    )


def state_of(ema_decay: float) -> TrainState:
    return TrainState(configure(ema_decay=ema_decay), 8, 2, torch.device("cpu"))


def test_the_average_warms_up() -> None:
    state = state_of(0.5)
    with torch.no_grad():
        for parameters in (state.prior.parameters(), state.average.parameters()):
            for parameter in parameters:
                parameter.fill_(0.0)
    expected = 0.0
    for step in range(20):
        for parameter in state.prior.parameters():
            parameter.data.fill_(float(step))
        state.update_average()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    for parameter in state.average.parameters():
        assert parameter.flatten()[0].item() == pytest.approx(expected, rel=1e-5)


def test_a_short_training_keeps_nothing_of_the_start() -> None:
    """With a constant decay of 0.999, 43% of the first weights were left after 840 steps."""
    state = state_of(0.999)
    with torch.no_grad():
        for parameter in state.prior.parameters():
            parameter.zero_()
        for parameter in state.average.parameters():
            parameter.fill_(1.0)
    for _ in range(840):
        state.update_average()
    for parameter in state.average.parameters():
        assert parameter.abs().max() < 1e-9


def test_without_averaging_the_weights_themselves_are_saved() -> None:
    state = state_of(0.0)
    for parameter in state.prior.parameters():
        parameter.data.normal_()
    state.update_average()
    for one, two in zip(state.average.parameters(), state.prior.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_average_has_no_dropout() -> None:
    assert not any(module.training for module in state_of(0.9).average.modules())


def test_user_and_rating_are_hidden_together_or_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 20_000
    for dropout, both, user_alone, rating_alone in (
        ({"user_dropout": 0.0, "rating_dropout": 0.0, "joint_dropout": 0.1}, 0.1, 0.0, 0.0),
        ({"user_dropout": 0.2, "rating_dropout": 0.5}, 0.1, 0.1, 0.4),
    ):
        config = configure(**dropout)
        state = TrainState(config, 8, 2, torch.device("cpu"))
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def condition(
            user_BUH: torch.Tensor, rating_B: torch.Tensor, seen: list = seen, prior: Prior = state.prior
        ) -> object:
            seen.append(((user_BUH == prior.null_user_UH).all((1, 2)), rating_B == NULL_RATING))
            return prior.denoiser.condition(user_BUH, rating_B)

        monkeypatch.setattr(state.prior, "condition", condition)
        loss = DenoisingLoss(state.prior, Diffusion.build(config.diffusion), config)
        users, ratings = torch.zeros(1, 1, 8), torch.ones(rows, dtype=torch.long)
        with torch.no_grad():
            loss(
                torch.randn(rows, 8),
                users,
                torch.zeros(rows, dtype=torch.long),
                ratings,
                torch.Generator().manual_seed(0),
            )
        user_B, rating_B = seen[0]
        assert config.optimization.condition_dropout == pytest.approx(both)
        assert (user_B & rating_B).float().mean().item() == pytest.approx(both, abs=0.01)
        assert (user_B & ~rating_B).float().mean().item() == pytest.approx(user_alone, abs=0.01)
        assert (~user_B & rating_B).float().mean().item() == pytest.approx(rating_alone, abs=0.015)


def test_the_average_is_resumed() -> None:
    state, again = state_of(0.9), state_of(0.9)
    for _ in range(3):
        state.update_average()
    again.load_state_dict(state.state_dict())
    assert again.num_averaged == 3
    for one, two in zip(state.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(one, two)
