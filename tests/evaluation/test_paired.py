"""Paired statistics: by hand, in any order and unit, and with the coverage that they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.evaluation.paired import bootstrap_interval, compare_users, wilcoxon


def test_wins_ties_means_and_differences_by_hand() -> None:
    left, right = np.array([0.5, 0.25, 1.0, 0.0]), np.array([0.25, 0.25, 0.5, 0.5])
    comparison = compare_users(left, right, num_samples=500)
    assert (comparison.num_users, comparison.win_share, comparison.tie_share) == (4, 0.5, 0.25)
    assert (comparison.left_mean, comparison.right_mean, comparison.difference) == (0.4375, 0.375, 0.0625)
    # Ranks 1, 2.5 and 2.5: the negative one is 2.5 of 6. Of 8 signs, 4 give at most 2.5, and 4 at least 3.5.
    assert comparison.wilcoxon_p == 1.0
    assert comparison.left_interval == bootstrap_interval(left, num_samples=500)
    assert comparison.difference_interval == bootstrap_interval(left - right, num_samples=500)


def test_five_wins_of_five_have_a_p_value_of_a_sixteenth() -> None:
    assert wilcoxon(np.arange(1.0, 6), np.zeros(5)) == 2 / 2**5
    assert wilcoxon(np.ones(5), np.ones(5)) == 1.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 80))
@settings(deadline=None, max_examples=30)
def test_sides_order_and_units_do_not_matter_to_the_p_value(seed: int, users: int) -> None:
    random = np.random.default_rng(seed)
    left, right = random.integers(0, 5, (2, users)).astype(float)
    p, order = wilcoxon(left, right), random.permutation(users)
    assert 0 < p <= 1
    assert wilcoxon(right, left) == p
    assert wilcoxon(left[order], right[order]) == pytest.approx(p)
    assert wilcoxon(8 * left + 1, 8 * right + 1) == p


def test_the_interval_covers_the_mean_as_often_as_its_level() -> None:
    random = np.random.default_rng(0)
    covered = []
    for seed in range(300):
        low, high = bootstrap_interval(random.standard_normal(60), seed, num_samples=400, level=0.8)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) == pytest.approx(0.8, abs=0.07)


def test_the_interval_depends_on_its_seed_alone_and_pairs_narrow_it() -> None:
    random = np.random.default_rng(0)
    user_effect = random.standard_normal(200)
    left = user_effect + 0.1 + 0.05 * random.standard_normal(200)
    one, again, other = (compare_users(left, user_effect, seed, num_samples=600) for seed in (0, 0, 1))
    assert one == again != other
    assert one.difference_interval.low > 0.08
    assert one.left_interval.low < one.right_interval.high  # unpaired, the two cannot be told apart
    assert bootstrap_interval(np.full(5, 0.5)) == (0.5, 0.5)


def test_unequal_empty_and_infinite_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="found 2 and 3; expected the same users in both"):
        compare_users(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"found shape \(0,\), 0 of them finite"):
        wilcoxon(np.array([]), np.array([]))
    with pytest.raises(ValueError, match=r"found shape \(2,\), 1 of them finite"):
        bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="level: found 95; expected a number between 0 and 1"):
        bootstrap_interval(np.ones(3), level=95)
