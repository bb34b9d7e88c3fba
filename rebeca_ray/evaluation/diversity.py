"""Diversity of items: within a user, across users, and away from the real items.

A prior that gives everyone the same good picture has a contrast of zero and a pooled Vendi score of one.

Shapes: N embeddings, D embed dim, U users, S items of a user (their number may differ), I real items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.evaluation.distances import Embeddings
from rebeca_ray.prior.selection import nearest_items


@dataclass(frozen=True, kw_only=True)
class VendiScores:
    """Effective number of different items: of each user, and of all users' items together."""

    user_U: np.ndarray
    pooled: float


@dataclass(frozen=True, kw_only=True)
class SetCosines:
    """Mean cosine of each user's items among themselves, and to the items of the other users."""

    within_U: np.ndarray
    across_U: np.ndarray

    @property
    def contrast(self) -> np.ndarray:
        """Return `within_U - across_U`. It is at most zero if all users have the same items."""
        return self.within_U - self.across_U


@dataclass(frozen=True, kw_only=True)
class Novelty:
    """Distance of each embedding to its nearest real item, 1 - cosine, and the row of that item."""

    novelty_N: np.ndarray
    nearest_row_N: np.ndarray

    def copy_share(self, max_similarity: float) -> float:
        """Return the share of near-copies: embeddings with a cosine above `max_similarity`."""
        return float((1 - self.novelty_N > max_similarity).mean())


def vendi_score(x_ND: Embeddings) -> float:
    """Return the effective number of different embeddings, between 1 and N, with the cosine as kernel.

    The score is exp(-sum of l log l) over the eigenvalues l of the N x N kernel, divided by N. The D x D
    matrix of second moments has the same eigenvalues but for zeros, so the smaller of the two is decomposed.
    Source: Friedman & Dieng 2023, definition 3.1.
    """
    unit_ND = unit_rows(x_ND, "embeddings", at_least=1)
    rows_first = unit_ND if unit_ND.shape[0] <= unit_ND.shape[1] else unit_ND.T
    eigenvalue = torch.linalg.eigvalsh(rows_first @ rows_first.T / len(unit_ND)).clamp(min=0)
    return math.exp(float(torch.special.entr(eigenvalue).sum()))


def vendi_scores(items: Sequence[Embeddings]) -> VendiScores:
    """Return the Vendi score of each user's items [S, D], and of all users' items pooled.

    The score grows with the number of items, so compare it at equal numbers.
    """
    pooled = torch.cat([torch.as_tensor(x_SD) for x_SD in items])
    return VendiScores(
        user_U=np.array([vendi_score(x_SD) for x_SD in items]),
        pooled=vendi_score(pooled),
    )


def set_cosines(items: Sequence[Embeddings]) -> SetCosines:
    """Return the mean cosines of each user's items [S, D], within the user and across users.

    Pairs of an item with itself are left out. Every other user counts the same, whatever the number of items.
    Raises ValueError for fewer than two users, and for a user of fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"items: found {len(items)} users; expected at least two")
    means, within = [], []
    for user, x_SD in enumerate(items):
        unit_SD = unit_rows(x_SD, f"items of user {user}", at_least=2)
        count, total_D = len(unit_SD), unit_SD.sum(0)
        # The squared norm of the sum is the sum of all cosines, those of an item with itself included.
        pairs = total_D.square().sum() - unit_SD.square().sum()
        within.append(float(pairs) / (count * (count - 1)))
        means.append(total_D / count)
    mean_UD = torch.stack(means)
    others_UD = (mean_UD.sum(0) - mean_UD) / (len(items) - 1)
    return SetCosines(within_U=np.array(within), across_U=(mean_UD * others_UD).sum(1).cpu().numpy())


def novelty(x_ND: Embeddings, item_ID: Embeddings) -> Novelty:
    """Return the novelty of each embedding: 1 - cosine to the nearest of the real items, in float32.

    It is the audit for copies, since no distance between distributions detects memorised items.
    """
    unit_ND, unit_ID = (F.normalize(torch.as_tensor(rows).float()) for rows in (x_ND, item_ID))
    if not len(unit_ND) or not len(unit_ID):
        raise ValueError(
            f"novelty: found {len(unit_ND)} embeddings and {len(unit_ID)} real items; expected some of both"
        )
    row_N, cosine_N = nearest_items(unit_ND, unit_ID)
    return Novelty(
        novelty_N=1 - cosine_N.clamp(max=1).cpu().numpy(),
        nearest_row_N=row_N.cpu().numpy(),
    )


def worst_decile(figure_U: np.ndarray, *, greater_is_better: bool = True) -> float:
    """Return the mean of a figure over the worst tenth of users.

    The tenth is rounded up to whole users. Raises ValueError unless there are users, and all figures finite.
    """
    if not len(figure_U) or not np.isfinite(figure_U).all():
        raise ValueError(
            f"figure_U: found {len(figure_U)} users, {np.isfinite(figure_U).sum()} of them finite; "
            "expected at least one, all finite"
        )
    ordered_U = np.sort(np.asarray(figure_U, np.float64))
    count = math.ceil(len(ordered_U) / 10)
    return float((ordered_U[:count] if greater_is_better else ordered_U[-count:]).mean())


def unit_rows(x_ND: Embeddings, name: str, *, at_least: int) -> torch.Tensor:
    """Return unit vectors in float64. Raises ValueError for few rows, and for a row without direction."""
    unit_ND = F.normalize(torch.as_tensor(x_ND).double())
    # A row of NaN or of zeros has no norm of one.
    directed = int((unit_ND.norm(dim=1) > 0.5).sum())
    if len(unit_ND) < at_least or directed < len(unit_ND):
        raise ValueError(
            f"{name}: found {len(unit_ND)}, {directed} of them finite and not zero; "
            f"expected at least {at_least}, all finite and not zero"
        )
    return unit_ND
