"""Distillation: targets that land on the teacher's trajectory, a student near its teacher, and a bar below which nothing is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rebeca_ray.checkpoint import load_prior, save_prior
from rebeca_ray.config import DistillConfig, NetworkSettings, PriorSampling, SamplerSettings
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.distillation import CHECKED_SAMPLES, KnownUsers, distill_prior, draw_trajectories, targets
from rebeca_ray.errors import QualityGateError, UserError
from rebeca_ray.sampling import ddim, sample_liked
from rebeca_ray.users import UserTable
from tests.conftest import untrained_prior

D = 8


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    settings = NetworkSettings(num_layers=2, num_heads=2, width=32, num_tokens=2, user_encoder="id")
    prior = replace(untrained_prior(settings, D), user_rows=UserTable(6, 1, 32).rows_VUH * 20)
    save_prior(prior, str(tmp_path / "teacher"))
    return str(tmp_path / "teacher")


def configure(teacher: str, **changes: object) -> DistillConfig:
    told = {
        "prior": teacher,
        "out": f"{teacher}-distilled",
        "num_trajectories": 512,
        "max_epochs": 30,
        "learning_rate": 2e-3,
        "batch_size": 128,
    }
    return DistillConfig.model_validate({**told, "min_quality": 0.9, **changes})


def test_the_targets_lead_from_point_to_point_of_a_trajectory(teacher: str) -> None:
    prior = load_prior(teacher)
    diffusion = Diffusion.build(prior.diffusion)
    timesteps = diffusion.inference_timesteps(4)
    assert prior.user_rows is not None
    drawn = draw_trajectories(prior, diffusion, KnownUsers(token_GUH=prior.user_rows, factor_GF=None), timesteps, 300, seed=3)
    goals = dict(zip(timesteps, targets(drawn, timesteps, diffusion), strict=True))
    passed = []

    def answer(x: torch.Tensor, timestep: int) -> torch.Tensor:
        passed.append(x)
        return goals[timestep]

    end = ddim(answer, iter([drawn.x_SND[0]]), timesteps, diffusion, clip=1e9)
    torch.testing.assert_close(torch.stack(passed), drawn.x_SND, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(end, drawn.x0_ND)


def test_the_student_comes_near_its_teacher_in_a_few_passes(teacher: str) -> None:
    config = configure(teacher)
    figures = distill_prior(config)
    assert figures["cosine_to_teacher"] > 0.97
    student = load_prior(config.out)
    assert student.sampling == PriorSampling(prior_guidance_scale=2.0, distilled_steps=4)
    assert student.fingerprint != load_prior(teacher).fingerprint
    calls = []
    student.network.denoiser.register_forward_hook(lambda *_: calls.append(1))
    assert student.user_rows is not None
    sampler = SamplerSettings().resolve(student.sampling, 100)
    rows = torch.arange(6).repeat_interleave(CHECKED_SAMPLES).numpy()
    sample_liked(student.network, Diffusion.build(student.diffusion), student.user_rows, rows, range(60), sampler)
    assert len(calls) == 4  # no second, unconditional half
    losses = [float(line.split(",")[1]) for line in (Path(config.out) / "training.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.2 * losses[0]


def test_below_the_bar_nothing_is_written(teacher: str) -> None:
    config = configure(teacher, min_quality=1.01, max_epochs=1)
    with pytest.raises(QualityGateError, match=r"of the teacher's quality, min_quality is 101.0%") as caught:
        distill_prior(config)
    assert caught.value.exit_code == 4
    assert not (Path(config.out) / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": {"num_train_timesteps": 100, "schedule": "linear", "prediction_type": "epsilon"}}, "predicts epsilon"),
        ({"sampling": {"prior_guidance_scale": 2.0, "distilled_steps": 4}}, "is distilled already; give the prior it was made from"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_is_refused(teacher: str, changes: dict[str, object], message: str) -> None:
    path = Path(teacher) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        distill_prior(configure(teacher))
