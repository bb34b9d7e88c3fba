"""Variants of given items: the ends of both methods, the noised start, and bits without company."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import DiffusionSettings, SamplerSettings, SelectionSettings
from rebeca_ray.noise import item_noise
from rebeca_ray.prior.candidates import Candidates, choose_candidates, sample_candidates
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import dpm_solver_pp_2m, guided_denoiser, sample_liked
from rebeca_ray.prior.schedules import inference_timesteps
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.prior.variants import Variants, sample_variants, slerp, timesteps_below
from tests.conftest import TINY_NETWORK, D, untrained_prior

TILE, STEPS, T = 16, 4, 100
METHODS = ("noise", "slerp")


def prior_of(prediction_type: str = "sample") -> TrainedPrior:
    settings = DiffusionSettings.model_validate(
        {"num_train_timesteps": T, "prediction_type": prediction_type}
    )
    return replace(untrained_prior(TINY_NETWORK), diffusion=settings)


def sampler_of(prior: TrainedPrior, method: str, name: str = "dpm_solver") -> SamplerSettings:
    settings = {"variant": method, "name": name, "num_inference_steps": STEPS, "batch_size": TILE}
    return SamplerSettings.model_validate(settings).resolve(prior.sampling, T)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


USERS = UserVectors(token_GUH=normal(64, 1, 16, seed=1))
ITEMS = F.normalize(normal(3, D, seed=2)) * math.sqrt(D)


def variants_of(*strengths: float) -> Variants:
    return Variants(
        row_G=np.arange(len(strengths)),
        item_GD=ITEMS[: len(strengths)],
        strength_G=np.array(strengths, np.float32),
    )


def sampled(prior: TrainedPrior, method: str, variants: Variants, name: str = "dpm_solver") -> torch.Tensor:
    """Return one variant of each user."""
    sampler, rows = sampler_of(prior, method, name), np.arange(len(variants.row_G))
    diffusion = Diffusion.build(prior.diffusion)
    return sample_variants(prior, diffusion, USERS, rows, range(7, 7 + len(rows)), sampler, variants)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "unipc"])
def test_a_full_strength_is_the_plain_sample_of_the_same_seed(method: str, name: str) -> None:
    prior = prior_of()
    sampler, diffusion = sampler_of(prior, method, name), Diffusion.build(prior.diffusion)
    plain = sample_liked(prior, diffusion, USERS, np.arange(3), range(7, 10), sampler)
    assert torch.equal(sampled(prior, method, variants_of(1, 1, 1), name), plain)


def test_towards_no_strength_the_item_remains() -> None:
    assert torch.equal(sampled(prior_of(), "noise", variants_of(0.004, 0.004, 0.004)), ITEMS)
    assert torch.equal(sampled(prior_of(), "slerp", variants_of(0, 0, 0)), ITEMS)
    assert torch.allclose(sampled(prior_of(), "slerp", variants_of(1e-5, 1e-5, 1e-5)), ITEMS, atol=1e-3)
    # A network that predicts the noise changes an item by no more than the noise.
    barely = sampled(prior_of("epsilon"), "noise", variants_of(0.01, 0.1, 0.5))
    change = (barely - ITEMS).norm(dim=1) / ITEMS.norm(dim=1)
    sigma = Diffusion.build(prior_of("epsilon").diffusion).sigma[[0, 9, 49]]
    assert change[0] < 5 * sigma[0]
    assert change[0] < change[1] < change[2]


@torch.inference_mode()
def test_partial_noise_denoises_the_noised_item_from_its_timestep() -> None:
    prior = prior_of()
    diffusion, sampler = Diffusion.build(prior.diffusion), sampler_of(prior, "noise")
    (variant,) = sampled(prior, "noise", variants_of(0.6))
    # 60 of 100 timesteps, in three of the four steps.
    timesteps = timesteps_below(60, STEPS, T)
    assert timesteps == [59, 39, 19]
    noise = next(item_noise([7] * TILE, D))
    noised = diffusion.alpha[59] * ITEMS[:1] + diffusion.sigma[59] * noise
    denoise = guided_denoiser(prior, diffusion, USERS, torch.zeros(TILE, dtype=torch.long), sampler)
    expected = dpm_solver_pp_2m(denoise, iter([noised]), timesteps, diffusion, prior.scaler.clip or math.inf)
    assert torch.equal(variant, expected[0])


def test_the_timesteps_of_a_part_are_as_close_as_those_of_the_whole() -> None:
    whole = inference_timesteps(1000, 8)
    assert timesteps_below(1000, 8, 1000) == whole
    for noised in range(1, 1001):
        timesteps = timesteps_below(noised, 8, 1000)
        assert timesteps[0] == noised - 1
        assert timesteps[-1] <= whole[-1]
        assert timesteps == sorted(set(timesteps), reverse=True)


def test_slerp_turns_evenly_and_its_ends_are_exact() -> None:
    start, goal = normal(5, D, seed=3), 2 * normal(5, D, seed=4)
    assert torch.equal(slerp(start, goal, torch.zeros(5)), start)
    assert torch.equal(slerp(start, goal, torch.ones(5)), goal)
    assert torch.allclose(slerp(start, 3 * start, torch.full((5,), 0.25)), 1.5 * start)  # on one line
    strength = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    middle = slerp(start, goal, strength)
    turned, angle = (F.cosine_similarity(start.double(), other.double()).arccos() for other in (middle, goal))
    assert torch.allclose(turned / angle, strength.double(), atol=1e-5)
    length = (1 - strength) * start.norm(dim=1) + strength * goal.norm(dim=1)
    assert torch.allclose(middle.norm(dim=1), length)


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_company_changes_no_bit_of_a_variant_or_of_a_plain_sample(method: str) -> None:
    prior, counts = prior_of(), np.array([5, 20, 9])
    diffusion, sampler, keys = Diffusion.build(prior.diffusion), sampler_of(prior, method), ["a", "b", "c"]
    variants = variants_of(0.3, 1, 0.7)
    variants.row_G[1] = -1  # the second user has no item
    together, user_N = sample_candidates(prior, diffusion, sampler, USERS, keys, counts, variants)
    for user in range(3):
        alone = Variants(
            row_G=variants.row_G[[user]],
            item_GD=variants.item_GD[[user]],
            strength_G=variants.strength_G[[user]],
        )
        x_ND, _ = sample_candidates(
            prior,
            diffusion,
            sampler,
            USERS.take(torch.tensor([user])),
            keys[user : user + 1],
            counts[[user]],
            None if user == 1 else alone,
        )
        assert torch.equal(x_ND[: counts[user]], together[: counts.sum()][user_N[: counts.sum()] == user])


def test_a_variant_may_be_near_its_item_and_near_no_other() -> None:
    """Candidates 0, 2, 4, … are near item 4, the others near item 5."""
    random = np.random.default_rng(0)
    real_unit_ID = F.normalize(torch.from_numpy(random.standard_normal((6, D), np.float32)))
    noise_ND = torch.from_numpy(random.standard_normal((TILE, D), np.float32))
    unit_ND = F.normalize(real_unit_ID[[4, 5] * 8] + 0.01 * noise_ND).numpy()
    candidates = Candidates(
        embeds_ND=unit_ND,
        unit_ND=unit_ND,
        like_N=np.linspace(0, 0.9, TILE, dtype=np.float32),
        factor_NF=None,
    )
    selection = SelectionSettings(candidates_per_item=4, diversity=0)
    variants = replace(variants_of(0.1, 1), row_G=np.array([4, -1]))
    chosen = choose_candidates(candidates, np.array([2, 1]), selection, real_unit_ID, variants)
    assert chosen.candidate_K.tolist() == [6, 4, 3]
    assert chosen.nearest_K is not None
    assert chosen.nearest_K.tolist() == [4, 4, 5]
    without = choose_candidates(candidates, np.array([2, 1]), selection, real_unit_ID)
    assert without.candidate_K.tolist() == [7, 6, 3]
