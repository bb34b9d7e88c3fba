"""Measure one set of items in one feature space: liking, distances, diversity, novelty.

Shapes: U users, N items, S items of one user, I real items, D dimensions of the feature space.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.data.encoders import CMMD_CLIP, INCEPTION
from rebeca_ray.evaluation.distances import (
    at_equal_counts,
    cmmd,
    density_coverage,
    frechet,
    kid,
    mmd,
    nearest_neighbour_precision_recall,
    precision_recall,
)
from rebeca_ray.evaluation.diversity import novelty, set_cosines, vendi_scores, worst_decile
from rebeca_ray.evaluation.history_verifier import HistoryVerifier
from rebeca_ray.evaluation.paired import bootstrap_interval
from rebeca_ray.evaluation.permutation import PermutationTest, permutation_test, permutation_test_by_image
from rebeca_ray.evaluation.verifier import Verifier
from rebeca_ray.studies.metrics import Distances, Mean, Permutation, SpaceFigures
from rebeca_ray.studies.ratings import StudyRatings
from rebeca_ray.studies.sets import ItemSet

MMD_SIGMA = 0.5  # of unit vectors
KID_SUBSET = 1000
PERMUTATION_TESTS = (("by user", "mean"), ("by user", "median"), ("by image", "mean"))  # method, statistic
PLANNED = "planned"  # the space of the prior's embeddings
LESS_IS_BETTER = frozenset({"cosine_within", "cosine_across", "lpips"})


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The inputs of every measure: ratings, verifier, and the rows of the users in the interactions [U]."""

    ratings: StudyRatings
    verifier: Verifier | HistoryVerifier
    user_U: np.ndarray
    max_item_similarity: float
    num_permutations: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of a set in a space, and the figures of each user [U] by name."""

    figures: SpaceFigures
    by_user: dict[str, np.ndarray]
    tests: list[PermutationTest]  # by user, with means and medians; by image


def measure(items: ItemSet, x_ND: np.ndarray, judge: Judge, space: str = PLANNED) -> Measured:
    """Return all figures of `items` with the features `x_ND`, which lie in the space of the real items."""
    x_ID = judge.ratings.items.image_embeds
    like_UN = judge.verifier.like_matrix(x_ND, judge.user_U)
    parts = items.by_user(x_ND)
    cosines, vendi, novel = set_cosines(parts), vendi_scores(parts), novelty(x_ND, x_ID)
    tested = [judge.ratings.test_ratings(user) for user in judge.user_U.tolist()]
    neighbours = nearest_neighbour_precision_recall(
        parts, [x_ID[rows] for rows, _ in tested], [like for _, like in tested]
    )
    by_user = {
        "like_probability": items.mean_by_user(like_UN[items.user_N, np.arange(len(x_ND))]),
        "vendi": vendi.user_U,
        "cosine_within": cosines.within_U,
        "cosine_across": cosines.across_U,
        "novelty": items.mean_by_user(novel.novelty_N),
        "likeness": likeness(parts, [x_ID[rows[like == 1]] for rows, like in tested]),
        "neighbour_precision": neighbours.precision_U,
        "neighbour_recall": neighbours.recall_U,
    }
    tests = permutations(items, like_UN, judge)
    records = [
        as_record(test, method, statistic, items)
        for test, (method, statistic) in zip(tests, PERMUTATION_TESTS, strict=True)
    ]
    means = {
        name: mean_of(figure_U, judge.seed, greater_is_better=name not in LESS_IS_BETTER)
        for name, figure_U in by_user.items()
    }
    figures = SpaceFigures(
        **means,
        permutation=records,
        distances=distances(x_ND, liked_test_items(judge), judge.seed, space),
        vendi_pooled=vendi.pooled,
        copy_share=novel.copy_share(judge.max_item_similarity),
    )
    return Measured(figures=figures, by_user=by_user, tests=tests)


def likeness(generated: list[np.ndarray], liked: list[np.ndarray]) -> np.ndarray:
    """Return the mean cosine [U] between a user's items and those that the user likes in the test split.

    This is the measure of PIPBench: from a history to an image that the user likes later.
    """
    return np.array(
        [
            float((F.normalize(torch.as_tensor(x_SD)) @ F.normalize(torch.as_tensor(liked_SD)).T).mean())
            for x_SD, liked_SD in zip(generated, liked, strict=True)
        ]
    )


def liked_test_items(judge: Judge) -> np.ndarray:
    """Return the embeddings of the users' liked test items, all users together."""
    rows = [judge.ratings.likes_of_test(user) for user in judge.user_U.tolist()]
    return judge.ratings.items.image_embeds[np.concatenate(rows)]


def distances(x_ND: np.ndarray, liked_ND: np.ndarray, seed: int, space: str) -> Distances:
    """Return the distances of unit vectors, at the count of the smaller set.

    FID and CMMD are those of their own encoders alone. FID reads the features as they are.
    """
    raw = at_equal_counts(x_ND, liked_ND, seed=seed)
    generated, liked = (F.normalize(torch.as_tensor(x).double()) for x in raw)
    neighbourhood, balls = precision_recall(generated, liked), density_coverage(generated, liked)
    return Distances(
        count=len(generated),
        mmd=1000 * mmd(generated, liked, MMD_SIGMA),
        frechet=frechet(generated, liked),
        kid=kid(generated, liked, seed, subset_size=min(KID_SUBSET, len(generated))),
        precision=neighbourhood.precision,
        recall=neighbourhood.recall,
        density=balls.density,
        coverage=balls.coverage,
        fid=frechet(*raw) if space == INCEPTION else None,
        cmmd=cmmd(*raw) if space == CMMD_CLIP else None,
    )


def permutations(items: ItemSet, like_UN: np.ndarray, judge: Judge) -> list[PermutationTest]:
    """Return the tests of PERMUTATION_TESTS, in their order."""
    parts = items.by_user(np.arange(len(items.user_N)))
    mean_UU, median_UU = (
        np.stack([reduce(like_UN[:, rows], axis=1) for rows in parts], axis=1)
        for reduce in (np.mean, np.median)
    )
    return [
        permutation_test(mean_UU, judge.num_permutations, judge.seed),
        permutation_test(median_UU, judge.num_permutations, judge.seed),
        permutation_test_by_image(like_UN, items.user_N, seed=judge.seed),
    ]


def as_record(test: PermutationTest, method: str, statistic: str, items: ItemSet) -> Permutation:
    """Return a test in the form of `metrics.json`."""
    return Permutation(
        method=method,
        statistic=statistic,
        matched=test.matched_mean,
        shuffled=test.null_mean,
        deviation=test.null_std,
        z=test.z,
        z_at_94_users=test.z_at(94),
        z_at_210_users=test.z_at(210),
        detectable_effect=test.detectable_effect,
        p_value=test.p_value,
        users=test.num_users,
        images_per_user=len(items.user_N) / test.num_users,
    )


def mean_of(figure_U: np.ndarray, seed: int, *, greater_is_better: bool = True) -> Mean:
    """Return the mean over users with its interval. Users without the figure, as of recall, are left out."""
    figure_U = figure_U[np.isfinite(figure_U)]
    interval = bootstrap_interval(figure_U, seed)
    return Mean(
        mean=float(figure_U.mean()),
        low=interval.low,
        high=interval.high,
        worst_decile=worst_decile(figure_U, greater_is_better=greater_is_better),
    )
