"""The permutation test: do users like their items more than others' items? (paper, algorithm 1)

Shapes: U users, B permutations.
"""

from dataclasses import dataclass

import numpy as np

from rebeca_ray.catalog.manifest import PermutationFigures

PERMUTATIONS_PER_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """Mean like probability of users for their items, and under random pairings."""

    matched_mean: float
    null_mean: float
    null_std: float
    p_value: float  # (1 + #{null >= matched}) / (1 + permutations)
    num_users: int
    num_permutations: int

    @property
    def effect(self) -> float:
        """Return the difference of mean probabilities. It does not depend on the number of users."""
        return self.matched_mean - self.null_mean

    @property
    def z(self) -> float:
        """Return the effect in null standard deviations. It grows with the root of the number of users."""
        return self.effect / self.null_std if self.null_std else 0.0

    def figures(self) -> dict[str, float]:
        """Return the figures to report, with z also at the paper's 210 users.

        Of all figures, z alone depends on the number of users.
        """
        return {
            "matched": round(self.matched_mean, 4),
            "shuffled": round(self.null_mean, 4),
            "effect": round(self.effect, 4),
            "p_value": self.p_value,
            "users": self.num_users,
            "z": round(self.z, 2),
            "z_at_210_users": round(self.z_at(210), 2),
        }

    def z_at(self, num_users: int) -> float:
        """Return z scaled to `num_users`. The null's deviation falls as 1/sqrt(U - 1)."""
        return self.z * ((num_users - 1) / (self.num_users - 1)) ** 0.5


def permutation_test(like_UU: np.ndarray, num_permutations: int = 10_000, seed: int = 0) -> PermutationTest:
    """Test `like_UU[u, v]`, the mean like probability of user u for the items made for user v.

    A random pairing permutes rows against columns, so it costs U look-ups. Raises ValueError for fewer than
    two users, and for a matrix that is not square and finite.
    """
    users = len(like_UU)
    if like_UU.shape != (users, users) or users < 2 or not np.isfinite(like_UU).all():
        raise ValueError(
            f"like_UU: found shape {like_UU.shape}; expected a square, finite matrix of at least two users"
        )
    random = np.random.default_rng(seed)
    matched = float(np.diagonal(like_UU).mean(dtype=np.float64))
    flat = np.ascontiguousarray(like_UU).ravel()
    start_U = np.arange(users) * users
    null = np.empty(num_permutations)
    for first in range(0, num_permutations, PERMUTATIONS_PER_CHUNK):
        count = min(PERMUTATIONS_PER_CHUNK, num_permutations - first)
        pairing_BU = random.permuted(np.broadcast_to(np.arange(users), (count, users)), axis=1)
        null[first : first + count] = flat[start_U + pairing_BU].mean(1, dtype=np.float64)
    return PermutationTest(
        matched_mean=matched,
        null_mean=float(null.mean()),
        null_std=float(null.std()),
        p_value=float((1 + (null >= matched - 1e-12).sum()) / (1 + num_permutations)),
        num_users=users,
        num_permutations=num_permutations,
    )


def personality_line(figures: PermutationFigures) -> str:
    """Return one line on the figures of a permutation test, as a manifest holds them."""
    return (
        f"before selection, candidates please their own users with {figures.matched:.3f}, "
        f"others with {figures.shuffled:.3f} "
        f"(permutation test by the selector: z = {figures.z:.0f}, p = {figures.p_value:.4f})"
    )
