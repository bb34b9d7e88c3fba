"""The permutation test: exact on an enumerated case, uniform under the null, certain for personal items."""

from itertools import permutations

import numpy as np
import pytest

from rebeca_ray.catalog.manifest import PermutationFigures
from rebeca_ray.evaluation.permutation import permutation_test


def test_p_value_and_null_equal_the_enumeration_of_all_permutations() -> None:
    like = np.random.default_rng(0).random((5, 5))
    shuffled = np.array([like[np.arange(5), list(order)].mean() for order in permutations(range(5))])
    test = permutation_test(like, num_permutations=20_000)
    assert test.matched_mean == pytest.approx(np.diagonal(like).mean())
    assert test.null_mean == pytest.approx(shuffled.mean(), abs=0.003)
    assert test.null_std == pytest.approx(shuffled.std(), rel=0.03)
    assert test.p_value == pytest.approx((shuffled >= test.matched_mean - 1e-12).mean(), abs=0.01)
    assert test.z == pytest.approx(test.effect / test.null_std)


def test_p_values_are_uniform_under_the_null() -> None:
    """All users like all items alike: 300 tests against the uniform law by Kolmogorov's statistic."""
    random = np.random.default_rng(1)
    p = np.sort(
        [
            permutation_test(random.random((30, 30)), num_permutations=199, seed=seed).p_value
            for seed in range(300)
        ]
    )
    distance = np.abs(p - (np.arange(300) + 0.5) / 300).max()
    assert distance < 1.63 / 300**0.5  # exceeded in 1% of such samples
    assert p.min() >= 1 / 200


def test_personal_items_are_found_and_z_grows_with_the_users() -> None:
    random = np.random.default_rng(2)

    def matrix(users: int) -> np.ndarray:
        return 0.2 + 0.1 * random.random((users, users)) + 0.02 * np.eye(users)

    small, large = permutation_test(matrix(100), 2000), permutation_test(matrix(900), 2000)
    assert small.effect == pytest.approx(0.02, abs=0.01)
    assert large.effect == pytest.approx(0.02, abs=0.004)
    assert large.p_value == 1 / 2001
    assert large.z_at(100) == pytest.approx(large.z / 3, rel=0.02)


@pytest.mark.parametrize("bad", [np.ones((3, 4)), np.ones((1, 1)), np.full((3, 3), np.nan)])
def test_any_but_a_square_finite_matrix_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a square, finite matrix of at least two users"):
        permutation_test(bad)


def test_figures_under_their_earlier_names_are_read() -> None:
    figures = permutation_test(np.array([[0.9, 0.2], [0.3, 0.8]])).figures()
    earlier = {
        {"matched": "own", "shuffled": "dealt"}.get(name, name): value for name, value in figures.items()
    }
    assert PermutationFigures.model_validate(earlier) == PermutationFigures.model_validate(figures)
