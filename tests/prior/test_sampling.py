"""Samplers step by step against diffusers; noise by seed; guidance; bits that no batch changes."""

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.config.sections import DiffusionSettings, NetworkSettings, PriorSampling, SamplerSettings
from rebeca_ray.noise import item_noise
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.denoisers import LIKE, NULL_RATING, Prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import RATINGS_FOR_HALF, SAMPLERS, guided_denoiser, sample_liked
from rebeca_ray.prior.schedules import alphas_cumprod
from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.users import UserVectors
from tests.conftest import untrained_prior

D, USERS = 16, 5
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["squaredcos_cap_v2", "linear", "laplace"]
NO_CLIP = 1e30


@pytest.fixture(scope="module")
def trained() -> TrainedPrior:
    settings = NetworkSettings(num_layers=2, num_heads=2, width=16, num_tokens=3, user_encoder="id")
    torch.manual_seed(4)
    return replace(untrained_prior(settings, D), selector=Selector(D, num_factors=4).eval())


@pytest.fixture(scope="module")
def prior(trained: TrainedPrior) -> Prior:
    return trained.network


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(USERS, 1, 16, generator=torch.Generator().manual_seed(3))


def scheduler_of(sampler: str, schedule: DiffusionSettings) -> Any:
    """The diffusers scheduler that a sampler reproduces, on the very same noise schedule."""
    signal = alphas_cumprod(schedule)
    betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    common = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "trained_betas": betas.astype(np.float32),
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": "trailing",
    }
    if sampler == "ddpm":
        return DDPMScheduler(**common, clip_sample=False)
    if sampler == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    if sampler == "unipc":
        return UniPCMultistepScheduler(**common, solver_order=2, solver_type="bh2", final_sigmas_type="zero")
    return DPMSolverMultistepScheduler(**common, solver_order=2, final_sigmas_type="zero")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@torch.inference_mode()
def test_every_step_equals_diffusers(
    prior: Prior,
    tokens: torch.Tensor,
    sampler: str,
    schedule: str,
    prediction_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network's input at each step, and the result, with the same noise and predictions."""
    schedule_settings = DiffusionSettings.model_validate(
        {"num_train_timesteps": 80, "schedule": schedule, "prediction_type": prediction_type}
    )
    diffusion = Diffusion.build(schedule_settings)
    num_steps = 20 if sampler == "ddpm" else 8
    timesteps = diffusion.inference_timesteps(num_steps)
    condition = prior.condition(tokens[:3], torch.full((3,), LIKE))

    def predict(x: torch.Tensor, timestep: int) -> torch.Tensor:
        return prior(x, torch.tensor([timestep]), condition)

    inputs: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, timestep: int) -> torch.Tensor:
        inputs.append(x)
        return diffusion.denoised(predict(x, timestep), x, torch.tensor([timestep]))

    ours = SAMPLERS[sampler](denoise, item_noise([1, 2, 3], D), timesteps, diffusion, clip=NO_CLIP)

    scheduler = scheduler_of(sampler, schedule_settings)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == timesteps
    noise = item_noise([1, 2, 3], D)
    x = next(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise))
    for step, timestep in enumerate(timesteps):
        # A rounding error in the prediction of noise is divided by the signal's share, which is next to
        # nothing at first.
        scale = float(x.abs().max())
        torch.testing.assert_close(
            inputs[step], x, atol=2e-4 * scale, rtol=1e-3, msg=lambda text, at=step: f"step {at}: {text}"
        )
        x = scheduler.step(predict(inputs[step], timestep), timestep, x).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-4 * float(x.abs().max()), rtol=1e-3)


@torch.inference_mode()
def test_the_reference_clips_as_diffusers_does(
    trained: TrainedPrior, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion = Diffusion.build(DiffusionSettings(num_train_timesteps=50))
    users, sampler = UserVectors(token_GUH=tokens), SamplerSettings(prior_guidance_scale=5.0)
    denoise = guided_denoiser(trained, diffusion, users, torch.tensor([0, 3, 4]), sampler)
    ours = SAMPLERS["ddpm"](denoise, item_noise([1, 2, 3], D), range(49, -1, -1), diffusion, clip=1.0)
    scheduler = DDPMScheduler(
        num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True
    )
    noise = item_noise([1, 2, 3], D)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise))
    x = next(noise)
    for t in range(49, -1, -1):
        x = scheduler.step(denoise(x, t), t, x).prev_sample
    assert ours.abs().max() == 1.0  # something was clipped
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_guidance_is_linear_in_its_scale_and_one_at_scale_one(
    trained: TrainedPrior, prior: Prior, tokens: torch.Tensor
) -> None:
    diffusion, users = Diffusion.build(DiffusionSettings()), UserVectors(token_GUH=tokens)
    rows, x = torch.tensor([1, 2]), torch.randn(2, D, generator=torch.Generator().manual_seed(0))
    samplers = [SamplerSettings(prior_guidance_scale=scale) for scale in (1.0, 2.0, 3.0)]
    at1, at2, at3 = (guided_denoiser(trained, diffusion, users, rows, one)(x, 300) for one in samplers)
    null = prior(
        x,
        torch.tensor([300]),
        prior.condition(prior.null_user_UH.expand(2, -1, -1), torch.full((2,), NULL_RATING)),
    )
    liked = prior(x, torch.tensor([300]), prior.condition(tokens[rows], torch.full((2,), LIKE)))
    torch.testing.assert_close(at1, liked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(at2, null + 2 * (liked - null), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(at3 - at2, at2 - at1, atol=1e-5, rtol=1e-4)
    assert (at1 - null).abs().max() > 1e-3


@torch.inference_mode()
def test_few_ratings_are_guided_less(trained: TrainedPrior, tokens: torch.Tensor) -> None:
    """Without ratings not at all, with RATINGS_FOR_HALF by half, with many in full."""
    diffusion = Diffusion.build(DiffusionSettings())
    rows, x = torch.tensor([1, 2, 3]), torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    num_ratings = torch.tensor([0, 0, RATINGS_FOR_HALF, 10**9, 0])
    users = UserVectors(token_GUH=tokens, num_ratings_G=num_ratings)
    everybody = UserVectors(token_GUH=tokens)
    guided = guided_denoiser(trained, diffusion, users, rows, SamplerSettings(prior_guidance_scale=3.0))
    plain = [
        guided_denoiser(trained, diffusion, everybody, rows, SamplerSettings(prior_guidance_scale=scale))
        for scale in (1.0, 2.0, 3.0)
    ]
    expected = torch.stack([denoise(x, 300)[row] for row, denoise in enumerate(plain)])
    torch.testing.assert_close(guided(x, 300), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_selector_guidance_is_the_gradient_of_the_log_probability(
    trained: TrainedPrior, tokens: torch.Tensor
) -> None:
    selector = trained.selector
    assert selector is not None
    diffusion = Diffusion.build(DiffusionSettings())
    factors = torch.randn(USERS, 5, generator=torch.Generator().manual_seed(6))
    users = UserVectors(token_GUH=tokens, factor_GF=factors)
    rows, x = torch.tensor([1, 2]), torch.randn(2, D, generator=torch.Generator().manual_seed(0))
    plain, guided = (
        guided_denoiser(
            trained,
            diffusion,
            users,
            rows,
            SamplerSettings(prior_guidance_scale=1.0, selector_guidance_scale=scale),
        )(x, 300)
        for scale in (0.0, 0.5)
    )
    with torch.inference_mode(mode=False), torch.enable_grad():
        x0 = plain.clone().requires_grad_()
        likely = torch.nn.functional.logsigmoid(selector.logit(x0, factors[rows].clone())).sum()
        (gradient,) = torch.autograd.grad(likely, x0)
        direction, _ = selector.linear(factors.clone())
    alpha, sigma, deviation = diffusion.alpha[300], diffusion.sigma[300], trained.scaler.deviation
    variance = sigma**2 * deviation**2 / (sigma**2 + alpha**2 * deviation**2)
    length = direction[rows].norm(dim=1, keepdim=True)
    torch.testing.assert_close(guided - plain, 0.5 * variance * deviation * gradient / length)
    assert (guided - plain).abs().max() > 1e-3
    more = selector.logit(guided, factors[rows]) - selector.logit(plain, factors[rows])
    assert (more > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_an_items_noise_does_not_depend_on_its_company(seeds: list[int], draws: int) -> None:
    together = list(islice(item_noise(seeds, D), draws))
    for row, seed in enumerate(seeds):
        for whole, alone in zip(together, islice(item_noise([seed], D), draws), strict=True):
            assert (whole[row] == alone[0]).all()


def test_noise_is_that_of_a_generator_per_seed() -> None:
    """Re-keying one generator for the first draw changes no bit of it, nor of the draws that follow."""
    seeds = [0, 7, 2**63 - 1, 2**64 - 1]
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    for noise in islice(item_noise(seeds, D), 3):
        expected = np.stack([generator.standard_normal(D, np.float32) for generator in generators])
        np.testing.assert_array_equal(noise.numpy(), expected)


def test_noise_is_standard_normal() -> None:
    first, second = (draw.numpy() for draw in islice(item_noise(range(200), 64), 2))
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1) < 0.02
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03


def draw(prior: TrainedPrior, tokens: torch.Tensor, items: list[tuple[int, int]], tile: int) -> torch.Tensor:
    sampler = SamplerSettings(
        name="dpm_solver",
        num_inference_steps=3,
        prior_guidance_scale=3.0,
        selector_guidance_scale=2.0,
        batch_size=tile,
    )
    rows, seeds = np.array([user for user, _ in items]), [seed for _, seed in items]
    generator = torch.Generator().manual_seed(7)
    users = UserVectors(
        token_GUH=tokens,
        factor_GF=torch.randn(len(tokens), 5, generator=generator),
        num_ratings_G=torch.arange(len(tokens)),
    )
    return sample_liked(prior, Diffusion.build(DiffusionSettings()), users, rows, seeds, sampler)


@pytest.mark.parametrize("architecture", ["cross_attention", "paper_v1", "paper_v2"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_company_order_and_tiles_change_no_bit(
    architecture: str, tokens: torch.Tensor, data: st.DataObject
) -> None:
    torch.manual_seed(1)
    network = {
        "num_layers": 2,
        "num_heads": 2,
        "width": 16,
        "num_tokens": D // 16,
        "user_encoder": "id",
        "architecture": architecture,
    }
    prior = replace(
        untrained_prior(NetworkSettings.model_validate(network), D), selector=Selector(D, 4).eval()
    )
    items = data.draw(
        st.lists(
            st.tuples(st.integers(0, USERS - 1), st.integers(0, 2**40)), min_size=1, max_size=70, unique=True
        )
    )
    order = data.draw(st.permutations(range(len(items))))
    together = draw(prior, tokens, items, 32)
    assert torch.equal(draw(prior, tokens, [items[row] for row in order], 32), together[order])
    assert torch.equal(draw(prior, tokens, items, 64), together)
    assert torch.equal(draw(prior, tokens, items[:1], 32), together[:1])


def test_more_users_than_are_padded_to_change_no_bit(trained: TrainedPrior) -> None:
    tokens = torch.randn(130, 1, 16, generator=torch.Generator().manual_seed(3))
    together = draw(trained, tokens, [(user, user) for user in range(130)], 256)
    for first, last in ((0, 65), (65, 130), (64, 65)):
        assert torch.equal(
            draw(trained, tokens, [(user, user) for user in range(first, last)], 256), together[first:last]
        )


def test_the_prior_sets_the_defaults_of_the_sampler() -> None:
    trained = PriorSampling(prior_guidance_scale=2.5, selector_guidance_scale=8.0)
    resolved = SamplerSettings().resolve(trained, 1000)
    assert (resolved.name, resolved.num_inference_steps, resolved.prior_guidance_scale) == (
        "dpm_solver",
        8,
        2.5,
    )
    assert resolved.selector_guidance_scale == 8.0
    assert SamplerSettings(selector_guidance_scale=0.0).resolve(trained, 1000).selector_guidance_scale == 0.0
    complete = SamplerSettings(
        name="ddpm", num_inference_steps=1000, prior_guidance_scale=7.0, selector_guidance_scale=0.0
    )
    assert complete.resolve(trained, 1000) == complete
    with pytest.raises(ValueError, match=r"sampler.num_inference_steps is 1000, it was trained on 100"):
        complete.resolve(trained, 100)
    distilled = PriorSampling(prior_guidance_scale=2.5, selector_guidance_scale=8.0, distilled_steps=4)
    resolved = SamplerSettings().resolve(distilled, 1000)
    assert resolved.selector_guidance_scale == 8.0  # it costs no pass, so a student keeps it
    assert (resolved.name, resolved.num_inference_steps, resolved.prior_guidance_scale) == ("ddim", 4, 1.0)
    with pytest.raises(ValueError, match=r"sampler.prior_guidance_scale is set, but a distilled prior has"):
        SamplerSettings(prior_guidance_scale=3.0).resolve(distilled, 1000)
