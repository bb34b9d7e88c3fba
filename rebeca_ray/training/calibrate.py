"""Calibrate a trained prior: fit the selector, and choose the default guidance on validation.

Shapes: G users, N samples of all of them, D embed dim.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_auroc

from rebeca_ray.config.sections import PriorSampling, SamplerSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.selection import nearest_items
from rebeca_ray.prior.selector import MAX_HISTORY, Selector
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training.selector import fit_selector

log = logging.getLogger(__name__)

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 9.0)
MIN_DISTINCT = 0.85  # fraction of a user's samples with distinct nearest items
NUM_USERS, SAMPLES_PER_USER, STEPS = 40, 25, 12
USERS_AT_ONCE = 512
SELECTOR_BUCKETS = 4  # some two million ratings are enough for the selector's few weights


def calibrate_prior(prior: TrainedPrior, histories: Histories, x0_ID: np.ndarray, seed: int) -> TrainedPrior:
    """Return the prior with its selector and its default guidance, and the figures of both in its metrics.

    Without dislikes it has no selector. Without selector, users or condition dropout its guidance is 1.
    """
    selector = fit_selector(islice(training_blocks(histories), SELECTOR_BUCKETS), x0_ID, seed + 1)
    if selector is None:
        return prior
    prior = replace(prior, selector=selector)
    message = "the selector is fitted"
    if (auc := held_out_auc(selector, histories, x0_ID)) is not None:
        prior = replace(prior, metrics={**prior.metrics, "selector_auc": auc})
        message += f": {auc:.1%} of held-out likes before dislikes (area under the ROC curve)"
    log.info(message)
    if prior.condition_dropout > 0 and prior.settings.user_encoder != "none":
        prior = choose_guidance(prior, histories, x0_ID)
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


def held_out_auc(selector: Selector, histories: Histories, x0_ID: np.ndarray) -> float | None:
    """Return the area under the ROC curve on the first bucket's hold-out; None unless it has both ratings."""
    block = next(training_blocks(histories))
    user_G, row_N = np.unique(block.held_user, return_inverse=True)
    if len(np.unique(block.held_like)) < 2:
        return None
    factors = factors_of(selector, block, user_G, x0_ID)[torch.from_numpy(row_N)]
    probability = selector.like_probability(torch.from_numpy(x0_ID[block.held_item_index]), factors)
    return float(binary_auroc(probability, torch.from_numpy(block.held_like).long()))


def choose_guidance(prior: TrainedPrior, histories: Histories, x0_ID: np.ndarray) -> TrainedPrior:
    """Return the prior with the guidance that the selector likes best, while a user's samples stay distinct.

    Samples are distinct if at least 85% of a user's 25 samples have different nearest items. Harder guidance
    leaves fewer, so the sweep ends at the first scale with too few. The metrics keep the sweep.
    """
    assert prior.selector is not None
    block = next(training_blocks(histories))
    user_G = np.linspace(0, len(block.counts_V) - 1, min(NUM_USERS, len(block.counts_V))).astype(int)
    history = block.history(user_G, prior.settings.max_history).look_up(x0_ID)
    factors = factors_of(prior.selector, block, user_G, x0_ID)
    tokens = prior.user_tokens(block.user_index_V[user_G], history)
    timesteps = prior.diffusion.num_train_timesteps
    steps = min(STEPS, timesteps)
    row_N = np.repeat(np.arange(len(user_G)), SAMPLES_PER_USER)
    unit_ID = F.normalize(torch.from_numpy(x0_ID))
    diffusion = Diffusion.build(prior.diffusion)
    sweep = []
    for scale in GUIDANCE_SCALES:
        sampler = SamplerSettings(num_inference_steps=steps, prior_guidance_scale=scale).resolve(
            prior.sampling, timesteps
        )
        x_ND = sample_liked(prior.network, diffusion, tokens, row_N, range(len(row_N)), sampler)
        like = float(prior.selector.like_probability(x_ND, factors[torch.from_numpy(row_N)]).mean())
        nearest_GS = nearest_items(F.normalize(x_ND), unit_ID)[0].view(len(user_G), -1)
        distinct = float(np.mean([len(row.unique()) / len(row) for row in nearest_GS]))
        sweep.append((scale, like, distinct))
        log.info(
            f"guidance {scale:g}: like probability {like:.3f}, {distinct:.0%} of a user's samples distinct"
        )
        if distinct < MIN_DISTINCT:
            break
    allowed = [point for point in sweep if point[2] >= MIN_DISTINCT] or [
        max(sweep, key=lambda point: point[2])
    ]
    chosen = max(allowed, key=lambda point: point[1])
    if chosen[2] < MIN_DISTINCT:
        log.warning(
            f"{chosen[2]:.0%} of a user's samples are distinct without guidance, "
            f"{MIN_DISTINCT:.0%} are expected: the prior has hardly learnt yet, "
            "or the items are too few to distinguish samples"
        )
    metrics = {f"like_probability_at_guidance_{scale:g}": like for scale, like, _ in sweep}
    metrics |= {f"distinct_at_guidance_{scale:g}": distinct for scale, _, distinct in sweep}
    return replace(
        prior, sampling=PriorSampling(prior_guidance_scale=chosen[0]), metrics={**prior.metrics, **metrics}
    )
