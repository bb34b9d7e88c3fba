"""The running average of the weights: exact, and soon free of the random weights it began with."""

import pytest
import torch

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.training.state import TrainState


def state_of(ema_decay: float) -> TrainState:
    config = TrainConfig.model_validate(
        {
            "interactions": {"path": "none"},
            "items": "none",
            "out": "none",
            "network": {"num_layers": 1, "num_heads": 1, "width": 8, "num_tokens": 2},
            "optimization": {"ema_decay": ema_decay},
        }
    )
    return TrainState(config, 8, 2, torch.device("cpu"))


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


def test_the_average_is_resumed() -> None:
    state, again = state_of(0.9), state_of(0.9)
    for _ in range(3):
        state.update_average()
    again.load_state_dict(state.state_dict())
    assert again.num_averaged == 3
    for one, two in zip(state.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(one, two)
