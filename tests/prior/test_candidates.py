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
            "nearest_N": random.integers(0, 9, TILE),
            "similarity_N": random.random(TILE, np.float32),
            **columns,
        }
    )


def test_a_choice_for_many_users_is_the_choice_for_each() -> None:
    candidates = candidates_of(np.random.default_rng(0))
    chosen = choose_candidates(candidates, COUNT_G, SELECTION)
    assert chosen.user_K.tolist() == [0, 0, 0, 1, 2, 2]
    assert chosen.rank_K.tolist() == [0, 1, 2, 0, 0, 1]
    assert candidates.like_N is not None
    assert candidates.similarity_N is not None
    assert candidates.factor_NF is not None
    rows, sampled = [], []
    for start, count in zip((0, 12, 16), COUNT_G, strict=True):
        user = slice(start, start + 4 * count)
        numbers = choose(
            candidates.unit_ND[user],
            candidates.like_N[user],
            candidates.similarity_N[user] > 0.5,
            count,
            diversity=0.4,
        )
        rows += (start + numbers).tolist()
        sampled += range(start, start + count)
    assert (chosen.candidate_K + np.array([0, 12, 16])[chosen.user_K]).tolist() == rows
    for column, expected in (
        (chosen.embeds_KD, candidates.embeds_ND[rows]),
        (chosen.like_K, candidates.like_N[rows]),
        (chosen.similarity_K, candidates.similarity_N[rows]),
        (chosen.sampled_factor_KF, candidates.factor_NF[sampled]),
    ):
        np.testing.assert_array_equal(column, expected)


def test_without_selector_or_real_items_their_columns_are_absent() -> None:
    nothing = dict.fromkeys(("like_N", "factor_NF", "nearest_N", "similarity_N"))
    chosen = choose_candidates(candidates_of(np.random.default_rng(0), **nothing), COUNT_G, SELECTION)
    assert chosen.like_K is None
    assert chosen.sampled_factor_KF is None
    assert chosen.nearest_K is None
    assert chosen.similarity_K is None
    assert len(chosen.candidate_K) == 6


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
    real_unit_ID = torch.nn.functional.normalize(x_ND[:2])
    candidates = judge_candidates(prior, factor_GF, x_ND, user_N, real_unit_ID)
    assert prior.selector is not None
    expected = prior.selector.like_probability(x_ND, factor_GF[user_N])
    np.testing.assert_array_equal(candidates.like_N, expected.numpy())
    assert candidates.nearest_N is not None
    assert candidates.nearest_N[:2].tolist() == [0, 1]
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
