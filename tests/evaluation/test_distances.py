"""Distances of distributions: exact by hand, equal to plain loops in float64 and to torchmetrics."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from rebeca_ray.evaluation import distances
from rebeca_ray.evaluation.distances import (
    at_equal_counts,
    cmmd,
    density_coverage,
    frechet,
    kid,
    mmd,
    nearest_neighbour_precision_recall,
    precision_recall,
)

Distance = Callable[[np.ndarray, np.ndarray], float]
DISTANCES: dict[str, Distance] = {
    "cmmd": cmmd,
    "mmd": lambda left, right: mmd(left, right, sigma=1.5),
    "frechet": frechet,
    "kid": lambda left, right: kid(left, right, num_subsets=1, subset_size=len(left)),
    "precision": lambda left, right: precision_recall(left, right, 2).precision,
    "recall": lambda left, right: precision_recall(left, right, 2).recall,
    "density": lambda left, right: density_coverage(left, right, 2).density,
    "coverage": lambda left, right: density_coverage(left, right, 2).coverage,
}
SYMMETRIC = ["cmmd", "mmd", "frechet", "kid"]
cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(4, 12), st.integers(1, 16))


def two_sets(seed: int, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    left = random.standard_normal((count, width))
    return left, 1.3 * random.standard_normal((count, width)) + 0.4


def every_distance(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())(test)


# By hand


def test_cmmd_of_two_opposite_vectors() -> None:
    """The kernel of distance 2 and sigma 10 is exp(-4 / 200). Lengths do not matter."""
    assert cmmd(np.array([[3.0, 0.0]]), np.array([[-0.5, 0.0]])) == pytest.approx(
        1000 * (2 - 2 * math.exp(-0.02)), rel=1e-12
    )


def test_mmd_of_four_numbers() -> None:
    """The sets 0, 1 and 0, 2 with sigma 1: k(d) = exp(-d² / 2), without the diagonal within a set."""

    def k(distance: float) -> float:
        return math.exp(-(distance**2) / 2)

    value = mmd(np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]]), sigma=1)
    assert value == pytest.approx(k(1) + k(2) - 2 * (k(0) + k(2) + k(1) + k(1)) / 4, rel=1e-12)


def test_frechet_of_one_dimension() -> None:
    """In one dimension it is (difference of means)² + (difference of deviations)²."""
    left, right = np.array([[-1.0], [1.0]]), np.array([[1.0], [9.0]])
    assert frechet(left, right) == pytest.approx(5**2 + (8 / 2**0.5 - 2 / 2**0.5) ** 2, rel=1e-12)


def test_kid_of_two_pairs() -> None:
    """The kernel is (x y + 1)³: 1 and 27 within the sets, 1, 1, 8 and 64 across."""
    value = kid(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]), num_subsets=3, subset_size=2)
    assert value == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4, rel=1e-12)


def test_manifolds_on_a_line() -> None:
    """Real 0, 1, 3, 7 have radii 1, 1, 2, 4 with one neighbour. Generated 1, 2, 5, 20 have 1, 1, 3, 15."""
    real, generated = (np.array(values)[:, None] for values in ([0.0, 1, 3, 7], [1.0, 2, 5, 20]))
    # The closed balls [-1, 1], [0, 2], [1, 5] and [3, 11] hold all but 20.
    # [0, 2], [1, 3], [2, 8] and [5, 35] hold all of the real.
    assert precision_recall(generated, real, 1) == (0.75, 1.0)
    # The same balls without their bounds hold 1 once, 2 once and 5 once. The ball around 0 holds none.
    assert density_coverage(generated, real, 1) == (0.75, 0.75)


def test_a_good_picture_for_all_has_precision_without_recall() -> None:
    real = np.random.default_rng(0).standard_normal((50, 4))
    same = np.repeat(real[:1], 50, axis=0)
    assert precision_recall(same, real) == (1.0, 0.02)
    density, coverage = density_coverage(same, real)
    assert density > 0.2
    assert coverage < 0.5


# Against plain loops in float64, and against torchmetrics


def plain_mmd(left: np.ndarray, right: np.ndarray, sigma: float, *, diagonal: bool) -> float:
    def mean(one: np.ndarray, two: np.ndarray, same: bool) -> float:
        kernel = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * sigma**2))
            for i, x in enumerate(one)
            for j, y in enumerate(two)
            if diagonal or not same or i != j
        ]
        return math.fsum(kernel) / len(kernel)

    return mean(left, left, True) + mean(right, right, True) - 2 * mean(left, right, False)


@pytest.mark.parametrize("distances_at_once", [1, 30, 2**23])
def test_mmd_and_cmmd_equal_plain_loops_whatever_the_chunks(
    distances_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "DISTANCES_AT_ONCE", distances_at_once)
    left, right = two_sets(0, 13, 5)
    assert mmd(left, right, 2.0) == pytest.approx(plain_mmd(left, right, 2.0, diagonal=False), rel=1e-10)
    unit_left, unit_right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right))
    assert cmmd(left, right) == pytest.approx(
        1000 * plain_mmd(unit_left, unit_right, 10.0, diagonal=True), rel=1e-9
    )


def test_mmd_is_unbiased_at_unequal_counts_too() -> None:
    random = np.random.default_rng(0)
    values = [
        mmd(random.standard_normal((5, 3)), random.standard_normal((11, 3)), 1.0, equal_counts=False)
        for _ in range(2000)
    ]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / len(values) ** 0.5)


class Features(torch.nn.Module):
    """The features of torchmetrics are the embeddings themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND


def test_frechet_equals_torchmetrics() -> None:
    left, right = (torch.from_numpy(x) for x in two_sets(1, 60, 8))
    metric = FrechetInceptionDistance(Features(8))
    metric.update(left, real=True)
    metric.update(right, real=False)
    assert frechet(left, right) == pytest.approx(float(metric.compute()), rel=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kid_equals_torchmetrics_and_its_mean_over_subsets_nears_that_of_all() -> None:
    left, right = two_sets(2, 40, 6)
    metric = KernelInceptionDistance(Features(6), subsets=1, subset_size=40)
    metric.update(torch.from_numpy(left), real=True)
    metric.update(torch.from_numpy(right), real=False)
    of_all = kid(left, right, num_subsets=1, subset_size=40)
    assert of_all == pytest.approx(float(metric.compute()[0]), rel=1e-9)
    assert kid(left, right, num_subsets=400, subset_size=20) == pytest.approx(of_all, rel=0.1)


@given(cases)
@settings(deadline=None, max_examples=30)
def test_frechet_equals_the_root_of_the_product_at_any_rank(case: tuple[int, int, int]) -> None:
    """Compare with the root of one covariance, taken in full: trace of (A^½ B A^½)^½."""
    left, right = two_sets(*case)
    one, two = (np.atleast_2d(np.cov(x.T)) for x in (left, right))
    value, vector = np.linalg.eigh(one)
    root = (vector * np.sqrt(value.clip(min=0))) @ vector.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(min=0)).sum()
    expected = ((left.mean(0) - right.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * mixed
    assert frechet(left, right) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_fewer_embeddings_than_dimensions_and_of_constants() -> None:
    left, right = two_sets(3, 6, 200)
    assert frechet(left, left) == pytest.approx(0, abs=1e-11)
    assert frechet(left, left + 0.5) == pytest.approx(200 * 0.25, rel=1e-12)
    constant = np.zeros((6, 200))
    assert frechet(constant, right) == pytest.approx(
        float((right.mean(0) ** 2).sum() + right.var(0, ddof=1).sum()), rel=1e-12
    )


@given(cases, st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_neighbourhoods_equal_plain_loops(case: tuple[int, int, int], k: int) -> None:
    generated, real = two_sets(*case)

    def distance(one: np.ndarray, two: np.ndarray) -> float:
        return math.dist(one, two)

    def radius(row: int, among: np.ndarray) -> float:
        return sorted(distance(among[row], x) for number, x in enumerate(among) if number != row)[k - 1]

    def inside(x: np.ndarray, among: np.ndarray) -> list[bool]:
        return [distance(x, centre) < radius(row, among) for row, centre in enumerate(among)]

    held = np.array([inside(x, real) for x in generated])
    recalled = np.array([inside(x, generated) for x in real])
    assert precision_recall(generated, real, k) == (held.any(1).mean(), recalled.any(1).mean())
    assert density_coverage(generated, real, k) == pytest.approx(
        (held.sum() / (k * len(generated)), held.any(0).mean())
    )


# Properties


@given(cases)
@settings(deadline=None, max_examples=20)
def test_a_distance_is_symmetric_and_zero_for_the_same_set(case: tuple[int, int, int]) -> None:
    left, right = two_sets(*case)
    for name in SYMMETRIC:
        assert DISTANCES[name](left, right) == pytest.approx(
            DISTANCES[name](right, left), rel=1e-9, abs=1e-12
        )
    assert cmmd(left, left) == 0
    assert frechet(left, left) == pytest.approx(0, abs=1e-11)
    assert precision_recall(left, left, 2) == (1, 1)
    assert density_coverage(left, left, 2) == pytest.approx((1, 1))
    swapped = precision_recall(right, left, 2)
    assert precision_recall(left, right, 2) == (swapped.recall, swapped.precision)


@every_distance
@given(case=cases)
@settings(deadline=None, max_examples=20)
def test_order_and_rotation_change_nothing(case: tuple[int, int, int], distance: Distance) -> None:
    left, right = two_sets(*case)
    random = np.random.default_rng(case[0])
    rotation, _ = np.linalg.qr(random.standard_normal((case[2], case[2])))
    moved = distance(random.permutation(left) @ rotation, random.permutation(right) @ rotation)
    assert moved == pytest.approx(distance(left, right), rel=1e-8, abs=1e-10)


@given(cases, st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_scale(case: tuple[int, int, int], scale: float) -> None:
    left, right = two_sets(*case)
    scaled = scale * left, scale * right
    assert cmmd(*scaled) == pytest.approx(cmmd(left, right), rel=1e-8, abs=1e-9)
    assert frechet(*scaled) == pytest.approx(scale**2 * frechet(left, right), rel=1e-8)
    assert mmd(*scaled, sigma=scale) == pytest.approx(mmd(left, right, sigma=1), rel=1e-8, abs=1e-12)
    assert precision_recall(*scaled, 2) == precision_recall(left, right, 2)
    assert density_coverage(*scaled, 2) == density_coverage(left, right, 2)


@every_distance
def test_arrays_and_tensors_of_any_precision_are_alike(distance: Distance) -> None:
    left, right = (x.astype(np.float32) for x in two_sets(4, 20, 6))
    tensors = torch.from_numpy(left), torch.from_numpy(right).double()
    assert distance(left, right) == distance(*tensors)


@every_distance
def test_unequal_counts_and_widths_and_nan_are_refused(distance: Distance) -> None:
    left, right = two_sets(5, 8, 3)
    with pytest.raises(ValueError, match=r"found [78] and [78]; expected equal counts"):
        distance(left[:7], right)
    with pytest.raises(ValueError, match=r"found shapes \(8, \d\) and \(8, \d\); expected two matrices"):
        distance(left[:, :2], right)
    right[3, 1] = np.nan
    with pytest.raises(ValueError, match="found 8 and 8; expected at least . in each set, all finite"):
        distance(left, right)


def test_subsets_and_neighbours_beyond_the_count_are_refused() -> None:
    left, right = two_sets(6, 8, 3)
    with pytest.raises(ValueError, match="subset_size: found 1000; expected 2 to 8"):
        kid(left, right)
    for measure in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="num_neighbours: found 8; expected at least 1, and fewer than"):
            measure(left, right, num_neighbours=8)
    with pytest.raises(ValueError, match="found 1 and 1; expected at least 2"):
        frechet(left[:1], right[:1])


def test_equal_counts_are_drawn_by_seed_in_their_order() -> None:
    rows = np.arange(20, dtype=np.float64)[:, None]
    small, large, tensor = at_equal_counts(rows[:6], rows, torch.from_numpy(rows), seed=3)
    assert np.array_equal(small, rows[:6])
    assert len(large) == len(tensor) == 6
    assert sorted(set(np.ravel(large).tolist())) == np.ravel(large).tolist()
    again = at_equal_counts(rows[:6], rows, torch.from_numpy(rows), seed=3)
    assert np.array_equal(again[1], large)
    assert torch.equal(torch.as_tensor(again[2]), torch.as_tensor(tensor))
    assert not np.array_equal(at_equal_counts(rows[:6], rows, seed=4)[1], large)


def test_kid_depends_on_its_seed_alone() -> None:
    left, right = two_sets(7, 30, 4)
    values = [kid(left, right, seed, num_subsets=5, subset_size=10) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


# The authors' nearest test ratings


def test_nearest_test_ratings_count_once() -> None:
    """The first user's items lead to ratings 0, 0 and 2, of which one is liked. The second likes none."""
    angle = np.deg2rad([0.0, 50, 100, 200])
    rated = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    near = np.deg2rad([3.0, -10, 95])
    items = 5 * np.stack([np.cos(near), np.sin(near)], axis=1)
    result = nearest_neighbour_precision_recall(
        [items, torch.from_numpy(items[:1])],
        [rated, rated],
        [np.array([1, 1, 0, 1]), np.zeros(4, bool)],
    )
    assert result.precision_U.tolist() == [0.5, 0.0]
    assert result.recall_U[0] == pytest.approx(1 / 3)
    assert np.isnan(result.recall_U[1])


def test_items_that_reach_every_rating_have_the_precision_of_chance() -> None:
    rated = np.random.default_rng(0).standard_normal((10, 6))
    liked = np.arange(10) < 4
    assert nearest_neighbour_precision_recall([rated], [rated], [liked]) == (0.4, 1.0)


@pytest.mark.parametrize(("items", "ratings", "likes"), [(0, 3, 3), (2, 0, 0), (2, 3, 2)])
def test_users_without_items_or_ratings_are_refused(items: int, ratings: int, likes: int) -> None:
    match = f"user 0: found {items} generated items, {ratings} test ratings and {likes} likes"
    with pytest.raises(ValueError, match=match):
        nearest_neighbour_precision_recall([np.ones((items, 2))], [np.ones((ratings, 2))], [np.ones(likes)])
