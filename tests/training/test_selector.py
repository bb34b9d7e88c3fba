"""The selector: it predicts likes, also for new users and without dislikes; without likes, there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.user_blocks import Rated, UserBlock
from rebeca_ray.prior.users import History
from rebeca_ray.training.selector import fit_selector
from tests.prior.test_user_blocks import block

D, ITEMS = 16, 1200


@pytest.fixture(scope="module")
def x0_ID() -> np.ndarray:  # noqa: N802  # the name that its users give it
    """Items in two far clusters, even ones and odd ones; item 100 k + n is user k's n-th."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2, D))
    return (centres[np.arange(ITEMS) % 2] + 0.3 * random.standard_normal((ITEMS, D))).astype(
        np.float32
    ) * 0.2 + 0.5


def world(users: int) -> UserBlock:
    """User k likes even items if k is even, else odd ones."""
    return block([[(int(row % 2 == user % 2), False) for row in range(30)] for user in range(users)])


@pytest.fixture(scope="module")
def selector(x0_ID: np.ndarray) -> Selector:
    fitted = fit_selector([world(8)], x0_ID, seed=0)
    assert fitted is not None
    return fitted


def probabilities(selector: Selector, users: UserBlock, user: int, x0_ID: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        factors = selector.user_factors(users.history(np.array([user]), 20).look_up(x0_ID))
    items = torch.from_numpy(x0_ID[1000:1020])  # nobody rated these
    return selector.like_probability(items, factors.expand(20, -1))


def test_it_knows_taste_on_items_and_users_it_never_saw(selector: Selector, x0_ID: np.ndarray) -> None:
    users = world(10)
    for user in (0, 1, 8, 9):  # the last two are new
        probability = probabilities(selector, users, user, x0_ID)
        is_liked = np.arange(20) % 2 == user % 2
        assert probability[is_liked].min() > probability[~is_liked].max()
        assert (probability[is_liked].mean() - probability[~is_liked].mean()) > 0.3


@torch.inference_mode()
def test_a_user_without_interactions_is_an_average_one(selector: Selector, x0_ID: np.ndarray) -> None:
    nobody = History(
        torch.zeros(1, 3, D),
        torch.ones(1, 3, dtype=torch.long),
        torch.zeros(1, 3),
        torch.zeros(1, 3, dtype=torch.bool),
    )
    factors = selector.user_factors(nobody)
    assert (factors[:, :-1] == 0).all()
    probability = selector.like_probability(torch.from_numpy(x0_ID[1000:1100]), factors.expand(100, -1))
    assert 0.2 < probability.mean() < 0.8


def test_without_likes_there_is_no_selector(x0_ID: np.ndarray) -> None:
    assert fit_selector([block([[(0, False)] * 5] * 3)], x0_ID, seed=0) is None


def test_without_dislikes_likes_are_told_from_random_items(x0_ID: np.ndarray) -> None:
    users = block([[(1, False)] * 30 for _ in range(8)])
    for user in range(8):  # user k has only even items if k is even, else odd ones
        rows = slice(30 * user, 30 * (user + 1))
        users.item_index_N[rows] = 100 * user + 2 * np.arange(30) + user % 2
    fitted = fit_selector([users], x0_ID, seed=0)
    assert fitted is not None
    for user in (0, 1):
        probability = probabilities(fitted, users, user, x0_ID)
        is_liked = np.arange(20) % 2 == user % 2
        assert probability[is_liked].min() > probability[~is_liked].max()


def test_without_dislikes_the_length_of_a_history_tells_nothing(x0_ID: np.ndarray) -> None:
    """Users of one to eight random likes: every probability is a half, whatever is known of the user."""
    random = np.random.default_rng(1)
    users = block([[(1, False)] * random.integers(1, 9) for _ in range(600)])
    users.item_index_N[:] = random.integers(0, ITEMS, len(users.item_index_N))
    fitted = fit_selector([users], x0_ID, seed=0)
    assert fitted is not None
    items = torch.from_numpy(x0_ID[:200])
    for length in (0, 1, 8):
        rated = Rated.nothing(1, 1)
        if length:
            rated = users.history(np.flatnonzero(users.counts_V == length)[:40], length)
        with torch.inference_mode():
            factors = fitted.user_factors(rated.look_up(x0_ID))
        for factor in factors:
            mean = fitted.like_probability(items, factor.expand(200, -1)).mean()
            assert mean == pytest.approx(0.5, abs=0.1)


def test_it_is_a_function_of_ratings_and_seed(selector: Selector, x0_ID: np.ndarray, tmp_path: Path) -> None:
    again, other = fit_selector([world(8)], x0_ID, seed=0), fit_selector([world(8)], x0_ID, seed=1)
    assert again is not None
    assert other is not None
    assert torch.equal(again.factors.weight, selector.factors.weight)
    assert not torch.equal(other.factors.weight, selector.factors.weight)


def test_the_hold_out_teaches_nothing(x0_ID: np.ndarray) -> None:
    """The same weights, bit for bit, whatever the held-out ratings say."""
    fits = []
    for held_out_like in (0, 1):
        users = [
            [(int(row % 2 == user % 2), False) if row % 5 else (held_out_like, True) for row in range(30)]
            for user in range(4)
        ]
        fitted = fit_selector([block(users)], x0_ID, seed=0)
        assert fitted is not None
        fits.append(fitted.state_dict())
    assert all(torch.equal(fits[0][name], fits[1][name]) for name in fits[0])
