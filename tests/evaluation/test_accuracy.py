"""Measures of predictions: equal to plain loops in double precision, with intervals over users."""

import numpy as np
import pytest

from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.accuracy import (
    Measure,
    Predictions,
    accuracy,
    auc,
    bootstrap,
    calibration_error,
    measure_accuracy,
    pairwise_accuracy,
    reliability_table,
)

HAND = Predictions(
    np.array([0.9, 0.2, 0.6, 0.6, 0.4, 0.1, 0.8]),
    np.array([1, 0, 0, 1, 1, 0, 1]),
    np.array([0, 0, 0, 0, 2, 2, 5]),
)


def random_ratings(seed: int, users: int = 20, ratings: int = 300) -> Predictions:
    """Predictions of one digit, so that many are equal, and ends of the scale among them."""
    random = np.random.default_rng(seed)
    probability = random.integers(0, 11, ratings) / 10
    user = np.r_[np.arange(users), random.integers(0, users, ratings - users)]
    return Predictions(probability, (random.random(ratings) < probability).astype(np.int8), user)


def ranked_right(predictions: Predictions, same_user: bool) -> float:
    """Loop over all pairs of a like and a dislike."""
    right, pairs = 0.0, 0
    for p, like, user in zip(*predictions, strict=True):
        for other_p, other_like, other_user in zip(*predictions, strict=True):
            if like == 1 and other_like == 0 and (user == other_user or not same_user):
                right += 1.0 if p > other_p else 0.5 if p == other_p else 0.0
                pairs += 1
    return right / pairs


def test_a_case_by_hand() -> None:
    assert accuracy(HAND) == 5 / 7  # wrong: 0.6 disliked, 0.4 liked
    # User 0: 0.9 and 0.6 against 0.2 and 0.6, half a pair is equal. User 2: one pair. User 5: none.
    assert pairwise_accuracy(HAND) == (3.5 + 1) / 5
    assert auc(HAND) == pytest.approx((3 + 2.5 + 2 + 3) / 12)
    assert calibration_error(HAND) == pytest.approx((0.1 + 0.2 + 2 * 0.1 + 0.6 + 0.1 + 0.2) / 7)
    table = [(bin.num_ratings, bin.mean_probability, bin.like_share) for bin in reliability_table(HAND)]
    assert table == [(1, 0.1, 0), (1, 0.2, 0), (1, 0.4, 1), (2, 0.6, 0.5), (1, 0.8, 1), (1, 0.9, 1)]


@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_plain_loops(seed: int) -> None:
    predictions = random_ratings(seed)
    assert auc(predictions) == pytest.approx(ranked_right(predictions, same_user=False), abs=1e-6)
    assert pairwise_accuracy(predictions) == pytest.approx(
        ranked_right(predictions, same_user=True), abs=1e-12
    )
    right = sum((p >= 0.5) == (like == 1) for p, like, _ in zip(*predictions, strict=True))
    assert accuracy(predictions) == right / len(predictions.like_N)


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_equals_a_loop_over_the_table(seed: int) -> None:
    random = np.random.default_rng(seed)
    probability = np.r_[random.random(200), 0.0, 1.0, 1.0]
    predictions = Predictions(probability, random.integers(0, 2, 203), random.integers(0, 9, 203))
    error = 0.0
    table = reliability_table(predictions)
    for bin in table:
        rows = [
            row
            for row, p in enumerate(probability)
            if bin.low <= p < bin.high or (bin.high == 1.0 and p == 1.0)
        ]
        assert bin.num_ratings == len(rows)
        assert bin.mean_probability == pytest.approx(sum(probability[rows]) / len(rows))
        assert bin.like_share == pytest.approx(sum(predictions.like_N[rows]) / len(rows))
        error += len(rows) / 203 * abs(bin.mean_probability - bin.like_share)
    assert sum(bin.num_ratings for bin in table) == 203
    assert calibration_error(predictions) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("measure", [auc, accuracy, pairwise_accuracy, calibration_error])
def test_the_order_and_the_numbers_of_users_do_not_matter(measure: Measure) -> None:
    predictions = random_ratings(4)
    order = np.random.default_rng(0).permutation(300)
    shuffled = Predictions(*(column[order] for column in predictions))
    shuffled = shuffled._replace(user_N=1000 - 7 * shuffled.user_N)
    assert measure(shuffled) == pytest.approx(measure(predictions), abs=1e-9)


def test_the_bootstrap_equals_a_loop_over_drawn_users() -> None:
    predictions = random_ratings(5, users=6, ratings=40)
    interval = bootstrap(pairwise_accuracy, predictions, num_samples=50, seed=3)
    random = np.random.default_rng(3)
    values = []
    for _ in range(50):
        right = pairs = 0.0
        for user in random.integers(6, size=6):  # a user who is drawn twice counts as two users
            rows = predictions.user_N == user
            mine = Predictions(*(column[rows] for column in predictions))
            number = mine.like_N.sum() * (1 - mine.like_N).sum()
            if number:
                right += ranked_right(mine, same_user=True) * number
                pairs += number
        values.append(right / pairs)
    assert interval.value == pairwise_accuracy(predictions)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert interval.standard_error == pytest.approx(np.std(values, ddof=1))
    assert (interval.num_users, interval.num_samples) == (6, 50)


def test_intervals_cover_the_truth_and_narrow_with_the_users() -> None:
    """Every user has an accuracy: their true mean lies in 95% of the intervals, or nearly so."""
    random = np.random.default_rng(6)
    covered, width = 0, {}
    for users in (10, 60):
        for _ in range(60):
            right = random.random((users, 20)) < random.uniform(0.5, 0.9, (users, 1))
            like = random.integers(0, 2, (users, 20))
            probability = np.where(right, like, 1 - like) * 0.8 + 0.1
            user = np.repeat(np.arange(users), 20)
            interval = bootstrap(accuracy, Predictions(probability.ravel(), like.ravel(), user), 200)
            covered += interval.low <= 0.7 <= interval.high
            width[users] = interval.high - interval.low
    assert covered / 120 > 0.85
    assert width[60] < width[10]


def test_all_measures_come_with_intervals_and_the_seed_decides() -> None:
    predictions = random_ratings(7)
    figures = measure_accuracy(predictions, num_samples=30)
    assert figures == measure_accuracy(predictions, num_samples=30)
    assert figures.auc.low != measure_accuracy(predictions, num_samples=30, seed=1).auc.low
    for interval in (figures.auc, figures.accuracy, figures.pairwise_accuracy, figures.calibration_error):
        assert interval.low < interval.high
        assert interval.standard_error > 0
        assert interval.num_users == 20
    assert figures.reliability == reliability_table(predictions)


def test_samples_without_likes_or_without_dislikes_have_no_auc() -> None:
    """Of two users, one of likes and one of dislikes, half of the samples draw one user twice."""
    predictions = Predictions(np.array([0.7, 0.6, 0.2, 0.1]), np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1]))
    assert bootstrap(accuracy, predictions, num_samples=40).num_samples == 40
    with pytest.raises(InputError, match="bootstrap samples of 2 users lack likes or dislikes"):
        bootstrap(auc, predictions, num_samples=40, seed=0)
    four = Predictions(*(np.tile(column, 2) for column in predictions))._replace(
        user_N=np.repeat(np.arange(4), 2)
    )
    assert 20 < bootstrap(auc, four, num_samples=40).num_samples < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_N": np.zeros(7, int)}, "ratings: 1 user; a bootstrap over users needs at least two"),
        ({"like_N": np.ones(7, int)}, "likes: 1 for all of 7 ratings; expected different ones"),
        ({"like_N": np.zeros(7, int)}, "likes: 0 for all of 7 ratings"),
        ({"like_probability_N": np.full(7, 0.5)}, "predictions: 0.5 for all of 7 ratings"),
        ({"like_probability_N": np.linspace(0, 1.5, 7)}, r"predictions: 1\.25; expected probabilities"),
        ({"like_probability_N": np.r_[HAND.like_probability_N[:6], np.nan]}, "predictions: nan; expected"),
        ({"like_N": np.array([0, 1, 2, 0, 0, 0, 0])}, "like 2; expected 0 or 1"),
        ({"user_N": np.arange(3)}, r"\[7, 7, 3\] predictions, likes and users"),
    ],
)
@pytest.mark.parametrize("measure", [auc, accuracy, pairwise_accuracy, calibration_error])
def test_bad_ratings_are_refused(measure: Measure, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap(measure, HAND._replace(**changes))


def test_measures_alone_refuse_bad_predictions() -> None:
    for measure in (auc, accuracy, pairwise_accuracy, calibration_error):
        with pytest.raises(InputError, match=r"predictions: -1\.0; expected probabilities from 0 to 1"):
            measure(HAND._replace(like_probability_N=np.linspace(-1, 1, 7)))
    for measure in (auc, pairwise_accuracy):
        with pytest.raises(InputError, match="predictions: 0.5 for all of 7 ratings"):
            measure(HAND._replace(like_probability_N=np.full(7, 0.5)))
    with pytest.raises(InputError, match="no like beside a dislike of the same user, among 7 ratings"):
        pairwise_accuracy(HAND._replace(user_N=np.arange(7)))
