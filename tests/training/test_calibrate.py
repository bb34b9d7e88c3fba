"""The choice of guidance: the least that users like as much as the best, by a judge that did not guide."""

import numpy as np
import pytest
import torch

from rebeca_ray.training.calibrate import MIN_DIVERSITY, Point, choose_point, mean_distance

USERS = 200
NOISE = np.random.default_rng(0).standard_normal(USERS)


def point(scale: float, like: float, diversity: float, noise: float = 0.0) -> Point:
    """A point at which users like a sample with `like` on average, whatever else they like."""
    taste = np.linspace(0.1, 0.5, USERS)  # differs more between users than between points
    return Point(scale, taste + like + noise * (NOISE - NOISE.mean()), diversity)


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([point(0, 0.0, 1.0), point(8, 0.1, 0.9), point(16, 0.2, 0.8)], 16),
        # What another draw could turn around is no reason for more guidance.
        ([point(0, 0.0, 1.0), point(8, 0.1, 0.9, 0.1), point(16, 0.101, 0.8)], 8),
        ([point(0, 0.0, 1.0, 0.1), point(8, 0.005, 0.9), point(16, 0.006, 0.9)], 0),
        # Too alike, however much they are liked.
        ([point(0, 0.0, 1.0), point(8, 0.1, MIN_DIVERSITY), point(16, 0.9, 0.69)], 8),
    ],
)
def test_the_least_guidance_as_good_as_the_best_is_chosen(points: list[Point], chosen: float) -> None:
    assert choose_point(points).scale == chosen


def test_the_choice_does_not_depend_on_how_many_samples_are_compared() -> None:
    """Distances between samples, unlike shares of distinct items, mean the same for any catalog."""
    x_GSD = torch.randn(50, 40, 8, generator=torch.Generator().manual_seed(0))
    assert mean_distance(x_GSD) == pytest.approx(1.0, abs=0.02)
    assert mean_distance(x_GSD[:, :5]) == pytest.approx(1.0, abs=0.05)
    assert mean_distance(x_GSD[:, :1].expand(-1, 40, -1)) == pytest.approx(0.0, abs=1e-5)
