"""Diversity: exact by hand, equal to plain loops, and a loss for a prior that gives everyone the same."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.evaluation.diversity import novelty, set_cosines, vendi_score, vendi_scores, worst_decile

cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 10), st.integers(2, 16))


def some_items(seed: int, count: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)) + 0.5


def test_vendi_counts_different_items() -> None:
    assert vendi_score(np.eye(4)) == pytest.approx(4)
    assert vendi_score(np.ones((7, 3))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(3), 5, axis=0) * 9) == pytest.approx(3)
    # Two of cosine c have eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    entropy = -sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2))
    assert vendi_score(np.array([[1, 0], [c, 0.8]])) == pytest.approx(math.exp(entropy))


@given(cases)
@settings(deadline=None, max_examples=30)
def test_vendi_equals_the_entropy_of_the_kernel_and_keeps_its_bounds(case: tuple[int, int, int]) -> None:
    x = some_items(*case)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    value = np.linalg.eigvalsh(unit @ unit.T / len(x))
    expected = math.exp(-sum(v * math.log(v) for v in value if v > 1e-15))
    score = vendi_score(x)
    assert score == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= score <= min(x.shape) + 1e-9
    random = np.random.default_rng(case[0])
    rotation, _ = np.linalg.qr(random.standard_normal((case[2], case[2])))
    scale = random.uniform(0.1, 10, (len(x), 1))
    assert vendi_score(random.permutation(scale * x @ rotation)) == pytest.approx(score, rel=1e-8)
    assert vendi_score(np.concatenate([x, x])) == pytest.approx(score, rel=1e-8)


def test_vendi_of_users_and_pooled() -> None:
    scores = vendi_scores([np.eye(4)[:2], torch.eye(4)[1:].double()])
    assert scores.user_U == pytest.approx([2, 3])
    # Of five items, the second and third directions come twice.
    expected = math.exp(-sum(p * math.log(p) for p in (0.2, 0.4, 0.2, 0.2)))
    assert scores.pooled == pytest.approx(expected)


def test_cosines_equal_plain_loops_at_unequal_numbers_of_items() -> None:
    items = [some_items(seed, count, 5) for seed, count in enumerate((2, 4, 7))]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in items]
    cosines = set_cosines(items)
    for user, x in enumerate(unit):
        within = [x[i] @ x[j] for i in range(len(x)) for j in range(len(x)) if i != j]
        assert cosines.within_U[user] == pytest.approx(np.mean(within), rel=1e-10)
        others = [
            np.mean([one @ two for one in x for two in y]) for number, y in enumerate(unit) if number != user
        ]
        assert cosines.across_U[user] == pytest.approx(np.mean(others), rel=1e-10)
    assert cosines.contrast == pytest.approx(cosines.within_U - cosines.across_U)


def test_the_same_good_pictures_for_everyone_lose_against_personal_ones() -> None:
    random = np.random.default_rng(0)
    taste_U1D = random.standard_normal((6, 1, 32))
    personal = taste_U1D + 0.3 * random.standard_normal((6, 8, 32))
    same_set, same_item = [personal[0]] * 6, [np.repeat(personal[0][:1], 8, axis=0)] * 6
    assert set_cosines(list(personal)).contrast.min() > 0.5
    assert set_cosines(same_set).contrast.max() < 0
    assert set_cosines(same_item).contrast == pytest.approx(0, abs=1e-12)
    pooled = [vendi_scores(items).pooled for items in (list(personal), same_set, same_item)]
    assert pooled[0] > 2 * pooled[1] > 2 * pooled[2]
    assert pooled[2] == pytest.approx(1)


@given(cases)
@settings(deadline=None, max_examples=20)
def test_cosines_ignore_order_rotation_and_length(case: tuple[int, int, int]) -> None:
    items = [some_items(case[0] // 2 + number, case[1], case[2]) for number in range(3)]
    random = np.random.default_rng(case[0])
    rotation, _ = np.linalg.qr(random.standard_normal((case[2], case[2])))
    moved = [3 * random.permutation(x) @ rotation for x in items]
    one, two = set_cosines(items), set_cosines(moved)
    assert two.within_U == pytest.approx(one.within_U, abs=1e-10)
    assert two.across_U == pytest.approx(one.across_U, abs=1e-10)


def test_novelty_is_the_distance_to_the_nearest_real_item() -> None:
    real = np.array([[2.0, 0, 0], [0, 3, 0], [0, 0, 1]])
    result = novelty(np.array([[5.0, 0, 0], [0, 3, 4], [1, 1, 0]]), torch.from_numpy(real))
    assert result.novelty_N == pytest.approx([0, 0.2, 1 - 0.5**0.5], abs=1e-6)
    assert result.nearest_row_N[:2].tolist() == [0, 2]
    assert [result.copy_share(bound) for bound in (0.99, 0.79, 0.7)] == pytest.approx([1 / 3, 2 / 3, 1])
    copies = novelty(real, real)
    assert copies.novelty_N == pytest.approx(0, abs=1e-6)
    assert copies.novelty_N.min() >= 0
    assert copies.nearest_row_N.tolist() == [0, 1, 2]


def test_the_worst_decile_is_the_mean_of_the_worst_tenth_rounded_up() -> None:
    figure = np.random.default_rng(0).permutation(np.arange(25.0))
    assert worst_decile(figure) == 1.0  # of 0, 1 and 2
    assert worst_decile(figure, greater_is_better=False) == 23.0
    assert worst_decile(np.array([0.7])) == 0.7


def test_items_without_direction_and_single_users_and_items_are_refused() -> None:
    with pytest.raises(ValueError, match="embeddings: found 3, 2 of them finite and not zero"):
        vendi_score(np.array([[1.0, 0], [0, 0], [0, 1]]))
    with pytest.raises(ValueError, match="embeddings: found 1, 0 of them finite"):
        vendi_score(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="items: found 1 users; expected at least two"):
        set_cosines([np.eye(2)])
    with pytest.raises(ValueError, match="items of user 1: found 1, 1 of them finite and not zero"):
        set_cosines([np.eye(2), np.ones((1, 2))])
    with pytest.raises(ValueError, match="novelty: found 2 embeddings and 0 real items"):
        novelty(np.eye(2), np.empty((0, 2)))
    for figure in (np.array([]), np.array([0.1, np.nan])):
        with pytest.raises(ValueError, match=f"figure_U: found {len(figure)} users"):
            worst_decile(figure)
