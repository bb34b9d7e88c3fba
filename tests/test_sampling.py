"""Samplers step by step against diffusers; noise that depends on an item's seed alone; guidance."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.config import DiffusionSettings
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.prior import Prior
from rebeca_ray.sampling import ddpm, dpm_solver_pp_2m, guided_denoiser, item_noise, sample_liked

D = 8


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    network = Prior(embed_dim=D, num_users=5, num_layers=2, num_heads=2, width=16, num_tokens=3)
    torch.nn.init.normal_(network.detokenizer.weight, std=0.2)
    for block in network.blocks:  # untrained blocks pass everything through; wake them up
        torch.nn.init.normal_(block.modulation[1].weight, std=0.2)
        torch.nn.init.normal_(block.cross_gate, std=0.5)
    return network.eval()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@torch.inference_mode()
def test_ddpm_equals_diffusers_with_the_same_noise(
    prior: Prior, prediction_type: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion = Diffusion.build(DiffusionSettings(num_train_timesteps=50, prediction_type=prediction_type, schedule=schedule))
    users = torch.tensor([0, 3, 4])
    noise = item_noise([1, 2, 3], 50, D)
    ours = ddpm(guided_denoiser(prior, diffusion, users, 1.0), noise, list(range(49, -1, -1)), diffusion)

    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=schedule, prediction_type=prediction_type, clip_sample=True)
    steps = iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(steps))
    x = noise[0]
    for t in range(49, -1, -1):
        x = scheduler.step(prior(x, torch.full((3,), t), users, torch.ones(3, dtype=torch.long)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@torch.inference_mode()
def test_dpm_solver_equals_diffusers(prior: Prior, prediction_type: str) -> None:
    diffusion = Diffusion.build(DiffusionSettings(prediction_type=prediction_type))
    users = torch.tensor([0, 3, 4])
    noise = item_noise([1, 2, 3], 1, D)
    timesteps = diffusion.inference_timesteps(12)
    denoise = guided_denoiser(prior, diffusion, users, 1.0)
    ours = dpm_solver_pp_2m(denoise, noise, timesteps, diffusion, clip=1e9)

    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(12)
    assert scheduler.timesteps.tolist() == timesteps
    x = noise[0]
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.repeat(3)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=5e-4, rtol=5e-4)


@torch.inference_mode()
def test_guidance_is_linear_in_its_scale_and_one_at_scale_one(prior: Prior) -> None:
    diffusion = Diffusion.build(DiffusionSettings())
    users, x, t = torch.tensor([1, 2]), torch.randn(2, D, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 300])
    conditional = guided_denoiser(prior, diffusion, users, 1.0)(x, t)
    at2, at3 = (guided_denoiser(prior, diffusion, users, scale)(x, t) for scale in (2.0, 3.0))
    null = prior(x, t, torch.full((2,), prior.null_user_index), torch.full((2,), prior.null_rating_index))
    torch.testing.assert_close(at2, null + 2 * (conditional - null), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(at3 - at2, at2 - conditional, atol=1e-5, rtol=1e-4)
    assert (conditional - null).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_an_items_noise_does_not_depend_on_its_company(seeds: list[int], draws: int) -> None:
    together = item_noise(seeds, draws, D)
    for place, seed in enumerate(seeds):
        assert (together[:, place] == item_noise([seed], draws, D)[:, 0]).all()
        assert (together[:1, place] == item_noise([seed], 1, D)[:, 0]).all()


def test_noise_is_standard_normal() -> None:
    noise = item_noise(list(range(200)), 2, 64).numpy()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03


@settings(max_examples=8, deadline=None)
@given(st.permutations([0, 1, 2, 3]))
def test_company_and_order_change_an_embedding_by_rounding_only(prior: Prior, order: list[int]) -> None:
    diffusion = Diffusion.build(DiffusionSettings(num_train_timesteps=20))
    users, seeds = [0, 1, 1, 4], [11, 12, 13, 14]

    def sample(chosen: list[int]) -> torch.Tensor:
        tile = [*chosen, *[0] * (32 - len(chosen))]
        return sample_liked(
            prior,
            diffusion,
            [users[i] for i in tile],
            [seeds[i] for i in tile],
            sampler="dpm_solver",
            num_inference_steps=5,
            guidance_scale=3.0,
        )[: len(chosen)]

    torch.testing.assert_close(sample(order), sample([0, 1, 2, 3])[order], atol=1e-5, rtol=1e-4)
