"""The scaler: the space of the prior, the published one, the way back, and what cannot be scaled."""

import math

import pytest
import torch

from rebeca_ray.config.sections import ScalingSettings
from rebeca_ray.prior.scaler import EmbedScaler

EMBEDS = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
AT_LENGTH_2 = torch.tensor([[1.2, 1.6, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("settings", "scaled", "clip"),
    [
        (ScalingSettings(), AT_LENGTH_2, 5.0),
        (ScalingSettings(clamp=1.5), AT_LENGTH_2.clamp(max=1.5), 1.5),
        (ScalingSettings(scale=0.2), AT_LENGTH_2 / 5, 1.0),
        (ScalingSettings(normalise=False, clamp=None), EMBEDS, None),
        (ScalingSettings(normalise=False, clamp=None, clip_sample=1.0), EMBEDS, 1.0),
    ],
)
def test_embeddings_are_scaled_as_the_settings_say(
    settings: ScalingSettings, scaled: torch.Tensor, clip: float | None
) -> None:
    scaler = EmbedScaler.fit(EMBEDS, settings)
    assert (scaler.norm, scaler.clip) == (5.0, clip)
    torch.testing.assert_close(scaler.scale(EMBEDS), scaled)


def test_the_deviation_is_that_of_the_scaled_embeddings_around_their_mean() -> None:
    embeds = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0)) + 3
    scaler = EmbedScaler.fit(embeds, ScalingSettings(normalise=False, clamp=None, scale=0.5))
    assert math.isclose(scaler.deviation, 0.5, rel_tol=0.01)


def test_the_way_back_restores_direction_and_mean_length() -> None:
    embeds = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    scaler = EmbedScaler.fit(embeds, ScalingSettings())
    back = scaler.unscale(scaler.scale(embeds))
    assert torch.cosine_similarity(back, embeds).min() > 0.9999
    torch.testing.assert_close(back.norm(dim=1), torch.full((100,), scaler.norm))


def test_raw_embeddings_keep_their_length_on_the_way_back() -> None:
    scaler = EmbedScaler.fit(EMBEDS, ScalingSettings(normalise=False, clamp=None, scale=0.5))
    torch.testing.assert_close(scaler.unscale(torch.tensor([[3.0, 0.0, 0.0, 0.0]]))[0, 0], torch.tensor(6.0))


def test_outliers_are_clamped() -> None:
    spike = torch.zeros(1, 100)
    spike[0, 0] = 1
    assert EmbedScaler(embed_dim=100, norm=1.0).scale(spike).max() == 5.0
