"""Candidates of several users: chosen and rescored as columns, exactly as user by user."""

import numpy as np
import pytest
import torch

from rebeca_ray import identity
from rebeca_ray.config.sections import NetworkSettings, SamplerSettings, SelectionSettings
from rebeca_ray.prior.candidates import (
    Candidates,
    choose_candidates,
    judge_candidates,
    nearest_in_tiles,
    rescore_items,
    sample_candidates,
)
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.selection import choose
from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.users import UserVectors
from tests.conftest import TINY_NETWORK, D, untrained_prior

COUNT_G = np.array([3, 1, 2])
SELECTION = SelectionSettings(candidates_per_item=4, diversity=0.4, max_item_similarity=0.5)
TILE = 32


def candidates_of(random: np.random.Generator, **columns: np.ndarray | None) -> Candidates:
    unit_ND = random.standard_normal((TILE, 8), np.float32)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    return Candidates(
        **{
            "embeds_ND": 3 * unit_ND,
            "unit_ND": unit_ND,
            "like_N": random.random(TILE, np.float32),
            "factor_NF": random.random((TILE, 5), np.float32),
            **columns,
        }
    )


@pytest.mark.parametrize("share_of_copies", [0.0, 0.4, 0.9, 1.0])
def test_a_choice_for_many_users_is_the_choice_for_each(share_of_copies: float) -> None:
    """Also where most chosen candidates turn out to be copies, or all are."""
    random = np.random.default_rng(0)
    candidates = candidates_of(random)
    is_near = random.random(TILE) < share_of_copies
    nowhere = -candidates.unit_ND.mean(0, keepdims=True)  # an item far from all candidates
    real_unit_ID = torch.from_numpy(np.concatenate([candidates.unit_ND[is_near], nowhere]))
    similarity_NI = candidates.unit_ND @ real_unit_ID.numpy().T
    chosen = choose_candidates(candidates, COUNT_G, SELECTION, real_unit_ID)
    assert chosen.user_K.tolist() == [0, 0, 0, 1, 2, 2]
    assert chosen.rank_K.tolist() == [0, 1, 2, 0, 0, 1]
    assert candidates.like_N is not None
    assert candidates.factor_NF is not None
    rows, sampled = [], []
    for start, count in zip((0, 12, 16), COUNT_G, strict=True):
        user = slice(start, start + 4 * count)
        numbers = choose(
            candidates.unit_ND[user],
            candidates.like_N[user],
            similarity_NI[user].max(1) > SELECTION.max_item_similarity,
            count,
            diversity=0.4,
        )
        rows += (start + numbers).tolist()
        sampled += range(start, start + count)
    assert (chosen.candidate_K + np.array([0, 12, 16])[chosen.user_K]).tolist() == rows
    for column, expected in (
        (chosen.embeds_KD, candidates.embeds_ND[rows]),
        (chosen.like_K, candidates.like_N[rows]),
        (chosen.nearest_K, similarity_NI[rows].argmax(1)),
        (chosen.sampled_factor_KF, candidates.factor_NF[sampled]),
    ):
        np.testing.assert_array_equal(column, expected)
    assert chosen.similarity_K is not None
    np.testing.assert_allclose(chosen.similarity_K, similarity_NI[rows].max(1), rtol=0, atol=1e-6)


def test_without_selector_or_real_items_their_columns_are_absent() -> None:
    candidates = candidates_of(np.random.default_rng(0), like_N=None, factor_NF=None)
    chosen = choose_candidates(candidates, COUNT_G, SELECTION, None)
    assert chosen.like_K is None
    assert chosen.sampled_factor_KF is None
    assert chosen.nearest_K is None
    assert chosen.similarity_K is None
    assert len(chosen.candidate_K) == 6


@torch.inference_mode()
def test_the_nearest_item_of_a_candidate_depends_on_no_other_candidate() -> None:
    random = np.random.default_rng(0)
    unit_ND = random.standard_normal((70, 512), np.float32)
    items_ID = torch.from_numpy(random.standard_normal((1000, 512), np.float32))
    nearest_N, similarity_N = nearest_in_tiles(unit_ND, items_ID)
    for rows in ([0], [69, 3], [*range(30, 70)]):
        nearest, similarity = nearest_in_tiles(unit_ND[rows], items_ID)
        np.testing.assert_array_equal(nearest, nearest_N[rows])
        np.testing.assert_array_equal(similarity, similarity_N[rows])


@pytest.fixture
def prior() -> TrainedPrior:
    settings: NetworkSettings = TINY_NETWORK
    torch.manual_seed(0)
    prior = untrained_prior(settings)
    return TrainedPrior(**{**vars(prior), "selector": Selector(D, num_factors=4).eval()})


@torch.inference_mode()
def test_candidates_come_in_whole_tiles_and_depend_on_their_key_alone(prior: TrainedPrior) -> None:
    diffusion = Diffusion.build(prior.diffusion)
    sampler = SamplerSettings(num_inference_steps=3, batch_size=TILE).resolve(prior.sampling, 100)
    users = UserVectors(token_GUH=torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(1)))
    keys = ["a", "b", "c"]
    x_ND, user_N = sample_candidates(prior, diffusion, sampler, users, keys, 4 * COUNT_G)
    assert x_ND.shape == (TILE, D)
    assert user_N.tolist() == [0] * 12 + [1] * 4 + [2] * 16
    alone_ND, _ = sample_candidates(
        prior, diffusion, sampler, users.take(torch.tensor([2, 0])), ["c"], np.array([8])
    )
    assert torch.equal(alone_ND[:8], x_ND[16:24])

    factor_GF = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    candidates = judge_candidates(prior, factor_GF, x_ND, user_N)
    assert prior.selector is not None
    expected = prior.selector.like_probability(x_ND, factor_GF[user_N])
    np.testing.assert_array_equal(candidates.like_N, expected.numpy())
    halves = prior.scaler.unscale(x_ND).numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(candidates.embeds_ND, halves)


@torch.inference_mode()
def test_earlier_items_are_ranked_by_the_selector_within_their_user(prior: TrainedPrior) -> None:
    random = np.random.default_rng(0)
    embeds_KD, user_K = random.standard_normal((7, D)).astype(np.float32), np.array([1, 0, 1, 1, 2, 0, 1])
    factor_GF = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    rescored = rescore_items(prior, factor_GF, embeds_KD, user_K, TILE)
    assert rescored.user_K.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert rescored.rank_K.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert sorted(rescored.row_K.tolist()) == list(range(7))
    assert (user_K[rescored.row_K] == rescored.user_K).all()
    for user in range(3):
        assert (np.diff(rescored.like_K[rescored.user_K == user]) <= 0).all()


def test_seeds_of_all_candidates_at_once_are_those_of_each() -> None:
    assert identity.candidate_seeds("key", 12) == [identity.candidate_seed("key", row) for row in range(12)]
