"""Distillation: targets on the teacher's trajectory, a student near its teacher, and the quality gate."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray import schemas
from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.jobs import DistillConfig
from rebeca_ray.config.sections import NetworkSettings, PriorSampling, SamplerSettings
from rebeca_ray.errors import QualityGateError, UserError
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import ddim, sample_liked
from rebeca_ray.prior.selector import NUM_FACTORS, Selector
from rebeca_ray.prior.users import UserTable, UserVectors
from rebeca_ray.training.distill import (
    CHECKED_SAMPLES,
    compare,
    distill_prior,
    draw_trajectories,
    fit_and_judge,
    known_users,
    targets,
    teacher_steps,
)
from tests.conftest import untrained_prior

D = 8


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    settings = NetworkSettings(num_layers=2, num_heads=2, width=32, num_tokens=2, user_encoder="id")
    prior = replace(untrained_prior(settings, D), user_rows=UserTable(6, 1, 32).rows_VUH / 2)
    save_prior(prior, str(tmp_path / "teacher"))
    return str(tmp_path / "teacher")


def history_world(folder: Path) -> DistillConfig:
    """A teacher that reads histories, 30 users who rated four items each, and 20 items."""
    random = np.random.default_rng(0)
    settings = NetworkSettings(num_layers=2, num_heads=2, width=32, num_tokens=2, user_encoder="history")
    save_prior(untrained_prior(settings, D), str(folder / "teacher"))
    embeds = pa.array(random.standard_normal(20 * D).astype(np.float32))
    (folder / "items").mkdir()
    column = pa.FixedSizeListArray.from_arrays(embeds, type=schemas.image_embeds(D))
    pq.write_table(
        pa.table({"item_id": [f"i{row}" for row in range(20)], "image_embeds": column}),
        folder / "items" / "items.parquet",
    )
    rated = np.concatenate([random.permutation(20)[:4] for _ in range(30)])
    table = {
        "user_id": np.repeat([f"u{user}" for user in range(30)], 4),
        "item_id": [f"i{row}" for row in rated],
    }
    rating = pa.array(np.tile([5, 4, 1, 2], 30), pa.float32())
    pq.write_table(pa.table({**table, "rating": rating}), folder / "interactions.parquet")
    return configure(
        str(folder / "teacher"),
        interactions={"path": str(folder / "interactions.parquet"), "min_likes": 0},
        items=str(folder / "items"),
        storage=str(folder / "storage"),
        min_quality=0.0,
        min_diversity=0.0,
        max_epochs=1,
    )


def configure(teacher: str, **changes: object) -> DistillConfig:
    defaults = {
        "prior": teacher,
        "out": f"{teacher}-distilled",
        "num_trajectories": 512,
        "max_epochs": 15,
        "learning_rate": 2e-3,
        "batch_size": 128,
    }
    return DistillConfig.model_validate({**defaults, "min_quality": 0.9, "min_diversity": 0.5, **changes})


def test_the_targets_lead_from_point_to_point_of_a_trajectory(teacher: str) -> None:
    prior = load_prior(teacher)
    diffusion = Diffusion.build(prior.diffusion)
    timesteps = diffusion.inference_timesteps(4)
    assert prior.user_rows is not None
    drawn = draw_trajectories(
        prior, diffusion, UserVectors(token_GUH=prior.user_rows, factor_GF=None), timesteps, 300, seed=3
    )
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
    users = UserVectors(token_GUH=student.user_rows)
    sample_liked(student, Diffusion.build(student.diffusion), users, rows, range(60), sampler)
    assert len(calls) == 4  # no second, unconditional half
    losses = [
        float(line.split(",")[1])
        for line in Path(current_version(config.out, "prior"), "training.csv").read_text().splitlines()[1:]
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_the_student_learns_beneath_the_guidance_of_the_selector(teacher: str) -> None:
    prior = load_prior(teacher)
    assert prior.user_rows is not None
    torch.manual_seed(0)
    selector = Selector(D)
    factors = torch.randn(len(prior.user_rows), NUM_FACTORS + 1)
    selector.rows_VF = factors
    guided = replace(
        prior,
        selector=selector,
        sampling=PriorSampling(prior_guidance_scale=2.0, selector_guidance_scale=8.0),
    )
    config = configure(teacher)
    student, figures = fit_and_judge(guided, config)
    assert student.sampling.selector_guidance_scale == 8.0
    assert figures["cosine_to_teacher"] > 0.95
    # The same student without the guidance that its training took for granted is another sampler.
    bare = replace(student, sampling=PriorSampling(prior_guidance_scale=2.0, distilled_steps=4))
    diffusion = Diffusion.build(guided.diffusion)
    users = UserVectors(token_GUH=prior.user_rows, factor_GF=factors)
    assert compare(guided, bare, diffusion, users)["cosine_to_teacher"] < figures["cosine_to_teacher"] - 0.05
    for weight in selector.parameters():
        assert weight.grad is None


@pytest.mark.parametrize(("student", "steps"), [(1, 8), (3, 9), (4, 8), (8, 8), (12, 12)])
def test_the_teacher_takes_its_default_steps_or_the_next_multiple(
    teacher: str, student: int, steps: int
) -> None:
    assert teacher_steps(load_prior(teacher), student) == steps


def test_below_the_bar_nothing_is_written(teacher: str) -> None:
    config = configure(teacher, min_quality=1.01, max_epochs=1)
    with pytest.raises(QualityGateError, match=r"of the teacher's quality, min_quality is 101.0%"):
        distill_prior(config)
    with pytest.raises(UserError, match="no config.json there"):
        load_prior(config.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"diffusion": {"num_train_timesteps": 100, "schedule": "linear", "prediction_type": "epsilon"}},
            "predicts epsilon",
        ),
        (
            {"sampling": {"prior_guidance_scale": 2.0, "distilled_steps": 4}},
            "is distilled already; give the prior it was made from",
        ),
    ],
)
def test_a_teacher_that_cannot_be_distilled_is_refused(
    teacher: str, changes: dict[str, object], message: str
) -> None:
    path = Path(teacher) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        distill_prior(configure(teacher))


def test_a_teacher_of_histories_is_judged_on_users_apart(tmp_path: Path) -> None:
    config = history_world(tmp_path)
    learnt, judged = known_users(load_prior(config.prior), config)
    assert (len(learnt.token_GUH), len(judged.token_GUH)) == (24, 6)
    assert not {tuple(row) for row in learnt.token_GUH.flatten(1).tolist()} & {
        tuple(row) for row in judged.token_GUH.flatten(1).tolist()
    }
    assert set(distill_prior(config)) == {"cosine_to_teacher", "student_diversity", "student_quality"}


def test_too_little_diversity_is_refused(teacher: str) -> None:
    with pytest.raises(QualityGateError, match=r"of the teacher's diversity, min_diversity is 500.0%"):
        distill_prior(configure(teacher, min_diversity=5.0, max_epochs=1))


def test_items_of_another_clip_are_refused(tmp_path: Path) -> None:
    config = history_world(tmp_path)
    save_prior(replace(load_prior(config.prior), clip="a" * 16), config.prior)
    (tmp_path / "items" / "embedding.json").write_text(
        json.dumps({"clip": "b" * 16, "clip_name": "another", "rows": 20})
    )
    with pytest.raises(
        UserError,
        match=rf"embeddings of size 8 by CLIP {'b' * 16}, the prior knows size 8 by CLIP {'a' * 16}",
    ):
        distill_prior(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_inference_steps": 101},
            "num_inference_steps is 101; the teacher would take 101 steps for it, and was trained on 100",
        ),
        ({"out": "PRIOR"}, "is the teacher's own folder; give another"),
    ],
)
def test_impossible_settings_are_refused(teacher: str, changes: dict[str, object], message: str) -> None:
    changes = {name: teacher if value == "PRIOR" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        distill_prior(configure(teacher, **changes))
