"""Calibrate a trained prior: fit the selector, and choose the default guidance on validation.

Shapes: G users, N samples of all of them, D embed dim.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import PriorSampling, SamplerSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.evaluation.accuracy import Predictions, auc, calibration_error
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.schedules import fewest_steps
from rebeca_ray.prior.selector import MAX_HISTORY, Selector
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.progress import counting
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training.selector import fit_selector

log = logging.getLogger(__name__)

SELECTOR_SCALES = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0)
MIN_DIVERSITY = 0.75  # mean distance between a user's samples, relative to that without guidance
NUM_USERS, SAMPLES_PER_USER = 100, 10
USERS_AT_ONCE = 512
SELECTOR_BUCKETS = 4  # some two million ratings are enough for the selector's few weights


@dataclass(frozen=True)
class Point:
    """A scale of selector guidance: like probability by user [G] as the judge sees it, and diversity."""

    scale: float
    like_G: np.ndarray
    diversity: float

    def is_as_good_as(self, best: "Point") -> bool:
        """Return whether the difference to the best point, user by user, is within one standard error."""
        difference_G = best.like_G - self.like_G
        return float(difference_G.mean()) <= float(difference_G.std()) / math.sqrt(
            max(1, len(difference_G) - 1)
        )


def calibrate_prior(prior: TrainedPrior, histories: Histories, x0_ID: np.ndarray, seed: int) -> TrainedPrior:
    """Return the prior with its selector and its default guidance, and the figures of both in its metrics.

    Without likes it has no selector. Without selector or users it has no guidance.
    """
    selector = fit_selector(islice(training_blocks(histories), SELECTOR_BUCKETS), x0_ID, seed + 1)
    if selector is None:
        return prior
    prior = replace(prior, selector=selector)
    message = "the selector is fitted"
    if figures := held_out_figures(selector, histories, x0_ID):
        prior = replace(prior, metrics={**prior.metrics, **figures})
        message += (
            f": {figures['selector_auc']:.1%} of held-out likes before dislikes (area under the ROC curve), "
            f"calibration error {figures['selector_calibration_error']:.1%}"
        )
    log.info(message)
    if prior.settings.user_encoder != "none":
        prior = choose_guidance(prior, next(training_blocks(histories)), x0_ID, seed)
    if prior.user_rows is not None:
        selector.rows_VF = factors_of_all(selector, histories, x0_ID)
    return prior


def training_blocks(histories: Histories) -> Iterator[UserBlock]:
    """Yield one bucket after another, without the hold-out."""
    for bucket, users in enumerate(histories.users_of_bucket):
        if users:
            yield UserBlock(read_table(histories.file(bucket), "histories"), histories.first_user_index)


@torch.inference_mode()
def factors_of(selector: Selector, block: UserBlock, user_G: np.ndarray, x0_ID: np.ndarray) -> torch.Tensor:
    """Return the selector's factors [G, F+1] of some users of a block."""
    parts = [user_G[start : start + USERS_AT_ONCE] for start in range(0, len(user_G), USERS_AT_ONCE)]
    device = selector.popularity.weight.device
    return torch.cat(
        [selector.user_factors(block.history(part, MAX_HISTORY).look_up(x0_ID, device)) for part in parts]
    )


def factors_of_all(selector: Selector, histories: Histories, x0_ID: np.ndarray) -> torch.Tensor:
    """Return the selector's factors [V, F+1] of every user, in the order of user_index."""
    return torch.cat(
        [
            factors_of(selector, block, np.arange(len(block.counts_V)), x0_ID)
            for block in training_blocks(histories)
        ]
    )


def held_out_figures(selector: Selector, histories: Histories, x0_ID: np.ndarray) -> dict[str, float]:
    """Return area under the ROC curve and calibration error on the first bucket's hold-out.

    There are none unless it has both likes and dislikes.
    """
    block = next(training_blocks(histories))
    if len(np.unique(block.held_like)) < 2:
        return {}
    user_G, row_N = np.unique(block.held_user, return_inverse=True)
    factors = factors_of(selector, block, user_G, x0_ID)[torch.from_numpy(row_N)]
    probability = selector.like_probability(torch.from_numpy(x0_ID[block.held_item_index]), factors)
    predictions = Predictions(probability.numpy(), block.held_like, block.held_user)
    return {
        "selector_auc": auc(predictions),
        "selector_calibration_error": calibration_error(predictions),
    }


def user_vectors(
    prior: TrainedPrior,
    block: UserBlock,
    user_G: np.ndarray,
    x0_ID: np.ndarray,
    factor_GF: torch.Tensor | None = None,
) -> UserVectors:
    """Return the vectors of some users of a block; their selector's factors unless others are given."""
    device = prior.network.null_user_UH.device
    is_history = prior.settings.user_encoder == "history"
    tokens, counts = [], []
    for start in range(0, len(user_G), USERS_AT_ONCE):
        part = user_G[start : start + USERS_AT_ONCE]
        history = block.history(part, prior.settings.max_history).look_up(x0_ID, device)
        tokens.append(prior.user_tokens(block.user_index_V[part], history))
        counts.append(history.present_BL.sum(1))
    if factor_GF is None and prior.selector is not None:
        factor_GF = factors_of(prior.selector, block, user_G, x0_ID)
    return UserVectors(
        token_GUH=torch.cat(tokens),
        factor_GF=factor_GF,
        num_ratings_G=torch.cat(counts) if is_history else None,
    )


def choose_guidance(prior: TrainedPrior, block: UserBlock, x0_ID: np.ndarray, seed: int) -> TrainedPrior:
    """Return the prior with the least selector guidance that is as good as the best, and its figures.

    The judge is another selector, from the other half of the ratings: the guide must not grade itself.
    Classifier-free guidance stays at 1: it costs a second pass, and has not been shown to pay for it.
    """
    halves = np.random.default_rng(seed).random(len(block.item_index_N)) < 0.5
    parts = (block.part(halves), block.part(~halves))
    guide, judge = (fit_selector([part], x0_ID, seed + number) for number, part in enumerate(parts, 2))
    if guide is None or judge is None:
        return prior
    default = SamplerSettings().resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    steps = fewest_steps(prior.diffusion, default.num_inference_steps or 1, prior.scaler.deviation)
    if steps is None:
        log.warning("no number of steps is enough for this diffusion.schedule, so no guidance is chosen")
        return prior
    user_G = np.linspace(0, len(block.counts_V) - 1, min(NUM_USERS, len(block.counts_V))).astype(int)
    users = user_vectors(prior, block, user_G, x0_ID, factors_of(guide, parts[0], user_G, x0_ID))
    factor_GF = factors_of(judge, parts[1], user_G, x0_ID)
    row_N = np.repeat(np.arange(len(user_G)), SAMPLES_PER_USER)
    guided, diffusion = replace(prior, selector=guide), Diffusion.build(prior.diffusion)
    points = []
    with counting("calibrate guidance", len(SELECTOR_SCALES)) as counted:
        for scale in SELECTOR_SCALES:
            sampler = default.model_copy(
                update={"num_inference_steps": steps, "selector_guidance_scale": scale}
            )
            x_ND = sample_liked(guided, diffusion, users, row_N, range(len(row_N)), sampler)
            like_N = judge.like_probability(x_ND, factor_GF[torch.from_numpy(row_N)])
            like_G = like_N.view(len(user_G), -1).mean(1).numpy()
            diversity = mean_distance(x_ND.view(len(user_G), SAMPLES_PER_USER, -1))
            points.append(Point(scale, like_G, diversity))
            log.info(
                f"selector guidance {scale:g}: like probability {like_G.mean():.3f}, "
                f"{diversity / points[0].diversity:.0%} of the diversity without guidance"
            )
            counted.add()
    chosen = choose_point(points)
    metrics = {
        "judged_like_probability": float(chosen.like_G.mean()),
        "judged_like_probability_without_guidance": float(points[0].like_G.mean()),
        "diversity_of_unguided": chosen.diversity / points[0].diversity,
    }
    return replace(
        prior,
        sampling=PriorSampling(prior_guidance_scale=1.0, selector_guidance_scale=chosen.scale),
        metrics={**prior.metrics, **metrics},
    )


def choose_point(points: list[Point]) -> Point:
    """Return the point of the least guidance that is as good as the best. The first point has no guidance.

    Allowed are points whose samples stay at least MIN_DIVERSITY as far apart as those without guidance. A
    point is as good as the best if its like probabilities, user by user, are within one standard error of
    the best's: a difference that another draw could turn around does not count.
    """
    allowed = [point for point in points if point.diversity >= MIN_DIVERSITY * points[0].diversity]
    best = max(allowed, key=lambda point: float(point.like_G.mean()))
    return min((point for point in allowed if point.is_as_good_as(best)), key=lambda point: point.scale)


def mean_distance(x_GSD: torch.Tensor) -> float:
    """Return the mean cosine distance between two samples of the same user."""
    unit_GSD = F.normalize(x_GSD, dim=-1)
    samples = x_GSD.shape[1]
    return (1 - float((unit_GSD @ unit_GSD.mT).mean())) * samples / (samples - 1)
