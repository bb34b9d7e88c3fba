"""Paired statistics: is one method better than another for the same users?

The users are the sample: a user's items depend on each other, so they are averaged first.

Shapes: U users, B bootstrap samples.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SAMPLES_PER_CHUNK = 256
EXACT_UP_TO = 50  # users with a difference, as in scipy


class Interval(NamedTuple):
    """Bounds of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Comparison of two methods by a figure of each user. A difference is left minus right."""

    num_users: int
    win_share: float  # users with the greater figure on the left
    tie_share: float
    left_mean: float
    left_interval: Interval
    right_mean: float
    right_interval: Interval
    difference: float
    difference_interval: Interval
    wilcoxon_p: float


def compare_users(
    left_U: np.ndarray,
    right_U: np.ndarray,
    seed: int = 0,
    num_samples: int = 10_000,
    level: float = 0.95,
) -> PairedComparison:
    """Compare two figures per user, of the same users in the same order.

    Raises ValueError for unequal counts, for no users, and for a figure that is not finite.
    """
    left_U, right_U = paired_figures(left_U, right_U)
    left, right, difference = (
        bootstrap_interval(figure_U, seed, num_samples, level)
        for figure_U in (left_U, right_U, left_U - right_U)
    )
    return PairedComparison(
        num_users=len(left_U),
        win_share=float((left_U > right_U).mean()),
        tie_share=float((left_U == right_U).mean()),
        left_mean=float(left_U.mean()),
        left_interval=left,
        right_mean=float(right_U.mean()),
        right_interval=right,
        difference=float((left_U - right_U).mean()),
        difference_interval=difference,
        wilcoxon_p=wilcoxon(left_U, right_U),
    )


def bootstrap_interval(
    figure_U: np.ndarray, seed: int = 0, num_samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Return the percentile bootstrap interval of the mean over users.

    Each of `num_samples` samples draws U users with replacement. The same seed draws the same users for every
    figure of as many users. For a paired difference, give the differences. Source: Efron 1979.
    """
    figure_U = finite_figures(figure_U)
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}; expected a number between 0 and 1")
    users, random = len(figure_U), np.random.default_rng(seed)
    mean_B = np.empty(num_samples)
    for first in range(0, num_samples, SAMPLES_PER_CHUNK):
        count = min(SAMPLES_PER_CHUNK, num_samples - first)
        mean_B[first : first + count] = figure_U[random.integers(users, size=(count, users))].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(mean_B, (tail, 1 - tail))
    return Interval(float(low), float(high))


def wilcoxon(left_U: np.ndarray, right_U: np.ndarray) -> float:
    """Return the two-sided p-value of the signed-rank test: are the differences symmetric around zero?

    Users with equal figures are left out, and equal differences share their mean rank. Up to 50 users, the
    p-value is exact given the ranks. Beyond, it comes from the normal law with the variance of the ranks.
    Without any difference it is 1. Source: Wilcoxon 1945; Pratt & Gibbons 1981.
    """
    left_U, right_U = paired_figures(left_U, right_U)
    difference_U = (left_U - right_U)[left_U != right_U]
    if not len(difference_U):
        return 1.0
    _, group_U, size = np.unique(np.abs(difference_U), return_inverse=True, return_counts=True)
    # Mean ranks are multiples of a half, so twice the rank is whole.
    doubled_rank_U = (2 * np.cumsum(size) - size + 1)[group_U]
    doubled_sum = int(doubled_rank_U[difference_U > 0].sum())
    if len(difference_U) <= EXACT_UP_TO:
        return exact_p_value(doubled_rank_U, doubled_sum)
    deviation = math.sqrt(float((doubled_rank_U.astype(np.float64) ** 2).sum())) / 2
    z = (doubled_sum - doubled_rank_U.sum() / 2) / deviation
    return math.erfc(abs(z) / math.sqrt(2))


def exact_p_value(doubled_rank_U: np.ndarray, doubled_sum: int) -> float:
    """Return the two-sided p-value of a sum of ranks, if every sign is as likely as its opposite."""
    total = int(doubled_rank_U.sum())
    probability = np.zeros(total + 1)  # of each sum of doubled ranks with a positive sign
    probability[0] = 1.0
    for rank in doubled_rank_U:
        probability[rank:] = probability[rank:] + probability[: total + 1 - rank]
        probability /= 2
    return min(1.0, 2 * float(probability[: min(doubled_sum, total - doubled_sum) + 1].sum()))


def finite_figures(figure_U: np.ndarray) -> np.ndarray:
    """Return the figures in float64. Raises ValueError unless all are finite, and there are some."""
    figures = np.asarray(figure_U, np.float64)
    if figures.ndim != 1 or not len(figures) or not np.isfinite(figures).all():
        raise ValueError(
            f"figures per user: found shape {figures.shape}, {np.isfinite(figures).sum()} of them finite; "
            "expected one finite figure for each of at least one user"
        )
    return figures


def paired_figures(left_U: np.ndarray, right_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both figures in float64. Raises ValueError unless they are finite and of equal counts."""
    left, right = finite_figures(left_U), finite_figures(right_U)
    if len(left) != len(right):
        raise ValueError(
            f"figures per user: found {len(left)} and {len(right)}; expected the same users in both"
        )
    return left, right
