"""Retrieval: the best unseen items of each user by the selector, and their choice by MMR."""

import numpy as np
import pytest
import torch

from rebeca_ray.evaluation import retrieval
from rebeca_ray.evaluation.retrieval import retrieve
from rebeca_ray.prior.selection import choose
from rebeca_ray.prior.selector import Selector

USERS, ITEMS, D, F = 5, 30, 8, 4
RATED = [np.arange(user, 3 * user) for user in range(USERS)]  # none, two items, four items, …


def world() -> tuple[Selector, torch.Tensor, np.ndarray]:
    """Return a selector with random weights, factors of five users, and thirty items."""
    torch.manual_seed(0)
    return Selector(D, F), torch.randn(USERS, F + 1), torch.randn(ITEMS, D).numpy()


def likes(selector: Selector, factor_GF: torch.Tensor, x0_ID: np.ndarray) -> np.ndarray:
    """Return the like probabilities [G, I], user by user."""
    x_ID = torch.from_numpy(x0_ID)
    return np.stack([selector.like_probability(x_ID, row.expand(len(x_ID), -1)).numpy() for row in factor_GF])


def indifferent(popularity: list[float]) -> Selector:
    """Return a selector of two-dimensional items that all users like alike: `sigmoid(popularity · x)`."""
    selector = Selector(2, 1)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.zero_()
        selector.popularity.weight.copy_(torch.tensor([popularity]))
    return selector


@pytest.mark.parametrize("likes_at_once", [1, 2 * ITEMS + 1, 2**26])
def test_the_best_unseen_items_come_first_whatever_the_chunks(
    likes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "LIKES_AT_ONCE", likes_at_once)
    selector, factor_GF, x0_ID = world()
    retrieved = retrieve(selector, factor_GF, x0_ID, RATED, 6)
    like_GI = likes(selector, factor_GF, x0_ID)
    for rows, rated, like_I in zip(retrieved, RATED, like_GI, strict=True):
        best = [row for row in np.argsort(-like_I).tolist() if row not in rated]
        assert rows.tolist() == best[:6]


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_a_user_of_few_unseen_items_gets_them_all_and_no_rated_one(diversity: float) -> None:
    selector, factor_GF, x0_ID = world()
    rated = [np.arange(25), np.arange(30), np.array([], int), np.array([7, 7]), np.arange(5, 30)]
    retrieved = retrieve(selector, factor_GF, x0_ID, rated, 29, diversity)
    assert [sorted(rows.tolist()) for rows in (retrieved[0], retrieved[1], retrieved[3], retrieved[4])] == [
        [25, 26, 27, 28, 29],
        [],
        [row for row in range(30) if row != 7],
        [0, 1, 2, 3, 4],
    ]
    assert len(set(retrieved[2].tolist())) == 29


def test_mmr_passes_over_an_item_that_is_like_one_chosen_before() -> None:
    selector = indifferent([2.0, 0.0])
    x0_ID = np.array([[0.9, 0.0], [1.0, 0.05], [0.5, 0.9], [-1.0, 0.0]], np.float32)
    factor_1F, nothing = torch.zeros(1, 2), [np.array([], int)]
    (plain,) = retrieve(selector, factor_1F, x0_ID, nothing, 3)
    (diverse,) = retrieve(selector, factor_1F, x0_ID, nothing, 3, 0.5)
    assert plain.tolist() == [1, 0, 2]  # like probabilities 0.88, 0.86, 0.73 and 0.12
    assert diverse.tolist() == [1, 3, 2]  # the opposite of the first gains more by distance than it loses


def test_mmr_chooses_as_planning_does_among_all_unseen_items() -> None:
    selector, factor_GF, x0_ID = world()
    unit_ID = x0_ID / np.linalg.norm(x0_ID, axis=1, keepdims=True)
    like_GI = likes(selector, factor_GF, x0_ID)
    retrieved = retrieve(selector, factor_GF, x0_ID, RATED, 6, 0.3)
    for rows, rated, like_I in zip(retrieved, RATED, like_GI, strict=True):
        unseen = np.array([row for row in range(ITEMS) if row not in rated])
        chosen = choose(unit_ID[unseen], like_I[unseen], np.zeros(len(unseen), bool), 6, 0.3)
        assert rows.tolist() == unseen[chosen].tolist()
