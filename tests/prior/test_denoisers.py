"""The prior networks: size, zero initialisation, conditioning, embedding sizes, and reused conditions."""

from typing import Any

import pytest
import torch

from rebeca_ray.config.sections import NetworkSettings
from rebeca_ray.prior.denoisers import LIKE, NULL_RATING, CrossAttentionDenoiser, Prior
from tests.conftest import wake

ARCHITECTURES = ["cross_attention", "paper_v1", "paper_v2"]


def settings(architecture: str = "cross_attention", **changes: Any) -> NetworkSettings:
    defaults = {
        "num_layers": 2,
        "num_heads": 2,
        "width": 16,
        "num_tokens": 4,
        "num_user_tokens": 3,
        "user_encoder": "id",
    }
    return NetworkSettings.model_validate({"architecture": architecture, **defaults, **changes})


@pytest.mark.parametrize("embed_dim", [8, 10, 256, 2048])
def test_any_embedding_size_goes_through(embed_dim: int) -> None:
    prior = Prior(settings(), embed_dim)
    condition = prior.condition(torch.randn(5, 3, 16), torch.tensor([0, 1, 2, 0, 1]))
    assert prior(torch.randn(5, embed_dim), torch.arange(5), condition).shape == (5, embed_dim)


def test_an_untrained_network_predicts_zero() -> None:
    prior = Prior(settings(), 8)
    assert (
        prior(
            torch.randn(2, 8),
            torch.tensor([1, 2]),
            prior.condition(torch.randn(2, 3, 16), torch.tensor([1, 1])),
        )
        == 0
    ).all()


def test_a_new_cross_attention_block_changes_nothing() -> None:
    denoiser = Prior(settings(), 8).denoiser
    assert isinstance(denoiser, CrossAttentionDenoiser)
    tokens, keys, values = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    modulation = denoiser.modulation(torch.randn(2, 16))[:, None].chunk(2, dim=-1)[0]
    assert (denoiser.blocks[0](tokens, modulation, keys, values) == tokens).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_user_rating_and_time_each_change_the_prediction(architecture: str) -> None:
    prior = wake(Prior(settings(architecture), 64))
    x, users = torch.randn(1, 64), torch.randn(2, 3, 16)

    def predict(time: int, user: int, rating: int) -> torch.Tensor:
        return prior(x, torch.tensor([time]), prior.condition(users[user][None], torch.tensor([rating])))

    base = predict(10, 0, 1)
    for other in (predict(500, 0, 1), predict(10, 1, 1), predict(10, 0, 0), predict(10, 0, NULL_RATING)):
        assert (other - base).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_condition_kept_for_many_rows_and_one_timestep_for_all_change_nothing(architecture: str) -> None:
    prior = wake(Prior(settings(architecture), 64))
    users, ratings, row = (
        torch.randn(3, 3, 16),
        torch.tensor([LIKE, LIKE, NULL_RATING]),
        torch.tensor([2, 0, 1, 1, 0, 2]),
    )
    x = torch.randn(3, 64)
    kept = prior(x, torch.tensor([77]), prior.condition(users, ratings).expand(row))
    plain = prior(x.repeat(2, 1), torch.full((6,), 77), prior.condition(users[row], ratings[row]))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 16 is not divisible by num_heads 3"):
        settings(num_heads=3)
