"""Draw the plots of a study, as PNG files and as SVG for a page that may be dark.

Shapes: U users, B permutations.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rebeca_ray.evaluation.permutation import PermutationTest
from rebeca_ray.studies.metrics import VerifierFigures

INK = "#010203"  # in an SVG, a stand-in for the page's colour of text
ACCENT, OTHER = "#3557d4", "#d9822b"
SIZE = (5.2, 3.2)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rebeca",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


@contextmanager
def drawing() -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and its axes, and close it afterwards."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, constrained_layout=True)
        try:
            axes.grid(alpha=0.15)
            yield figure, axes
        finally:
            plt.close(figure)


def save(figure: Figure, path: Path) -> str:
    """Write a PNG with a white ground; return the same plot as SVG in the colour of the text around it."""
    figure.savefig(path, dpi=160, facecolor="white")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    # Ids are unique within one plot alone, and a page has several.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{path.stem}-", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")


def plot_null(test: PermutationTest, path: Path) -> str:
    """Plot the statistic of random pairings beside that of the users' items."""
    with drawing() as (figure, axes):
        axes.hist(test.null_B, bins=40, color=OTHER, alpha=0.8, label="random pairings")
        axes.axvline(test.matched_mean, color=ACCENT, linewidth=2.5, label="the users' items")
        axes.set(xlabel="mean like probability by the verifier", ylabel="permutations")
        axes.legend(frameon=False)
        axes.set_title(f"z = {test.z:.1f}, p = {test.p_value:.4g}, {test.num_users:,} users", loc="left")
        return save(figure, path)


def plot_calibration(verifier: VerifierFigures, path: Path) -> str:
    """Plot the verifier's predictions against the share of likes, for seen and unseen users."""
    with drawing() as (figure, axes):
        axes.plot([0, 1], [0, 1], linestyle=":", color=INK, alpha=0.5)
        for label, tested, colour in (
            ("users of the fit", verifier.seen, ACCENT),
            ("users fitted later", verifier.unseen, OTHER),
        ):
            if tested is not None:
                bins = tested.reliability
                axes.plot(
                    [bin_.mean_probability for bin_ in bins],
                    [bin_.like_share for bin_ in bins],
                    marker="o",
                    color=colour,
                    label=f"{label}: error {tested.calibration_error.value:.3f}",
                )
        axes.set(xlabel="predicted like probability", ylabel="share of likes", xlim=(0, 1), ylim=(0, 1))
        axes.legend(frameon=False)
        return save(figure, path)


def plot_users(figures: dict[str, np.ndarray], label: str, path: Path) -> str:
    """Plot a figure of every user for each set, from the lowest to the highest."""
    with drawing() as (figure, axes):
        for (name, figure_U), colour in zip(figures.items(), (ACCENT, OTHER), strict=False):
            share = (np.arange(len(figure_U)) + 0.5) / len(figure_U)
            axes.plot(share, np.sort(figure_U), color=colour, label=f"{name}: mean {figure_U.mean():.3f}")
        axes.set(xlabel="share of users", ylabel=label, xlim=(0, 1), ylim=(0, None))
        axes.legend(frameon=False)
        return save(figure, path)


def plot_wins(left_U: np.ndarray, right_U: np.ndarray, names: tuple[str, str], label: str, path: Path) -> str:
    """Plot the difference of two sets for every user, from the greatest loss to the greatest win."""
    difference_U = np.sort(left_U - right_U)
    with drawing() as (figure, axes):
        share = (np.arange(len(difference_U)) + 0.5) / len(difference_U)
        axes.fill_between(share, difference_U, where=difference_U > 0, color=ACCENT, label=f"{names[0]} wins")
        axes.fill_between(share, difference_U, where=difference_U <= 0, color=OTHER, label=f"{names[1]} wins")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="share of users", ylabel=f"difference of {label}", xlim=(0, 1))
        axes.set_title(f"{(difference_U > 0).mean():.0%} of users gain", loc="left")
        axes.legend(frameon=False)
        return save(figure, path)
