"""Make given items personal: move each some way from the item to the taste of its user.

items and strengths + the candidates' seeds -> sample_variants -> candidates, as planning chooses among them

A strength of 1 is a sample of the user that knows nothing of the item, bit for bit. Towards 0 the item stays
as it is. Either method keeps the rule that an embedding's bits depend on its user, item, strength and seed.

Shapes: G users, N candidates, M candidates of one strength, D embed dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import NoisedItems, sample_liked
from rebeca_ray.prior.schedules import inference_timesteps
from rebeca_ray.prior.users import UserVectors

SMALLEST_SINE = 1e-6  # of the angle between two embeddings on an arc; below, they are on a line


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The given items of G users. A user without one has the strength 1 and any embedding."""

    row_G: np.ndarray  # of the item among the real items; -1 without one
    item_GD: torch.Tensor  # in the prior's space
    strength_G: np.ndarray  # how far an item moves to the user's taste, in (0, 1]


def sample_variants(
    prior: TrainedPrior,
    diffusion: Diffusion,
    users: UserVectors,
    row_N: np.ndarray,
    seeds: Sequence[int],
    sampler: SamplerSettings,
    variants: Variants,
) -> torch.Tensor:
    """Return one candidate per row [N, D]: a variant of its user's item, or a plain sample without an item.

    `sampler` is a resolved one, and `seeds` are those of the noise, as in `sample_liked`.
    """
    item_ND, strength_N = variants.item_GD[torch.from_numpy(row_N)], variants.strength_G[row_N]
    if sampler.variant == "slerp":
        sample_ND = sample_liked(prior, diffusion, users, row_N, seeds, sampler)
        return slerp(item_ND, sample_ND, torch.from_numpy(strength_N))

    # Rows that begin at one timestep share tiles, and rows that begin at noise are plain samples.
    assert sampler.num_inference_steps
    num_timesteps = diffusion.settings.num_train_timesteps
    noised_N = np.round(strength_N.astype(np.float64) * num_timesteps).astype(int)
    x_ND = item_ND.clone()  # the answer for a strength of less than half a timestep
    for noised in np.unique(noised_N[noised_N > 0]).tolist():
        part_M = np.flatnonzero(noised_N == noised)
        start = None
        if noised < num_timesteps:
            timesteps = timesteps_below(noised, sampler.num_inference_steps, num_timesteps)
            start = NoisedItems(item_ND[part_M], timesteps)
        part_seeds = [seeds[number] for number in part_M.tolist()]
        x_ND[part_M] = sample_liked(prior, diffusion, users, row_N[part_M], part_seeds, sampler, start)
    return x_ND


def timesteps_below(noised: int, num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """Return the timesteps of a sampling that begins `noised` timesteps from the data (SDEdit).

    Meng et al. 2022, algorithm 1. They are as close to each other as those of a whole sampling, or closer, so
    that the last one sees no more noise.
    """
    steps = math.ceil(noised * num_inference_steps / num_train_timesteps)
    return inference_timesteps(noised, steps)


def slerp(from_ND: torch.Tensor, to_ND: torch.Tensor, strength_N: torch.Tensor) -> torch.Tensor:
    """Return the embeddings at `strength_N` of the way along the arcs between two others (Shoemake 1985).

    The direction turns evenly, and the length grows evenly. Nearly parallel ones are joined by a line.
    """
    strength_N1 = strength_N.double()[:, None]
    length_N1, goal_N1 = from_ND.double().norm(dim=1)[:, None], to_ND.double().norm(dim=1)[:, None]
    cosine_N1 = (from_ND.double() * to_ND.double()).sum(1)[:, None] / (length_N1 * goal_N1)
    angle_N1 = cosine_N1.clamp(-1, 1).arccos()
    sine_N1 = angle_N1.sin()
    is_line_N1 = ~(sine_N1 > SMALLEST_SINE)
    sine_N1 = torch.where(is_line_N1, 1.0, sine_N1)
    weight_N1 = torch.where(is_line_N1, 1 - strength_N1, ((1 - strength_N1) * angle_N1).sin() / sine_N1)
    goal_weight_N1 = torch.where(is_line_N1, strength_N1, (strength_N1 * angle_N1).sin() / sine_N1)
    mean_N1 = (1 - strength_N1) * length_N1 + strength_N1 * goal_N1
    mixed_ND = from_ND * (weight_N1 * mean_N1 / length_N1) + to_ND * (goal_weight_N1 * mean_N1 / goal_N1)
    return mixed_ND.float()
