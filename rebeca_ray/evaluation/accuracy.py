"""Measure the accuracy of predicted like probabilities: AUC, accuracy, pairs ranked right, calibration.

Intervals come from a bootstrap over users, and not over ratings: the ratings of one user resemble each other.

Shapes: U users, N ratings, S ratings of a resample, P groups of equal predictions of a user.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rebeca_ray.errors import InputError

LIKE_FROM = 0.5  # a prediction of at least this counts as a like
COVERAGE = 0.95  # of an interval
NUM_BINS = 10
LARGEST = np.nextafter(1.0, 0.0)  # torchmetrics gives a bin of its own to a prediction of exactly 1


class Predictions(NamedTuple):
    """N ratings with predictions: the like probability, the like (0 or 1), and the user, counted from 0."""

    like_probability_N: np.ndarray
    like_N: np.ndarray
    user_N: np.ndarray


Measure = Callable[[Predictions], float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measure, its standard error and its 95% interval over bootstrap samples of the users.

    Samples that lack likes or dislikes have no AUC. `num_samples` counts the others.
    """

    value: float
    low: float
    high: float
    standard_error: float
    num_users: int
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The ratings with a prediction from `low` to `high`: their mean prediction and their share of likes."""

    low: float
    high: float
    num_ratings: int
    mean_probability: float
    like_share: float


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """All measures of a verifier, with intervals, and its reliability table."""

    auc: Interval
    accuracy: Interval
    pairwise_accuracy: Interval
    calibration_error: Interval
    reliability: tuple[ReliabilityBin, ...]


def measure_accuracy(predictions: Predictions, num_samples: int = 1000, seed: int = 0) -> Accuracy:
    """Return all measures with intervals. Raises InputError as `bootstrap` does."""
    return Accuracy(
        auc=bootstrap(auc, predictions, num_samples, seed),
        accuracy=bootstrap(accuracy, predictions, num_samples, seed),
        pairwise_accuracy=bootstrap(pairwise_accuracy, predictions, num_samples, seed),
        calibration_error=bootstrap(calibration_error, predictions, num_samples, seed),
        reliability=reliability_table(predictions),
    )


def auc(predictions: Predictions) -> float:
    """Return the area under the ROC curve, over the ratings of all users together.

    Raises InputError without both likes and dislikes, and if all predictions are equal.
    """
    # The import takes seconds of every process that trains, so it waits.
    from torchmetrics.functional.classification import binary_auroc

    check_variety(predictions)
    return float(binary_auroc(torch.as_tensor(probabilities(predictions)), likes(predictions)))


def accuracy(predictions: Predictions) -> float:
    """Return the share of ratings that are predicted right, where a like has a prediction of at least 0.5."""
    check_predictions(predictions)
    return float(((predictions.like_probability_N >= LIKE_FROM) == (predictions.like_N == 1)).mean())


def pairwise_accuracy(predictions: Predictions) -> float:
    """Return the share of (like, dislike) pairs of the same user that are ranked right.

    Equal predictions count as half a pair. All pairs count the same, so users with many ratings count more.
    Raises InputError without such a pair, and if all predictions are equal.
    """
    check_predictions(predictions)
    check_variety(predictions)
    like_N = predictions.like_N.astype(np.float64)
    order = np.lexsort((predictions.like_probability_N, predictions.user_N))
    user_N, probability_N = predictions.user_N[order], predictions.like_probability_N[order]
    is_new_user_N = np.r_[True, user_N[1:] != user_N[:-1]]
    start_P = np.flatnonzero(is_new_user_N | np.r_[True, probability_N[1:] != probability_N[:-1]])
    likes_P, dislikes_P = (np.add.reduceat(values[order], start_P) for values in (like_N, 1 - like_N))
    # Dislikes with a smaller prediction: those before the group, less those of the users before.
    before_P = np.cumsum(dislikes_P) - dislikes_P
    first_P = np.maximum.accumulate(np.where(is_new_user_N[start_P], np.arange(len(start_P)), 0))
    right = (likes_P * (before_P - before_P[first_P] + dislikes_P / 2)).sum()
    _, row_N = np.unique(predictions.user_N, return_inverse=True)
    pairs = (np.bincount(row_N, like_N) * np.bincount(row_N, 1 - like_N)).sum()
    if not pairs:
        raise InputError(
            f"ratings: no like beside a dislike of the same user, among {len(row_N)} ratings; give more"
        )
    return float(right / pairs)


def calibration_error(predictions: Predictions) -> float:
    """Return the expected calibration error over 10 bins of equal width (Guo et al. 2017, equation 3)."""
    from torchmetrics.functional.classification import binary_calibration_error

    return float(
        binary_calibration_error(
            torch.as_tensor(probabilities(predictions)), likes(predictions), n_bins=NUM_BINS, norm="l1"
        )
    )


def reliability_table(predictions: Predictions) -> tuple[ReliabilityBin, ...]:
    """Return the bins of the calibration error that have ratings (Guo et al. 2017, section 2)."""
    probability_N = probabilities(predictions)
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64).numpy()
    bin_N = np.searchsorted(edges, probability_N, side="right") - 1
    return tuple(
        ReliabilityBin(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            num_ratings=int((bin_N == number).sum()),
            mean_probability=float(probability_N[bin_N == number].mean()),
            like_share=float(predictions.like_N[bin_N == number].mean()),
        )
        for number in np.unique(bin_N)
    )


def bootstrap(measure: Measure, predictions: Predictions, num_samples: int = 1000, seed: int = 0) -> Interval:
    """Return a measure with its bootstrap interval over users: 2.5% and 97.5% of its samples.

    A user who is drawn twice counts as two users. Raises InputError for fewer than two users, for likes alone
    or dislikes alone, for equal predictions, and if more than half of the samples have no value.
    """
    check_predictions(predictions)
    check_variety(predictions)
    users, row_N = np.unique(predictions.user_N, return_inverse=True)
    if len(users) < 2:
        raise InputError(f"ratings: {len(users)} user; a bootstrap over users needs at least two")
    order_N, count_U = np.argsort(row_N, kind="stable"), np.bincount(row_N)
    start_U = np.cumsum(count_U) - count_U
    random = np.random.default_rng(seed)
    values: list[float] = []
    for _ in range(num_samples):
        drawn_U = random.integers(len(users), size=len(users))
        drawn_count_U = count_U[drawn_U]
        offset_U = start_U[drawn_U] - (np.cumsum(drawn_count_U) - drawn_count_U)
        row_S = order_N[np.repeat(offset_U, drawn_count_U) + np.arange(drawn_count_U.sum())]
        user_S = np.repeat(np.arange(len(users)), drawn_count_U)
        with suppress(InputError):
            values.append(
                measure(Predictions(predictions.like_probability_N[row_S], predictions.like_N[row_S], user_S))
            )
    if 2 * len(values) < max(2, num_samples):
        raise InputError(
            f"ratings: {num_samples - len(values)} of {num_samples} bootstrap samples of {len(users)} users "
            "lack likes or dislikes; give more users"
        )
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(
        value=measure(predictions),
        low=float(low),
        high=float(high),
        standard_error=float(np.std(values, ddof=1)),
        num_users=len(users),
        num_samples=len(values),
    )


def probabilities(predictions: Predictions) -> np.ndarray:
    """Return the predictions in double precision, just below 1 at most, after a check."""
    check_predictions(predictions)
    return np.minimum(predictions.like_probability_N.astype(np.float64), LARGEST)


def likes(predictions: Predictions) -> torch.Tensor:
    """Return the likes as torchmetrics takes them."""
    return torch.as_tensor(predictions.like_N.astype(np.int64))


def check_predictions(predictions: Predictions) -> None:
    """Raise InputError for columns of different lengths, and for any but probabilities and likes."""
    lengths = [len(column) for column in predictions]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError(
            f"ratings: {lengths} predictions, likes and users; expected some, and as many of each"
        )
    inside_N = (predictions.like_probability_N >= 0) & (predictions.like_probability_N <= 1)
    if not inside_N.all():
        raise InputError(
            f"predictions: {predictions.like_probability_N[~inside_N][0]}; expected probabilities from 0 to 1"
        )
    if not np.isin(predictions.like_N, (0, 1)).all():
        raise InputError(
            f"ratings: like {predictions.like_N[~np.isin(predictions.like_N, (0, 1))][0]}; expected 0 or 1"
        )


def check_variety(predictions: Predictions) -> None:
    """Raise InputError unless likes and predictions differ from rating to rating."""
    for name, values in (("likes", predictions.like_N), ("predictions", predictions.like_probability_N)):
        if len(values) and (values == values[0]).all():
            raise InputError(
                f"{name}: {values[0]} for all of {len(values)} ratings; expected different ones; "
                "take other ratings"
            )
