"""Keep the verifier's ratings and seed apart from those of the selector: the guide must not grade itself.

The selector is fitted to the ratings of the split TRAINING. The verifier takes the others, VALIDATION and
TEST. They are the shares `interactions.hold_out` and `interactions.test`, chosen by a hash of user and item.
Raise the latter to give the verifier more. Generation reads them as history, unless `hide_hold_out` is set.

Shapes: N ratings.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from rebeca_ray.errors import InputError
from rebeca_ray.identity import hash128
from rebeca_ray.schemas import TRAINING

SELECTOR_SEEDS = 4  # calibration fits selectors with the seeds from `optimization.seed` on, at most so many


class VerifierParts(NamedTuple):
    """Masks of the ratings that a verifier may be fitted to, and of those that test it."""

    fit_N: np.ndarray
    test_N: np.ndarray


def ratings_for_verifier(
    split_N: np.ndarray, user_id_N: np.ndarray, item_id_N: np.ndarray, test_share: float = 0.2
) -> VerifierParts:
    """Return the ratings that the selector never saw, in two parts.

    A hash of user and item puts a share of about `test_share` into the second part, so the order of the
    ratings does not matter. The hash is another than the one that made the splits. Raises InputError if all
    ratings are for training.
    """
    held_N = split_N != TRAINING
    if not held_N.any():
        raise InputError(
            f"verifier: all {len(split_N)} ratings are for training; "
            "raise interactions.test to keep some of them from the selector"
        )
    test_N = np.zeros(len(split_N), bool)
    for row in np.flatnonzero(held_N):
        digest = hash128("verifier", str(user_id_N[row]), str(item_id_N[row]))
        test_N[row] = int(digest[:16], 16) < test_share * 2**64
    return VerifierParts(held_N & ~test_N, test_N)


def check_independence(
    verifier_pairs: Collection[tuple[str, str]],
    selector_pairs: Collection[tuple[str, str]],
    verifier_seed: int,
    training_seed: int,
) -> None:
    """Raise InputError if a verifier shares a rating, or a seed, with the selectors of a training.

    A rating is a pair of user and item. `training_seed` is `optimization.seed`.
    """
    if shared := set(verifier_pairs) & set(selector_pairs):
        item = min(shared)[1]  # the error goes to logs, and names no user
        raise InputError(
            f"verifier: {len(shared)} of its ratings were seen by the selector, such as one of item {item}; "
            "expected none; take the ratings of ratings_for_verifier"
        )
    if training_seed <= verifier_seed < training_seed + SELECTOR_SEEDS:
        raise InputError(
            f"verifier.seed: the selector uses {verifier_seed} too; expected none of {training_seed} to "
            f"{training_seed + SELECTOR_SEEDS - 1}; take another"
        )
