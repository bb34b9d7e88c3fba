"""The permutation test: do users like their items more than others' items? (paper, algorithm 1)

Shapes: U users, B permutations.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rebeca_ray.catalog.manifest import PermutationFigures

PERMUTATIONS_PER_CHUNK = 256
LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """Mean like probability of users for their items, and under random pairings."""

    matched_mean: float
    null_mean: float
    null_std: float
    p_value: float  # (1 + #{null >= matched}) / (1 + permutations)
    num_users: int
    null_B: np.ndarray  # the statistic of each permutation

    @property
    def num_permutations(self) -> int:
        return len(self.null_B)

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

    @property
    def detectable_effect(self) -> float:
        """Return the effect that the test finds with a power of 80% at a level of 5%, one-sided.

        The statistic is a mean over users, so it is close to normal, with the null's deviation.
        """
        return (NormalDist().inv_cdf(1 - LEVEL) + NormalDist().inv_cdf(POWER)) * self.null_std


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
        null_B=null,
    )


def permutation_test_by_image(
    like_UN: np.ndarray, owner_N: np.ndarray, num_permutations: int = 1000, seed: int = 0
) -> PermutationTest:
    """Run the authors' variant of the test: it deals images to users one by one, not a user's set as a whole.

    `like_UN[u, n]` is the like probability of user u for image n, `owner_N` the user that image n was made
    for. The statistic is the mean over users of their images' mean. The p-value is #{null >= matched} /
    permutations, as they ran it.

    Use it to compare with published figures alone. Images of one user resemble each other, which a deal one
    by one ignores, so its null is too narrow: z comes out several times as high, and p is too small.
    Raises ValueError unless each user has an image.
    """
    users, images = like_UN.shape
    count_U = np.bincount(owner_N, minlength=users)
    if len(owner_N) != images or len(count_U) != users or not count_U.all():
        raise ValueError(
            f"owner_N: found {len(owner_N)} images of {np.count_nonzero(count_U)} users; "
            f"expected {images} images, and some for each of {users} users"
        )
    random = np.random.default_rng(seed)
    weight_N = 1 / (users * count_U[owner_N])
    row_N = np.arange(images)

    def statistic(deal_N: np.ndarray) -> float:
        """Return the mean over users, if image `deal_N[n]` goes to the owner of image n."""
        return float((like_UN[owner_N, deal_N] * weight_N).sum(dtype=np.float64))

    matched = statistic(row_N)
    null = np.array([statistic(random.permutation(row_N)) for _ in range(num_permutations)])
    return PermutationTest(
        matched_mean=matched,
        null_mean=float(null.mean()),
        null_std=float(null.std()),
        p_value=float((null >= matched - 1e-12).mean()),
        num_users=users,
        null_B=null,
    )


def personality_line(figures: PermutationFigures) -> str:
    """Return one line on the figures of a permutation test, as a manifest holds them."""
    return (
        f"before selection, candidates please their own users with {figures.matched:.3f}, "
        f"others with {figures.shuffled:.3f} "
        f"(permutation test by the selector: z = {figures.z:.0f}, p = {figures.p_value:.4f})"
    )
