"""The prior network: size, zero initialisation, conditioning, and any embedding size."""

import pytest
import torch

from rebeca_ray.config import NetworkSettings
from rebeca_ray.prior import Prior


def test_the_authors_network_has_about_4_4_million_parameters() -> None:
    prior = Prior(embed_dim=1024, num_users=210, **NetworkSettings().model_dump())
    assert sum(parameter.numel() for parameter in prior.parameters()) == pytest.approx(4.4e6, rel=0.02)


@pytest.mark.parametrize("embed_dim", [8, 10, 256, 2048])
def test_any_embedding_size_goes_through(embed_dim: int) -> None:
    prior = Prior(embed_dim=embed_dim, num_users=3, num_layers=1, num_heads=2, width=16, num_tokens=4)
    out = prior(torch.randn(5, embed_dim), torch.arange(5), torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 1, 2, 0, 1]))
    assert out.shape == (5, embed_dim)


def test_an_untrained_network_predicts_zero_and_its_blocks_are_the_identity() -> None:
    prior = Prior(embed_dim=8, num_users=3, num_layers=2, num_heads=2, width=16, num_tokens=4)
    x = torch.randn(2, 8)
    assert (prior(x, torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1, 1])) == 0).all()
    tokens, condition = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    assert (prior.blocks[0](tokens, condition, condition.sum(1)) == tokens).all()


def test_user_rating_and_time_each_change_the_prediction() -> None:
    torch.manual_seed(0)
    prior = Prior(embed_dim=8, num_users=3, num_layers=1, num_heads=2, width=16, num_tokens=4)
    torch.nn.init.normal_(prior.detokenizer.weight)
    torch.nn.init.normal_(prior.blocks[0].cross_gate)
    x = torch.randn(1, 8)

    def predict(time: int, user: int, rating: int) -> torch.Tensor:
        return prior(x, torch.tensor([time]), torch.tensor([user]), torch.tensor([rating]))

    base = predict(10, 0, 1)
    for other in (predict(500, 0, 1), predict(10, 2, 1), predict(10, 0, 0), predict(10, prior.null_user_index, 1)):
        assert (other - base).abs().max() > 1e-4


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 16 is not divisible by num_heads 3"):
        Prior(embed_dim=8, num_users=1, num_layers=1, num_heads=3, width=16, num_tokens=1)
