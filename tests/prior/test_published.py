"""The authors' networks: their sizes, and their outputs for given weights."""

import numpy as np
import pytest
import torch
from torch import nn

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.prior.denoisers import LIKE, NULL_RATING, Prior
from rebeca_ray.prior.users import UserTable

D = 1024
PUBLISHED = {  # users, parameters, deviation of the seeded weights
    "paper-v1": (94, 68_641_792, 0.02),
    "paper-v2": (210, 4_411_174, 0.05),
}
# The first numbers of three outputs, as the authors' code gives them for the same weights.
GOLDEN = {
    "paper-v1": [
        [0.59739, 0.0231, 0.23311, -0.06674],
        [0.83379, 0.06515, 0.90422, -0.29793],
        [0.2515, 0.07257, 0.12883, 0.52164],
    ],
    "paper-v2": [
        [-0.04579, -0.26501, 0.49653, -0.5461],
        [-0.37854, 0.83108, -0.21652, 0.15634],
        [-0.28824, 0.01802, 0.50302, 0.04949],
    ],
}


def configure(preset: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {"preset": preset, "interactions": {"path": "i"}, "items": "i", "out": "o"}
    )


def seeded(prior: Prior, deviation: float) -> Prior:
    """Fill the weights, in order of their names, from one stream of random numbers."""
    random = np.random.default_rng(0)
    for _, parameter in sorted(prior.named_parameters()):
        values = random.standard_normal(tuple(parameter.shape), dtype=np.float32)
        parameter.data = torch.from_numpy(deviation * values)
    return prior.eval()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_they_have_as_many_parameters_as_published(preset: str) -> None:
    network = configure(preset).network
    num_users, num_parameters, _ = PUBLISHED[preset]
    table = UserTable(num_users, network.num_user_tokens, network.width)
    parameters = sum(parameter.numel() for parameter in Prior(network, D).parameters())
    assert parameters + table.rows_VUH.numel() == num_parameters


@torch.inference_mode()
@pytest.mark.parametrize("preset", PUBLISHED)
def test_given_weights_give_the_authors_outputs(preset: str) -> None:
    network = configure(preset).network
    prior = seeded(Prior(network, D), PUBLISHED[preset][2])
    random = np.random.default_rng(1)
    users = random.standard_normal((3, network.num_user_tokens, network.width), dtype=np.float32)
    x = torch.from_numpy(random.standard_normal((3, D), dtype=np.float32))
    condition = prior.condition(torch.from_numpy(users), torch.tensor([LIKE, 0, NULL_RATING]))
    output = prior(x, torch.tensor([0, 17, 999]), condition)
    np.testing.assert_allclose(output[:, :4], GOLDEN[preset], atol=2e-5)


def test_the_presets_train_as_the_authors_did() -> None:
    first, second = configure("paper-v1"), configure("paper-v2")
    for config in (first, second):
        optimization = config.optimization
        assert (config.interactions.hold_out, config.interactions.test) == (10, 10)
        assert not optimization.with_replacement
        assert (optimization.max_epochs, optimization.plateau_patience) == (2001, 5)
        assert (optimization.ema_decay, optimization.gradient_clip) == (0.0, None)
        assert (optimization.user_optimizer, optimization.user_learning_rate) == ("adamw", 1e-4)
        assert not config.scaling.normalise
        assert config.scaling.clamp is None
    assert (first.interactions.min_likes, second.interactions.min_likes) == (100, 0)
    assert (first.scaling.clip_sample, second.scaling.clip_sample) == (1.0, None)
    assert (first.diffusion.num_train_timesteps, first.diffusion.schedule) == (6000, "linear")
    assert (first.optimization.joint_dropout, first.optimization.user_dropout) == (0.1, 0.0)
    assert first.optimization.condition_dropout == pytest.approx(0.1)
    assert second.optimization.condition_dropout == pytest.approx(0.15 * 0.15)
    assert first.optimization.early_stopping_patience == 20
    assert second.optimization.early_stopping_patience == 50


def test_dropout_is_on_in_training_alone() -> None:
    network = configure("paper-v1").network.model_copy(
        update={"num_layers": 1, "num_heads": 2, "width": 8, "num_user_tokens": 1}
    )
    prior = Prior(network, 8)
    dropouts = [module for module in prior.modules() if isinstance(module, nn.Dropout)]
    assert {module.p for module in dropouts} == {0.1}

    def predict() -> torch.Tensor:
        condition = prior.condition(torch.ones(1, 1, 8), torch.tensor([LIKE]))
        return prior(torch.ones(1, 8), torch.tensor([3]), condition)

    assert not torch.equal(predict(), predict())
    prior.eval()
    assert torch.equal(predict(), predict())
