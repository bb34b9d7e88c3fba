"""The forward process against diffusers, and every prediction type against its own definition."""

import pytest
import torch
from diffusers import DDPMScheduler

from rebeca_ray.config.sections import DiffusionSettings
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.schedules import alphas_cumprod, check_steps, last_noise


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "laplace"])
@pytest.mark.parametrize("steps", [100, 1000, 6000])
def test_schedules_equal_diffusers(schedule: str, steps: int) -> None:
    settings = DiffusionSettings.model_validate({"schedule": schedule, "num_train_timesteps": steps})
    ours = torch.from_numpy(alphas_cumprod(settings))
    theirs = DDPMScheduler(beta_schedule=schedule, num_train_timesteps=steps).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, atol=1e-6, rtol=2e-4)
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "laplace"])
def test_a_perfect_prediction_gives_back_the_sample(prediction_type: str, schedule: str) -> None:
    diffusion = Diffusion.build(DiffusionSettings(prediction_type=prediction_type, schedule=schedule))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 50, 8, generator=generator)
    timestep = torch.arange(0, 900, 18)
    noisy = diffusion.add_noise(x0, noise, timestep)
    target = diffusion.target(x0, noise, timestep)
    tolerance = 1e-3 if prediction_type == "epsilon" else 1e-5  # epsilon divides by a small alpha
    torch.testing.assert_close(
        diffusion.denoised(target, noisy, timestep), x0, atol=tolerance, rtol=tolerance
    )
    assert diffusion.loss(target, target).item() == 0.0


def test_inference_timesteps_are_evenly_spaced_from_the_end() -> None:
    diffusion = Diffusion.build(DiffusionSettings())
    assert diffusion.inference_timesteps(4) == [999, 749, 499, 249]
    assert diffusion.inference_timesteps(1000) == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("schedule", "train_steps", "fewest"),
    [("squaredcos_cap_v2", 1000, 3), ("linear", 1000, 4), ("linear", 6000, 10), ("laplace", 1000, 2)],
)
def test_so_few_steps_that_the_last_sees_more_noise_than_data_are_refused(
    schedule: str, train_steps: int, fewest: int
) -> None:
    settings = DiffusionSettings.model_validate({"schedule": schedule, "num_train_timesteps": train_steps})
    for steps in range(1, fewest):
        with pytest.raises(ValueError, match=rf"num_inference_steps is {steps}; .*; take at least {fewest}$"):
            check_steps(settings, steps, 1.0)
    for steps in range(fewest, 100):
        check_steps(settings, steps, 1.0)
        assert last_noise(settings, steps) < 1.0
    # Data that vary less hide in less noise.
    with pytest.raises(ValueError, match="more noise than data"):
        check_steps(settings, fewest, 0.1)
