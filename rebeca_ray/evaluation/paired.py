"""Paired statistics: is one method better than another for the same users?

The users are the sample: a user's items depend on each other, so they are averaged first.

Shapes: U users, B bootstrap samples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

SAMPLES_AT_ONCE = 256


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
    """Return the percentile bootstrap interval of the mean over users (Efron 1979).

    Each of `num_samples` samples draws U users with replacement. The same seed draws the same users for every
    figure of as many users. For a paired difference, give the differences.
    """
    figure_U = finite_figures(figure_U)
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}; expected a number between 0 and 1")
    if len(figure_U) == 1:  # scipy refuses a single one
        return Interval(float(figure_U[0]), float(figure_U[0]))
    interval = stats.bootstrap(
        (figure_U,),
        np.mean,
        n_resamples=num_samples,
        batch=SAMPLES_AT_ONCE,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def wilcoxon(left_U: np.ndarray, right_U: np.ndarray) -> float:
    """Return the two-sided p-value of the signed-rank test: are the differences symmetric around zero?

    Users with equal figures are left out. Without any difference, the p-value is 1. Source: Wilcoxon 1945.
    """
    left_U, right_U = paired_figures(left_U, right_U)
    difference_U = (left_U - right_U)[left_U != right_U]
    return float(stats.wilcoxon(difference_U).pvalue) if len(difference_U) else 1.0


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
