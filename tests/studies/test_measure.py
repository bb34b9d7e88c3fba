"""Measures of a set of items: personal sets win, popular ones lose, and copies are counted."""

from dataclasses import replace

import numpy as np
import pytest

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.data.encoders import CMMD_CLIP, INCEPTION
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.evaluation.distances import at_equal_counts, cmmd, frechet
from rebeca_ray.studies.measure import Judge, distances, measure
from rebeca_ray.studies.ratings import read_ratings
from rebeca_ray.studies.sets import ItemSet
from rebeca_ray.studies.verifying import fit_study_verifier
from tests.conftest import D
from tests.studies.conftest import ITEMS_PER_TASTE, NUM_USERS, STUDY_USERS, TASTES

PER_USER = 4


@pytest.fixture
def judge(study: EvaluateConfig) -> Judge:
    items = read_image_embeds(study.items)
    ratings = read_ratings(study.interactions, items)
    verifier, figures = fit_study_verifier(ratings, study)
    assert figures.seen.auc.value > 0.95
    assert figures.unseen is not None
    assert figures.unseen.auc.value > 0.95
    return Judge(
        ratings=ratings,
        verifier=verifier,
        user_U=np.arange(NUM_USERS),
        max_item_similarity=0.98,
        num_permutations=500,
        seed=0,
    )


def set_of(tastes: np.ndarray) -> tuple[ItemSet, np.ndarray]:
    """Return a set of four items for each user near the centre of a taste, and its embeddings."""
    random = np.random.default_rng(2)
    centre = np.random.default_rng(0).standard_normal((TASTES, D))
    embeds = np.repeat(centre[tastes], PER_USER, axis=0) + 0.4 * random.standard_normal(
        (NUM_USERS * PER_USER, 16)
    )
    items = ItemSet(
        name="set",
        description="made by a test",
        user_id=STUDY_USERS,
        user_N=np.repeat(np.arange(NUM_USERS), PER_USER),
        item_id=[f"g{row}" for row in range(len(embeds))],
        embeds_ND=embeds.astype(np.float32),
        encoded=[b""] * len(embeds),
    )
    return items, items.embeds_ND


def test_items_to_a_users_taste_beat_those_of_another_taste_and_those_for_everybody(judge: Judge) -> None:
    matched, missed, same = (
        measure(*set_of(tastes), judge)
        for tastes in (
            np.arange(NUM_USERS) % TASTES,
            (np.arange(NUM_USERS) + 1) % TASTES,
            np.zeros(NUM_USERS, int),
        )
    )
    like = [part.figures.like_probability.mean for part in (matched, missed, same)]
    assert like[0] > 0.8
    assert like[1] < 0.2
    assert 0.2 < like[2] < 0.6
    by_user, by_median, by_image = matched.figures.permutation
    assert (by_user.method, by_median.statistic, by_image.method) == ("by user", "median", "by image")
    assert by_user.p_value == pytest.approx(1 / 501)
    assert by_user.matched == pytest.approx(like[0])
    assert by_image.z > by_user.z > 5
    assert same.figures.permutation[0].p_value > 0.05
    # Everybody's good items: as much alike between users as within one.
    assert matched.figures.cosine_within.mean > matched.figures.cosine_across.mean + 0.3
    assert same.figures.cosine_across.mean > matched.figures.cosine_across.mean + 0.3
    assert matched.figures.distances.mmd < same.figures.distances.mmd
    assert matched.figures.distances.coverage > same.figures.distances.coverage
    assert matched.figures.likeness.mean > missed.figures.likeness.mean + 0.3
    assert by_user.z_at_210_users > by_user.z_at_94_users > by_user.z  # here are 24 users
    assert matched.figures.neighbour_precision.mean > missed.figures.neighbour_precision.mean + 0.5


def test_the_figures_of_users_have_the_means_that_are_reported(judge: Judge) -> None:
    measured = measure(*set_of(np.arange(NUM_USERS) % TASTES), judge)
    for name, figure_U in measured.by_user.items():
        assert len(figure_U) == NUM_USERS
        mean = getattr(measured.figures, name)
        assert mean.mean == pytest.approx(np.nanmean(figure_U))
        assert mean.low <= mean.mean <= mean.high


def test_copies_of_real_items_are_counted(judge: Judge) -> None:
    items, x_ND = set_of(np.arange(NUM_USERS) % TASTES)
    assert measure(items, x_ND, judge).figures.copy_share == 0
    copies = x_ND.copy()
    copies[: NUM_USERS * PER_USER // 2] = judge.ratings.items.image_embeds[: NUM_USERS * PER_USER // 2]
    measured = measure(replace(items, embeds_ND=copies), copies, judge)
    assert measured.figures.copy_share == 0.5
    assert measured.by_user["novelty"][0] == pytest.approx(0, abs=1e-6)


def test_the_users_of_the_world_rate_what_they_like(judge: Judge) -> None:
    """The fixture's own truth, by which the other tests are read."""
    for user in range(NUM_USERS):
        liked = judge.ratings.likes_of_training(user)
        assert set(liked // ITEMS_PER_TASTE) == {user % TASTES}
        assert not set(liked) & set(judge.ratings.likes_of_test(user))


def test_fid_and_cmmd_are_those_of_their_own_encoders_alone() -> None:
    """FID reads features as they are, whatever their length. CMMD reads unit vectors."""
    random = np.random.default_rng(3)
    generated = 5 + 3 * random.standard_normal((60, 8))
    liked = 3 * random.standard_normal((40, 8))
    by_space = {name: distances(generated, liked, 0, name) for name in (INCEPTION, CMMD_CLIP, "clip")}
    counted = at_equal_counts(generated, liked, seed=0)
    assert by_space[INCEPTION].fid == pytest.approx(frechet(*counted))
    assert by_space[INCEPTION].fid > 10 * by_space[INCEPTION].frechet
    assert by_space[CMMD_CLIP].cmmd == pytest.approx(cmmd(*counted))
    for name, distance in by_space.items():
        assert (distance.fid is None) == (name != INCEPTION)
        assert (distance.cmmd is None) == (name != CMMD_CLIP)
        assert distance.count == 40
