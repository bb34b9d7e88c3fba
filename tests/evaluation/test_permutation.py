"""The permutation test: exact on an enumerated case, uniform under the null, certain for personal items."""

from itertools import permutations

import numpy as np
import pytest

from rebeca_ray.catalog.manifest import PermutationFigures
from rebeca_ray.evaluation.permutation import permutation_test, permutation_test_by_image


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


def test_a_planted_effect_of_the_detectable_size_is_found_in_four_of_five_tests() -> None:
    users, trials = 60, 200
    random = np.random.default_rng(3)
    planted = permutation_test(random.random((users, users)), 2000).detectable_effect
    is_found = [
        permutation_test(random.random((users, users)) + planted * np.eye(users), 199, seed).p_value <= 0.05
        for seed in range(trials)
    ]
    assert np.mean(is_found) == pytest.approx(0.8, abs=0.09)  # three deviations of such a share


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


def test_the_authors_variant_equals_the_enumeration_of_all_deals() -> None:
    like, owner = np.random.default_rng(0).random((2, 5)), np.array([0, 0, 1, 1, 1])

    def statistic(deal: list[int]) -> float:
        return float(np.mean([like[0, deal[:2]].mean(), like[1, deal[2:]].mean()]))

    null = np.array([statistic(list(deal)) for deal in permutations(range(5))])
    test = permutation_test_by_image(like, owner, num_permutations=20_000)
    assert test.matched_mean == pytest.approx(statistic(list(range(5))))
    assert test.null_mean == pytest.approx(null.mean(), abs=0.003)
    assert test.null_std == pytest.approx(null.std(), rel=0.03)
    assert test.p_value == pytest.approx((null >= test.matched_mean).mean(), abs=0.01)


def test_images_of_one_user_that_hang_together_mislead_the_authors_variant_alone() -> None:
    """Without any personality, p <= 0.05 comes up once in twenty tests of ours, and more often in theirs."""
    random = np.random.default_rng(0)
    users, images = 30, 10
    owner = np.repeat(np.arange(users), images)
    ours, theirs = [], []
    for seed in range(200):
        taste_UF, kind_UF = random.standard_normal(
            (2, users, 8)
        )  # what a set shows has nothing to do with taste
        like = 1 / (1 + np.exp(-taste_UF @ kind_UF.T / 3)).repeat(images, axis=1)
        ours.append(permutation_test(like[:, ::images], num_permutations=199, seed=seed).p_value)
        theirs.append(permutation_test_by_image(like, owner, num_permutations=199, seed=seed).p_value)
    assert np.mean(np.array(ours) <= 0.05) < 0.1
    assert np.mean(np.array(theirs) <= 0.05) > 0.15


def test_an_image_for_each_user_is_needed_by_the_authors_variant() -> None:
    with pytest.raises(
        ValueError, match="owner_N: found 2 images of 1 users; expected 2 images, and some for"
    ):
        permutation_test_by_image(np.ones((2, 2)), np.array([0, 0]))
