"""The guidance figure of the paper: every prior guidance scale with every decoder guidance scale.

A cell has a plain sample per item: no candidates, and no selector guidance. All cells have the same users,
noise and image seeds.

Shapes: U users, N items, D embed dim.
"""

import logging
from dataclasses import replace

import numpy as np
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.decoder.interface import Decoder
from rebeca_ray.errors import InputError
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.schemas import TRAINING
from rebeca_ray.studies.drawing import draw_set
from rebeca_ray.studies.measure import mean_of, measure
from rebeca_ray.studies.methods import Materials, Wishes, sample_items
from rebeca_ray.studies.metrics import GuidanceCell
from rebeca_ray.studies.sets import ItemSet, TrueLike
from rebeca_ray.studies.spaces import Space
from rebeca_ray.training.calibrate import user_vectors

log = logging.getLogger(__name__)


def guidance_cells(
    config: EvaluateConfig,
    materials: Materials,
    decoder: Decoder,
    settings: DecoderSettings,
    space: Space,
    true_like: TrueLike | None,
) -> list[GuidanceCell]:
    """Return the figures in `space` of each pair of scales, for `config.guidance_users` of the users.

    Raises InputError as `check_guidable` does.
    """
    check_guidable(materials.prior)
    materials = thinned(materials, config.guidance_users)
    space = replace(space, judge=materials.judge)
    cells = []
    for prior_scale in config.prior_guidance_tried:
        embeds_ND = sample_guided(materials, prior_scale)
        for decoder_scale in config.decoder_guidance_tried:
            name = f"prior-{prior_scale:g}-decoder-{decoder_scale:g}"
            wishes = Wishes(embeds_ND=embeds_ND, decoder_guidance_scale=decoder_scale)
            items = draw_set(name, wishes, materials.catalog, decoder, settings, config.out)
            figures = measure(items, embedded(space, items), space.judge, space.name).figures
            truth = None
            if true_like is not None:
                truth_U = items.mean_by_user(true_like(items.owners(), items.encoded))
                truth = mean_of(truth_U, config.seed)
            cells.append(
                GuidanceCell(
                    prior_guidance_scale=prior_scale,
                    decoder_guidance_scale=decoder_scale,
                    users=len(items.user_id),
                    items=len(items.user_N),
                    like_probability=figures.like_probability,
                    mmd=figures.distances.mmd,
                    vendi=figures.vendi,
                    true_like_probability=truth,
                )
            )
            log.info(f"{name}: like probability {figures.like_probability.mean:.3f}")
    return cells


def check_guidable(prior: TrainedPrior) -> None:
    """Raise InputError for a prior without the user encoder `history`, and for a distilled one.

    The guidance of a distilled prior is built in.
    """
    if prior.settings.user_encoder != "history" or prior.sampling.distilled_steps is not None:
        raise InputError(
            f"prior_guidance_tried: the prior has the user encoder {prior.settings.user_encoder}, "
            f"distilled_steps={prior.sampling.distilled_steps}; expected history, and no distilled prior; "
            "leave prior_guidance_tried out"
        )


def embedded(space: Space, items: ItemSet) -> np.ndarray:
    """Return the features [N, D] of drawn images."""
    x_ND = space.features_of(items)
    assert x_ND is not None  # only `planned` may have none
    return x_ND


def sample_guided(materials: Materials, prior_guidance_scale: float) -> np.ndarray:
    """Return an embedding [N, D] per item of the catalog, sampled at one guidance scale."""
    prior, ratings = materials.prior, materials.judge.ratings
    x0_ID = prior.scaler.scale(torch.from_numpy(ratings.items.image_embeds)).numpy()
    block = ratings.block(ratings.interactions.split == TRAINING)
    users = user_vectors(prior, block, materials.judge.user_U, x0_ID)
    sampler = SamplerSettings(prior_guidance_scale=prior_guidance_scale, selector_guidance_scale=0.0)
    return sample_items(prior, users, materials.catalog.user_N, sampler, materials.seed)


def thinned(materials: Materials, num_users: int) -> Materials:
    """Return the same for at most `num_users` of the users, thinned out evenly."""
    catalog, judge = materials.catalog, materials.judge
    users = len(catalog.user_id)
    chosen_U = np.linspace(0, users - 1, min(num_users, users)).astype(int)
    return replace(
        materials,
        catalog=catalog.of_users(chosen_U.tolist()),
        judge=replace(judge, user_U=judge.user_U[chosen_U]),
    )
