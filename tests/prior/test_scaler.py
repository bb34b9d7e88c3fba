"""The scaler: the published scaling, the way back, and embeddings that cannot be scaled."""

import math

import torch

from rebeca_ray.prior.scaler import EmbedScaler


def test_scaling_is_the_published_one() -> None:
    embeds = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    scaler = EmbedScaler.fit(embeds)
    assert scaler.norm == 5.0
    torch.testing.assert_close(scaler.scale(embeds), torch.tensor([[0.6, 0.8, 0.0, 0.0]]) * math.sqrt(4) / 5)


def test_the_way_back_restores_direction_and_mean_length() -> None:
    embeds = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    scaler = EmbedScaler.fit(embeds)
    back = scaler.unscale(scaler.scale(embeds))
    assert torch.cosine_similarity(back, embeds).min() > 0.9999
    torch.testing.assert_close(back.norm(dim=1), torch.full((100,), scaler.norm))


def test_outliers_are_clamped() -> None:
    spike = torch.zeros(1, 100)
    spike[0, 0] = 1
    assert EmbedScaler(embed_dim=100, norm=1.0).scale(spike).max() == 1.0
