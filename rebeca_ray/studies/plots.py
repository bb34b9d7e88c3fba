"""Draw the plots of a study, as PNG files and as SVG for a page that may be dark.

Shapes: U users, B permutations.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rebeca_ray.evaluation.permutation import PermutationTest
from rebeca_ray.storage.store import open_store
from rebeca_ray.studies.metrics import GuidanceCell, Mean, VerifierFigures

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
def drawing(size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and its axes, and close it afterwards."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=size, constrained_layout=True)
        try:
            axes.grid(alpha=0.15)
            yield figure, axes
        finally:
            plt.close(figure)


def save(figure: Figure, uri: str) -> str:
    """Write a PNG with a white ground; return the same plot as SVG in the colour of the text around it."""
    png, text = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    open_store(uri).put(png.getvalue(), content_type="image/png")
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    # Ids are unique within one plot alone, and a page has several.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{PurePosixPath(uri).stem}-", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")


def plot_null(test: PermutationTest, uri: str) -> str:
    """Plot the statistic of random pairings beside that of the users' items."""
    with drawing() as (figure, axes):
        axes.hist(test.null_B, bins=40, color=OTHER, alpha=0.8, label="random pairings")
        axes.axvline(test.matched_mean, color=ACCENT, linewidth=2.5, label="the users' items")
        axes.set(xlabel="mean like probability by the verifier", ylabel="permutations")
        axes.legend(frameon=False)
        axes.set_title(f"z = {test.z:.1f}, p = {test.p_value:.4g}, {test.num_users:,} users", loc="left")
        return save(figure, uri)


def plot_calibration(verifier: VerifierFigures, uri: str) -> str:
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
        return save(figure, uri)


def plot_means(means: dict[str, Mean], label: str, uri: str) -> str:
    """Plot the mean of each set with its interval, the first set in another colour."""
    with drawing() as (figure, axes):
        for position, (name, mean) in enumerate(means.items()):
            axes.errorbar(
                mean.mean,
                name,
                xerr=[[mean.mean - mean.low], [mean.high - mean.mean]],
                marker="o",
                capsize=3,
                color=OTHER if position else ACCENT,
            )
        axes.invert_yaxis()
        axes.set(xlabel=label)
        return save(figure, uri)


def plot_trials(curves: dict[str, list[float]], uri: str) -> str:
    """Plot the validation loss of each trial after each epoch. The first trial has another colour."""
    with drawing() as (figure, axes):
        for number, (name, losses) in enumerate(curves.items()):
            style: Any = {"color": INK, "alpha": 0.25} if number else {"color": ACCENT, "label": name}
            axes.plot(range(1, len(losses) + 1), losses, **style)
        axes.set(xlabel="epoch", ylabel="validation loss")
        axes.legend(frameon=False)
        return save(figure, uri)


def plot_guidance(
    cells: Sequence[GuidanceCell], value: Callable[[GuidanceCell], float], label: str, uri: str
) -> str:
    """Plot a figure against the prior's guidance, with a line for each guidance of the decoder."""
    scales = sorted({cell.decoder_guidance_scale for cell in cells})
    with drawing() as (figure, axes):
        for number, scale in enumerate(scales):
            line = [cell for cell in cells if cell.decoder_guidance_scale == scale]
            axes.plot(
                [cell.prior_guidance_scale for cell in line],
                [value(cell) for cell in line],
                marker="o",
                color=plt.get_cmap("viridis")(0.1 + 0.8 * number / max(1, len(scales) - 1)),
                label=f"decoder {scale:g}",
            )
        axes.set(xlabel="prior guidance scale", ylabel=label)
        axes.legend(frameon=False, fontsize=8)
        return save(figure, uri)


def plot_users(pair: dict[str, np.ndarray], label: str, uri: str) -> str:
    """Plot a figure of every user for two sets, from the lowest to the highest."""
    with drawing() as (figure, axes):
        for (name, figure_U), colour in zip(pair.items(), (ACCENT, OTHER), strict=True):
            axes.plot(shares(figure_U), np.sort(figure_U), color=colour, label=name)
        axes.set(xlabel="share of users", ylabel=label, xlim=(0, 1), ylim=(0, None))
        axes.legend(frameon=False)
        return save(figure, uri)


def plot_gains(pair: dict[str, np.ndarray], label: str, uri: str) -> str:
    """Plot the difference of two sets for every user, from the greatest loss to the greatest gain."""
    (left, left_U), (right, right_U) = pair.items()
    difference_U = np.sort(left_U - right_U)
    with drawing() as (figure, axes):
        for name, is_better, colour in ((left, difference_U > 0, ACCENT), (right, difference_U <= 0, OTHER)):
            axes.fill_between(
                shares(difference_U), difference_U, where=is_better, color=colour, label=f"{name} is better"
            )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="share of users", ylabel=f"difference of {label}", xlim=(0, 1))
        axes.legend(frameon=False)
        return save(figure, uri)


def plot_wins(figures: dict[str, np.ndarray], label: str, uri: str) -> str:
    """Plot a heat map: the share of users with a greater figure in the row's set than in the column's."""
    names = list(figures)
    win_SS = np.array([[(row > column).mean() for column in figures.values()] for row in figures.values()])
    with drawing((SIZE[0], SIZE[0])) as (figure, axes):
        axes.grid(visible=False)
        axes.imshow(win_SS, cmap="PuOr_r", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row, column in np.ndindex(win_SS.shape):
            if row != column:
                share = win_SS[row, column]
                colour = "white" if abs(share - 0.5) > 0.3 else "black"
                axes.text(
                    column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour
                )
        axes.set_title(f"% of users with a greater {label}\nin the row than in the column", fontsize=9)
        return save(figure, uri)


def shares(figure_U: np.ndarray) -> np.ndarray:
    """Return the share of users below each place of a sorted figure."""
    return (np.arange(len(figure_U)) + 0.5) / len(figure_U)
