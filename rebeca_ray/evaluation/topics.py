"""Topic precision: the share of a user's generated pictures whose topics the user is known to like.

captions -> topic_model.py -> probabilities -> `topic_sets` -> `liked_topics` -> `topic_precision`

The paper measures content and style apart: one set of captions, and one topic model, for each.

Shapes: N captions, M generated pictures, T topics, U users.
"""

import numpy as np

MASS = 0.9
SUM_TOLERANCE = 1e-3  # of a row of probabilities
ROUNDING = 1e-6  # the sum of float32 probabilities may end so far below the mass


def topic_sets(probability_NT: np.ndarray, mass: float = MASS) -> np.ndarray:
    """Return the topics [N, T] of each caption: the most probable ones until their sum reaches `mass`.

    Of equally probable topics the first comes first. Raises ValueError for rows that are no probabilities,
    and for a mass outside (0, 1].
    """
    probability_NT = np.asarray(probability_NT, np.float64)
    check_probabilities(probability_NT)
    if not 0 < mass <= 1:
        raise ValueError(f"mass: found {mass}; expected more than 0 and at most 1")
    order_NT = np.argsort(-probability_NT, axis=1, kind="stable")
    sorted_NT = np.take_along_axis(probability_NT, order_NT, axis=1)
    before_NT = np.cumsum(sorted_NT, axis=1) - sorted_NT
    chosen_NT = (before_NT < mass - ROUNDING) & (sorted_NT > 0)
    chosen_NT[:, 0] = True  # the mass itself may be within rounding of zero
    topics_NT = np.zeros(probability_NT.shape, bool)
    np.put_along_axis(topics_NT, order_NT, chosen_NT, axis=1)
    return topics_NT


def liked_topics(topics_NT: np.ndarray, user_N: np.ndarray, num_users: int) -> np.ndarray:
    """Return the liked topics [U, T] of each user: the union over the captions of liked training pictures.

    `user_N` are the users of the captions, counted from 0. Raises ValueError for a user outside the range.
    """
    check_users(topics_NT, user_N, num_users)
    liked_UT = np.zeros((num_users, topics_NT.shape[1]), bool)
    np.logical_or.at(liked_UT, user_N, topics_NT)
    return liked_UT


def topic_precision(topics_MT: np.ndarray, user_M: np.ndarray, liked_UT: np.ndarray) -> np.ndarray:
    """Return the share [U] of each user's generated pictures whose topics are all liked by that user.

    `topics_MT` are the topics of the generated pictures' captions, and `user_M` the users they were made for.
    A user without a generated picture, or without a liked topic, has NaN. Raises ValueError for a user
    outside `liked_UT`, and for topics of another model.
    """
    num_users = len(liked_UT)
    check_users(topics_MT, user_M, num_users)
    if topics_MT.shape[1] != liked_UT.shape[1]:
        raise ValueError(
            f"topics: found {topics_MT.shape[1]} of the generated and {liked_UT.shape[1]} of the liked "
            "pictures; expected those of one model"
        )
    inside_M = ~(topics_MT & ~liked_UT[user_M]).any(axis=1)
    count_U = np.bincount(user_M, minlength=num_users)
    inside_U = np.bincount(user_M, weights=inside_M, minlength=num_users)
    precision_U = np.full(num_users, np.nan)
    return np.divide(inside_U, count_U, out=precision_U, where=(count_U > 0) & liked_UT.any(axis=1))


def check_probabilities(probability_NT: np.ndarray) -> None:
    """Raise ValueError unless every row holds probabilities with a sum of one."""
    if probability_NT.ndim != 2 or not probability_NT.shape[1]:
        raise ValueError(
            f"probability_NT: found shape {probability_NT.shape}; expected a row per caption, "
            "and at least one topic"
        )
    # NaN compares as false, so it is bad.
    good_N = (probability_NT >= 0).all(axis=1) & (abs(probability_NT.sum(axis=1) - 1) <= SUM_TOLERANCE)
    if not good_N.all():
        row = int(np.flatnonzero(~good_N)[0])
        raise ValueError(
            f"probability_NT: found row {row} with a sum of {probability_NT[row].sum():.4g} and a smallest "
            f"value of {probability_NT[row].min():.4g}; expected probabilities with a sum of 1"
        )


def check_users(topics_NT: np.ndarray, user_N: np.ndarray, num_users: int) -> None:
    """Raise ValueError unless every caption has a user, counted from 0, and a row of topics."""
    if topics_NT.ndim != 2 or topics_NT.dtype != bool or len(topics_NT) != len(user_N):
        raise ValueError(
            f"topics: found shape {topics_NT.shape} of {topics_NT.dtype} for {len(user_N)} users; "
            "expected a row of booleans for each"
        )
    if len(user_N) and not (np.min(user_N) >= 0 and np.max(user_N) < num_users):
        raise ValueError(f"users: found {np.min(user_N)} to {np.max(user_N)}; expected 0 to {num_users - 1}")
