"""Choose the ratings that are likes, and count the likes of each user.

`Ratings` -> `choose_threshold` -> `taste_of` the ratings that training can use
"""

from dataclasses import dataclass

import numpy as np

from rebeca_ray.data.first_look.ratings import Ratings
from rebeca_ray.errors import InputError

KNOWN_SCALES = ((0, 1), (-1, 1), (1, 5), (0, 5), (1, 10), (0, 10), (0, 100))  # the narrowest that fits counts
LIKE_FRACTION = 0.75  # of a scale, as 4 is of 1 to 5
MIN_LIKE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The scale of ratings, the least rating that is a like, and the reason for it."""

    scale: tuple[float, float]
    like: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Taste:
    """Figures of ratings that training can use, and the likes of each user [U]."""

    ratings: int
    users: int
    items: int
    likes: int
    cold_start_users: int
    median_likes: float
    median_ratings: float
    likes_per_user: np.ndarray


def choose_threshold(ratings: Ratings, given: float | None) -> Threshold | None:
    """Return the scale and the threshold of likes that fit the ratings. None: every row is a like.

    Raises InputError for a given threshold outside the scale.
    """
    if ratings.rating is None:
        if given is not None:
            raise InputError(
                f"--like-threshold {given:g}: interactions {ratings.source.uri} have no ratings, so every "
                "row is a like; leave the option out, or name the ratings by rating=NAME"
            )
        return None
    rating = ratings.rating
    low, high = float(rating.min()), float(rating.max())
    scale = scale_of(low, high)
    if given is not None:
        if not scale[0] < given <= scale[1]:
            raise InputError(
                f"--like-threshold {given:g}: ratings go from {low:g} to {high:g}; "
                f"expected a number above {scale[0]:g}, up to {scale[1]:g}"
            )
        return Threshold(scale=scale, like=given, reason="given by --like-threshold")
    on_scale = f"{scale[0]:g} to {scale[1]:g}"
    if low == high:
        return Threshold(
            scale=scale, like=plain(low), reason=f"every rating is {low:g}, so every row is a like"
        )
    cut = scale[0] + LIKE_FRACTION * (scale[1] - scale[0])
    if (rating >= cut).mean() >= MIN_LIKE_SHARE:
        least = float(rating[rating >= cut].min())
        reason = f"the least rating in the upper quarter of the scale {on_scale}, as 4 is of 1 to 5"
        return Threshold(scale=scale, like=plain(least), reason=reason)
    least = float(np.quantile(rating, LIKE_FRACTION, method="higher"))
    least = least if least > low else float(rating[rating > low].min())
    reason = (
        f"under {MIN_LIKE_SHARE:.0%} lie in the upper quarter of the scale {on_scale}, so the best are likes"
    )
    return Threshold(scale=scale, like=plain(least), reason=reason)


def plain(rating: float) -> float:
    """Return the shortest number that is the same float32: a rating of 0.7 is 0.7."""
    return float(str(np.float32(rating)))


def scale_of(low: float, high: float) -> tuple[float, float]:
    """Return the narrowest known scale that holds all ratings, or else their bounds."""
    fitting = [scale for scale in KNOWN_SCALES if scale[0] <= low and high <= scale[1] and scale[0] < high]
    if fitting:
        first, last = fitting[0]
        return float(first), float(last)
    low, high = float(np.floor(low)), float(np.ceil(high))
    return (low, high) if low < high else (low - 1, high)


def taste_of(ratings: Ratings, threshold: Threshold | None, usable: np.ndarray) -> Taste:
    """Return the figures of the ratings that are `usable` [N]: their items have an image."""
    user, item = ratings.user[usable], ratings.item[usable]
    like = (
        np.ones(len(user), bool)
        if threshold is None or ratings.rating is None
        else (ratings.rating[usable] >= np.float32(threshold.like))
    )
    rated = np.bincount(user, minlength=len(ratings.users))
    liked = np.bincount(user, weights=like, minlength=len(ratings.users)).astype(np.int64)
    has_rated = rated > 0
    return Taste(
        ratings=len(user),
        users=int(has_rated.sum()),
        items=len(np.unique(item)),
        likes=int(like.sum()),
        cold_start_users=int((has_rated & (liked == 0)).sum()),
        median_likes=float(np.median(liked[has_rated])) if has_rated.any() else 0.0,
        median_ratings=float(np.median(rated[has_rated])) if has_rated.any() else 0.0,
        likes_per_user=liked,
    )
