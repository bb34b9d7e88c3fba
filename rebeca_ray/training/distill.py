"""Distill a prior: train a student that samples in a few passes like its teacher in more.

The teacher's guided trajectories are solved once, for many users. The student learns to jump from each of a
few points of a trajectory to the next in one pass, without classifier-free guidance. Selector guidance costs
no pass, so it stays, and the student learns beneath it. Training needs the users' histories, and no
embeddings but the teacher's.

Shapes: G users, N trajectories, S steps of the student, B samples, D embed dim, U user tokens, H width.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.catalog.versions import replace_version, versions_in
from rebeca_ray.config.jobs import DistillConfig
from rebeca_ray.config.sections import PriorSampling, SamplerSettings
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import check_items_fit, read_image_embeds
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.noise import item_noise
from rebeca_ray.prior.checkpoint import MARKERS, TrainedPrior, load_prior, publish_prior, read_prior_config
from rebeca_ray.prior.denoisers import LIKE
from rebeca_ray.prior.diffusion import Denoiser, Diffusion
from rebeca_ray.prior.sampling import dpm_solver_pp_2m, guided_denoiser, sample_liked, selector_guidance
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.progress import counting
from rebeca_ray.storage.writable import require_own, require_writable
from rebeca_ray.training.calibrate import training_blocks, user_vectors

log = logging.getLogger(__name__)

TILE = 256
CHECKED_USERS, CHECKED_SAMPLES = 100, 10
MIN_USERS = 5  # for a `history` prior: four to learn on, one to judge by


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """N trajectories of the teacher, at the S timesteps of the student and at their end."""

    row_N: np.ndarray  # row of the user
    x_SND: torch.Tensor
    x0_ND: torch.Tensor


def distill_prior(config: DistillConfig) -> dict[str, float]:
    """Distill `config.prior` into `config.out`; return the figures of student and teacher.

    Raises InputError for a teacher that cannot be distilled. Raises QualityGateError and publishes nothing
    in two cases: the selector likes the student's samples less than `config.min_quality` times as much as the
    teacher's, or they differ less than `config.min_diversity` times as much. A `history` prior is judged on
    users that the student did not learn on.
    """
    teacher = load_prior(config.prior, config.device)
    check_teacher(teacher, config)
    if not versions_in(config.out):  # a lost pointer does not make them somebody else's
        require_own(config.out, "out", MARKERS)
    require_writable(config.out, "out")
    with replace_version(config.out, "prior", "distill") as version:
        student, figures = fit_and_judge(teacher, config)
        publish_prior(replace(student, metrics={**teacher.metrics, **figures}), version, None)
    return figures


def fit_and_judge(teacher: TrainedPrior, config: DistillConfig) -> tuple[TrainedPrior, dict[str, float]]:
    """Return the student, and the figures of student and teacher. Raises QualityGateError for a bad one."""
    torch.manual_seed(config.seed)
    diffusion = Diffusion.build(teacher.diffusion, config.device)
    timesteps = diffusion.inference_timesteps(config.num_inference_steps)
    users, judged = known_users(teacher, config)
    drawn = draw_trajectories(teacher, diffusion, users, timesteps, config.num_trajectories, config.seed)
    student = replace(teacher, network=copy.deepcopy(teacher.network))
    losses = fit_student(student, diffusion, users, drawn, timesteps, config)
    student = replace(
        student,
        network=student.network.eval(),
        sampling=PriorSampling(
            prior_guidance_scale=teacher.sampling.prior_guidance_scale,
            selector_guidance_scale=teacher.sampling.selector_guidance_scale,
            distilled_steps=config.num_inference_steps,
        ),
        curve="epoch,train_loss\n" + "".join(f"{epoch},{loss:.6g}\n" for epoch, loss in enumerate(losses, 1)),
    )
    figures = compare(teacher, student, diffusion, judged)
    for figure, least in (("quality", config.min_quality), ("diversity", config.min_diversity)):
        if figures[f"student_{figure}"] < least:
            raise QualityGateError(
                f"distilled prior: {figures[f'student_{figure}']:.1%} of the teacher's {figure}, "
                f"min_{figure} is {least:.1%}; "
                "raise num_trajectories, max_epochs or num_inference_steps"
            )
    return student, figures


def check_teacher(teacher: TrainedPrior, config: DistillConfig) -> None:
    """Raise InputError for a teacher that cannot be distilled with this config."""
    if config.out.rstrip("/") == config.prior.rstrip("/"):
        raise InputError(f"out {config.out}: is the teacher's own folder; give another")
    if teacher.sampling.distilled_steps is not None:
        raise InputError(f"prior {config.prior}: is distilled already; give the prior it was made from")
    if teacher.diffusion.prediction_type == "epsilon":
        raise InputError(
            f"prior {config.prior}: predicts epsilon, which does not determine the sample in a single pass; "
            "train it with diffusion.prediction_type sample or v_prediction"
        )
    timesteps = teacher.diffusion.num_train_timesteps
    if (steps := teacher_steps(teacher, config.num_inference_steps)) > timesteps:
        raise InputError(
            f"num_inference_steps is {config.num_inference_steps}; the teacher would take {steps} steps "
            f"for it, and was trained on {timesteps} timesteps; set fewer"
        )
    if teacher.settings.user_encoder == "history":
        if config.interactions is None or config.items is None:
            raise InputError(
                f"prior {config.prior}: knows users by their history; set `interactions` and `items`"
            )
        check_items_fit(config.items, read_prior_config(config.prior))


def known_users(teacher: TrainedPrior, config: DistillConfig) -> tuple[UserVectors, UserVectors]:
    """Return up to `config.num_users` users to learn on, evenly spaced, and the users to judge by.

    For a `history` prior every fifth user is set apart to judge by, without the teacher's hold-out. Other
    priors know no other users, so the same users serve for both.
    """
    selector = teacher.selector
    if teacher.settings.user_encoder != "history" or config.interactions is None or config.items is None:
        rows = (
            teacher.user_rows
            if teacher.user_rows is not None
            else teacher.network.null_user_UH.detach()[None]
        )
        chosen = np.linspace(0, len(rows) - 1, min(config.num_users, len(rows))).astype(int)
        factors = selector.rows_VF[chosen] if selector is not None and selector.rows_VF is not None else None
        everybody = UserVectors(token_GUH=rows[chosen], factor_GF=factors)
        return everybody, everybody
    items = read_image_embeds(config.items)
    if config.catalog is not None:
        items = with_rated(items, config.catalog, config.interactions)
    x0_ID = teacher.scaler.scale(torch.from_numpy(items.image_embeds)).numpy()
    histories = build_histories(config.interactions, items.item_id, config.storage, catalog=config.catalog)
    block = next(training_blocks(histories))
    chosen = np.linspace(0, len(block.counts_V) - 1, min(config.num_users, len(block.counts_V))).astype(int)
    if len(chosen) < MIN_USERS:
        raise InputError(
            f"interactions {config.interactions.path}: {len(chosen)} users; "
            f"give at least {MIN_USERS} to learn and judge on"
        )
    apart = np.arange(len(chosen)) % 5 == 0

    learnt, judged = (
        user_vectors(teacher, block, user_G, x0_ID) for user_G in (chosen[~apart], chosen[apart])
    )
    return learnt, judged


def teacher_steps(teacher: TrainedPrior, student_steps: int) -> int:
    """Return the teacher's number of steps: its default, rounded up to a multiple of the student's.

    What selector guidance adds up to depends on the number of steps. Its scale was chosen for the default.
    """
    default = SamplerSettings().resolve(teacher.sampling, teacher.diffusion.num_train_timesteps)
    assert default.num_inference_steps
    return math.ceil(default.num_inference_steps / student_steps) * student_steps


@torch.inference_mode()
def draw_trajectories(
    teacher: TrainedPrior,
    diffusion: Diffusion,
    users: UserVectors,
    timesteps: Sequence[int],
    count: int,
    seed: int,
) -> Trajectories:
    """Solve `count` guided trajectories of random users, as the teacher samples by default."""
    row_N = np.random.default_rng(seed).integers(0, len(users.token_GUH), count)
    fine = diffusion.inference_timesteps(teacher_steps(teacher, len(timesteps)))
    sampler = SamplerSettings().resolve(teacher.sampling, teacher.diffusion.num_train_timesteps)
    points: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    with counting("solve trajectories", count) as counted:
        for start in range(0, count, TILE):
            row = torch.from_numpy(row_N[start : start + TILE]).to(users.token_GUH.device)
            index = torch.arange(len(row), device=row.device)
            guided = guided_denoiser(teacher, diffusion, users.take(row), index, sampler)
            passed: list[torch.Tensor] = []

            def denoise(
                x_BD: torch.Tensor,
                timestep: int,
                guided: Denoiser = guided,
                passed: list[torch.Tensor] = passed,
            ) -> torch.Tensor:
                if timestep in timesteps:
                    passed.append(x_BD)
                return guided(x_BD, timestep)

            seeds = [seed * 2**40 + number for number in range(start, start + len(row))]
            ends.append(
                dpm_solver_pp_2m(
                    denoise,
                    item_noise(seeds, teacher.network.embed_dim, row.device),
                    fine,
                    diffusion,
                    teacher.scaler.clip or math.inf,
                )
            )
            points.append(torch.stack(passed))
            counted.add(len(row))
    return Trajectories(row_N=row_N, x_SND=torch.cat(points, dim=1), x0_ND=torch.cat(ends))


def targets(drawn: Trajectories, timesteps: Sequence[int], diffusion: Diffusion) -> torch.Tensor:
    """Return the targets [S, N, D] of the student (Salimans & Ho 2022, appendix G).

    With a target as `denoised`, a DDIM step leads from a point of a trajectory exactly to the next, and from
    the last point to the end.
    """
    goals = []
    for step, (timestep, following) in enumerate(pairwise(timesteps)):
        ratio = diffusion.sigma[following] / diffusion.sigma[timestep]
        weight = diffusion.alpha[following] - ratio * diffusion.alpha[timestep]
        goals.append((drawn.x_SND[step + 1] - ratio * drawn.x_SND[step]) / weight)
    return torch.stack([*goals, drawn.x0_ND])


def fit_student(
    student: TrainedPrior,
    diffusion: Diffusion,
    users: UserVectors,
    drawn: Trajectories,
    timesteps: Sequence[int],
    config: DistillConfig,
) -> list[float]:
    """Train the denoiser in place, with fixed user tokens; return the mean loss of each epoch.

    The loss looks at `denoised` after selector guidance, as the student samples. A student of unguided
    trajectories kept 87% of its teacher's quality: it never saw a guided point, and nothing corrected what
    guidance did in its last step.
    """
    goal_SND, device = targets(drawn, timesteps, diffusion), drawn.x0_ND.device
    network, scale = student.network, student.sampling.selector_guidance_scale
    count, token_GUH = len(drawn.row_N), users.token_GUH.clone()
    factor_GF = None if users.factor_GF is None else users.factor_GF.clone()
    deviation = student.scaler.deviation
    variance_S1 = torch.tensor(
        [[diffusion.posterior_variance(t, deviation)] for t in timesteps], device=device
    )
    optimizer = torch.optim.AdamW(
        network.denoiser.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
    )
    steps = config.max_epochs * -(-count * len(timesteps) // config.batch_size)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    row_N, timestep_S = torch.from_numpy(drawn.row_N).to(device), torch.tensor(timesteps, device=device)
    losses = []
    network.train()
    with counting("distill, in steps", steps) as counted:
        for epoch in range(1, config.max_epochs + 1):
            total = torch.zeros((), device=device)
            for part in torch.randperm(count * len(timesteps), device=device).split(config.batch_size):
                step, number = part // count, part % count
                x_BD, timestep_B, row_B = drawn.x_SND[step, number], timestep_S[step], row_N[number]
                condition = network.condition(token_GUH[row_B], torch.full_like(number, LIKE))
                denoised = diffusion.denoised(network(x_BD, timestep_B, condition), x_BD, timestep_B)
                factor_BF = None if factor_GF is None else factor_GF[row_B]
                pull = selector_guidance(student, factor_BF, torch.arange(len(row_B), device=device), scale)
                loss = F.mse_loss(pull(denoised, variance_S1[step]), goal_SND[step, number])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                total += loss.detach() * len(part)
                counted.add()
            losses.append(float(total) / (count * len(timesteps)))
            log.info(f"epoch {epoch}/{config.max_epochs}  train {losses[-1]:.5f}")
    return losses


def compare(
    teacher: TrainedPrior, student: TrainedPrior, diffusion: Diffusion, users: UserVectors
) -> dict[str, float]:
    """Return the figures of the student against its teacher, with the same users and new noise.

    `student_quality` is the ratio of the selector's mean like probabilities. Without a selector it is the
    mean cosine of the two. `student_diversity` is the ratio of the mean cosine distances between a user's
    samples.
    """
    chosen = np.linspace(0, len(users.token_GUH) - 1, min(CHECKED_USERS, len(users.token_GUH))).astype(int)
    row_N = np.repeat(chosen, CHECKED_SAMPLES)
    steps = diffusion.settings.num_train_timesteps
    drawn = []
    for prior in (teacher, student):
        sampler = SamplerSettings().resolve(prior.sampling, steps)
        drawn.append(sample_liked(prior, diffusion, users, row_N, range(2**50, 2**50 + len(row_N)), sampler))
    cosine = float(F.cosine_similarity(drawn[0], drawn[1]).mean())
    spread = []
    for x_ND in drawn:
        unit_GSD = F.normalize(x_ND).view(len(chosen), CHECKED_SAMPLES, -1)
        spread.append(float(1 - (unit_GSD @ unit_GSD.mT).mean()))
    figures = {"cosine_to_teacher": cosine, "student_diversity": spread[1] / spread[0]}
    if teacher.selector is None or users.factor_GF is None:
        return {**figures, "student_quality": cosine}
    factor_NF = users.factor_GF[row_N]
    like = [
        float(teacher.selector.like_probability(x_ND.to(factor_NF.device), factor_NF).mean())
        for x_ND in drawn
    ]
    return {**figures, "teacher_like": like[0], "student_like": like[1], "student_quality": like[1] / like[0]}
