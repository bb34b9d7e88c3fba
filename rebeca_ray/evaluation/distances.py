"""Distances between two sets of embeddings: kernels, Fréchet, and neighbourhoods, in float64.

Most of these measures have a bias that depends on the counts. All therefore refuse two sets of unequal
counts, unless `mmd` or `frechet` is called without `equal_counts`. `at_equal_counts` draws subsets. Pairs are
compared in chunks of rows, so memory does not grow with their number.

Shapes: N embeddings of either set, D embed dim, R rows of a chunk, U users, S items of a user, M test ratings
of a user.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.prior.selection import nearest_items

Embeddings = np.ndarray | torch.Tensor

DISTANCES_AT_ONCE = 2**20  # 8 MiB per matrix, which processor caches hold
# Squared distances below this share of the squared norms are zero. Equal rows then have distance zero,
# whatever the order of summation. Inputs in float32 are rounded at a share of about 1e-14.
SAME_ROW = 1e-12
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class PrecisionRecall(NamedTuple):
    """Share of generated embeddings among the real ones, and of real embeddings among the generated ones."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Mean number of real neighbourhoods per generated embedding, over k, and share of them reached."""

    density: float
    coverage: float


class UserPrecisionRecall(NamedTuple):
    """Precision and recall of each user. The recall of a user without a liked test rating is NaN."""

    precision_U: np.ndarray
    recall_U: np.ndarray


def at_equal_counts(*sets: Embeddings, seed: int = 0) -> tuple[Embeddings, ...]:
    """Return the sets at the smallest count among them, by a random subset of each larger set.

    Rows are drawn without replacement and keep their order. The smallest set is returned as it is.
    """
    count = min(len(x_ND) for x_ND in sets)
    return tuple(draw_rows(x_ND, count, [seed, number]) for number, x_ND in enumerate(sets))


def cmmd(left_ND: Embeddings, right_ND: Embeddings) -> float:
    """Return CMMD as published: MMD² with a Gaussian kernel on unit vectors, times 1000.

    The kernel has sigma 10. The estimate is the biased V-statistic: its means include the diagonal, as in
    the authors' code, so it is never negative. Source: Jayasumana et al. 2024, and their code; Gretton et
    al. 2012, equation 5.
    """
    left_ND, right_ND = (F.normalize(x_ND) for x_ND in checked_pair(left_ND, right_ND))
    within = kernel_sum(left_ND, left_ND, CMMD_SIGMA) + kernel_sum(right_ND, right_ND, CMMD_SIGMA)
    across = kernel_sum(left_ND, right_ND, CMMD_SIGMA)
    return CMMD_SCALE * max(0.0, within - 2 * across) / len(left_ND) ** 2


def mmd(left_ND: Embeddings, right_ND: Embeddings, sigma: float, *, equal_counts: bool = True) -> float:
    """Return the unbiased estimate of MMD² with the Gaussian kernel exp(-d² / (2 sigma²)).

    The embeddings are compared as they are. The estimate may be negative. Without `equal_counts`, the counts
    may differ: the mean of the estimate does not depend on them, its deviation does. Source: Gretton et al.
    2012, lemma 6.
    """
    left_ND, right_ND = checked_pair(left_ND, right_ND, at_least=2, equal_counts=equal_counts)
    within = 0.0
    for x_ND in (left_ND, right_ND):
        count = len(x_ND)
        within += (kernel_sum(x_ND, x_ND, sigma) - count) / (count * (count - 1))
    return within - 2 * kernel_sum(left_ND, right_ND, sigma) / (len(left_ND) * len(right_ND))


def frechet(left_ND: Embeddings, right_ND: Embeddings, *, equal_counts: bool = True) -> float:
    """Return the Fréchet distance of two Gaussians fitted to the embeddings, squared as in FID.

    With covariances Rᵀ R and Qᵀ Q, the trace of the root of their product is the sum of the singular values
    of R Qᵀ. Neither a product of covariances nor the root of a small eigenvalue is taken, so fewer embeddings
    than dimensions do no harm. Without `equal_counts`, the counts may differ, and the bias depends on both.
    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    left_ND, right_ND = checked_pair(left_ND, right_ND, at_least=2, equal_counts=equal_counts)
    mean_distance = (left_ND.mean(0) - right_ND.mean(0)).square().sum()
    left_root, right_root = covariance_root(left_ND), covariance_root(right_ND)
    traces = left_root.square().sum() + right_root.square().sum()
    shared = torch.linalg.svdvals(left_root @ right_root.T).sum()
    return max(0.0, float(mean_distance + traces - 2 * shared))


def kid(
    left_ND: Embeddings,
    right_ND: Embeddings,
    seed: int = 0,
    num_subsets: int = 100,
    subset_size: int = 1000,
) -> float:
    """Return the kernel distance of KID: unbiased MMD² with the kernel (x·y / D + 1)³, a mean over subsets.

    Each subset is drawn without replacement, on each side by itself. Raises ValueError for a subset larger
    than the sets. Source: Bińkowski et al. 2018, section 4.
    """
    from torchmetrics.image.kid import poly_mmd

    left_ND, right_ND = checked_pair(left_ND, right_ND, at_least=2)
    if not 2 <= subset_size <= len(left_ND):
        raise ValueError(
            f"subset_size: found {subset_size}; expected 2 to {len(left_ND)}, the count of the embeddings"
        )
    values = []
    for subset in range(num_subsets):
        left_part = draw_rows(left_ND, subset_size, [seed, subset, 0])
        right_part = draw_rows(right_ND, subset_size, [seed, subset, 1])
        values.append(float(poly_mmd(torch.as_tensor(left_part), torch.as_tensor(right_part))))
    return float(np.mean(values))


def precision_recall(
    generated_ND: Embeddings, real_ND: Embeddings, num_neighbours: int = 3
) -> PrecisionRecall:
    """Return precision and recall of the generated embeddings, by manifolds of k nearest neighbours.

    A manifold is the union of closed balls around its embeddings. A radius is the distance to the k-th
    neighbour in the same set. Source: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    generated_ND, real_ND = checked_pair(generated_ND, real_ND)
    real_radius_N = squared_radii(real_ND, num_neighbours)
    generated_radius_N = squared_radii(generated_ND, num_neighbours)
    balls_N, _ = count_balls(generated_ND, real_ND, real_radius_N, closed=True)
    generated_balls_N, _ = count_balls(real_ND, generated_ND, generated_radius_N, closed=True)
    return PrecisionRecall(share_of(balls_N > 0), share_of(generated_balls_N > 0))


def density_coverage(
    generated_ND: Embeddings, real_ND: Embeddings, num_neighbours: int = 5
) -> DensityCoverage:
    """Return density and coverage of the generated embeddings, by balls around the real ones.

    Density is the mean number of balls that hold a generated embedding, over k. Its expectation is 1 for
    equal distributions, and it may exceed 1. Coverage is the share of balls that hold any. The balls are
    open, as in the authors' code: a set against itself has density 1. Source: Naeem et al. 2020, section 3.
    """
    generated_ND, real_ND = checked_pair(generated_ND, real_ND)
    radius_N = squared_radii(real_ND, num_neighbours)
    balls_N, reached_N = count_balls(generated_ND, real_ND, radius_N, closed=False)
    return DensityCoverage(float(balls_N.double().mean()) / num_neighbours, share_of(reached_N))


def nearest_neighbour_precision_recall(
    generated: Sequence[Embeddings], rated: Sequence[Embeddings], liked: Sequence[np.ndarray]
) -> UserPrecisionRecall:
    """Return precision and recall of each user's test ratings that are nearest to a generated item.

    Each generated item of a user leads to one test rating of that user: the nearest by cosine. Several items
    may lead to the same rating, which counts once. Precision is the share of likes among these ratings.
    Recall is their share of the user's liked test ratings. The authors of REBECA report the means over users.
    Precision cannot exceed the user's rate of likes by much if the items reach most ratings, so read both.

    `generated[u]` is [S, D], `rated[u]` is [M, D] and `liked[u]` is [M]. S and M may differ between users.
    Raises ValueError for a user without items or ratings, or with ratings and likes of unequal counts.
    """
    precision, recall = [], []
    for user, (x_SD, rated_MD, liked_M) in enumerate(zip(generated, rated, liked, strict=True)):
        if not len(x_SD) or not len(rated_MD) or len(rated_MD) != len(liked_M):
            raise ValueError(
                f"user {user}: found {len(x_SD)} generated items, {len(rated_MD)} test ratings and "
                f"{len(liked_M)} likes; expected at least one item, and as many likes as ratings"
            )
        row_S, _ = nearest_items(F.normalize(as_float64(x_SD)), F.normalize(as_float64(rated_MD)))
        likes_M = np.asarray(liked_M, dtype=bool)
        hits = likes_M[row_S.unique().cpu().numpy()]
        precision.append(hits.mean())
        recall.append(hits.sum() / likes_M.sum() if likes_M.any() else np.nan)
    return UserPrecisionRecall(np.array(precision), np.array(recall))


def draw_rows(x_ND: Embeddings, count: int, seed: Sequence[int]) -> Embeddings:
    """Return `count` random rows in their order, or the set itself if it has no more."""
    if len(x_ND) == count:
        return x_ND
    rows = np.sort(np.random.default_rng(seed).choice(len(x_ND), count, replace=False))
    return x_ND[torch.from_numpy(rows)] if isinstance(x_ND, torch.Tensor) else x_ND[rows]


def as_float64(x_ND: Embeddings) -> torch.Tensor:
    """Return the embeddings as a tensor in float64, on their device."""
    return torch.as_tensor(x_ND).double()


def checked_pair(
    left_ND: Embeddings, right_ND: Embeddings, *, at_least: int = 1, equal_counts: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets in float64. Raises ValueError unless they are finite, alike and of equal counts."""
    left, right = as_float64(left_ND), as_float64(right_ND)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"embeddings: found shapes {tuple(left.shape)} and {tuple(right.shape)}; "
            "expected two matrices of equal embed dim"
        )
    if min(len(left), len(right)) < at_least or not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError(
            f"embeddings: found {len(left)} and {len(right)}; expected at least {at_least} in each set, "
            "all finite"
        )
    if equal_counts and len(left) != len(right):
        raise ValueError(
            f"embeddings: found {len(left)} and {len(right)}; expected equal counts, "
            "because the bias depends on them; draw them by at_equal_counts"
        )
    return left, right


def squared_distances(left_RD: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    """Return the squared Euclidean distances [R, N], exactly zero for equal rows."""
    norms_RN = left_RD.square().sum(1, keepdim=True) + right_ND.square().sum(1)
    square_RN = norms_RN - 2 * left_RD @ right_ND.T
    return torch.where(square_RN < SAME_ROW * norms_RN, 0.0, square_RN)


def distance_chunks(left_ND: torch.Tensor, right_ND: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of the left set, and their squared distances [R, N] to the right set."""
    rows_at_once = max(1, DISTANCES_AT_ONCE // len(right_ND))
    for start in range(0, len(left_ND), rows_at_once):
        rows = slice(start, start + rows_at_once)
        yield rows, squared_distances(left_ND[rows], right_ND)


def kernel_sum(left_ND: torch.Tensor, right_ND: torch.Tensor, sigma: float) -> float:
    """Return the sum of the Gaussian kernel over all pairs."""
    chunks = distance_chunks(left_ND, right_ND)
    return sum(float(torch.exp(square_RN / (-2 * sigma**2)).sum()) for _, square_RN in chunks)


def covariance_root(x_ND: torch.Tensor) -> torch.Tensor:
    """Return R of at most N rows, where Rᵀ R is the unbiased covariance."""
    return torch.linalg.qr(x_ND - x_ND.mean(0), mode="r").R / (len(x_ND) - 1) ** 0.5


def squared_radii(x_ND: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Return the squared distance of each embedding to its k-th neighbour in the set, itself excluded."""
    if not 1 <= num_neighbours < len(x_ND):
        raise ValueError(
            f"num_neighbours: found {num_neighbours}; expected at least 1, and fewer than the "
            f"{len(x_ND)} embeddings of a set"
        )
    chunks = distance_chunks(x_ND, x_ND)
    return torch.cat([square_RN.kthvalue(num_neighbours + 1).values for _, square_RN in chunks])


def count_balls(
    x_ND: torch.Tensor, centre_ND: torch.Tensor, radius_N: torch.Tensor, *, closed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of balls that hold each embedding, and a mask of the balls that hold any."""
    balls_N = torch.zeros(len(x_ND), dtype=torch.long, device=x_ND.device)
    reached = []
    for rows, square_RN in distance_chunks(centre_ND, x_ND):
        radius_R1 = radius_N[rows, None]
        inside_RN = square_RN <= radius_R1 if closed else square_RN < radius_R1
        balls_N += inside_RN.sum(0)
        reached.append(inside_RN.any(1))
    return balls_N, torch.cat(reached)


def share_of(mask_N: torch.Tensor) -> float:
    """Return the share of true values."""
    return float(mask_N.double().mean())
