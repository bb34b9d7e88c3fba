"""The methods that REBECA is compared with: each makes as many items for the same users.

Most methods give embeddings, which the catalog's decoder draws. Prompts replace or join them. The prompts P1
and P2 are the paper's (section 5, baselines).

Shapes: U users, N items, S items of one user, I real items, D embed dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.data.captions import Captions
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.keywords import count_words, keywords
from rebeca_ray.evaluation.retrieval import retrieve
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.schemas import TRAINING
from rebeca_ray.studies.measure import Judge
from rebeca_ray.studies.sets import ItemSet
from rebeca_ray.training.calibrate import factors_of

NUM_KEYWORDS = 12  # of a persona prompt, and as many of its negative prompt


class Prompt(StrEnum):
    """The positive prompts of the paper's baselines."""

    NONE = ""
    P1 = "high quality photo"
    P2 = (
        "Realistic image, finely detailed, with balanced composition and harmonious elements. Dynamic yet "
        "subtle tones, versatile style adaptable to diverse themes and aesthetics, prioritizing clarity and "
        "authenticity."
    )


NEGATIVE = {
    Prompt.NONE: "",
    Prompt.P1: "bad quality photo, letters",
    Prompt.P2: (
        "deformed, ugly, wrong proportion, frame, watermark, low res, bad anatomy, worst quality, low quality"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The inputs of the decoder for all items of a method, in the order of the catalog's items."""

    embeds_ND: np.ndarray
    prompt: Prompt = Prompt.NONE
    prompts: tuple[list[str], list[str]] | None = None  # with negative ones, by item, instead of `prompt`
    ip_adapter_scale: float | None = None  # that of the decoder's settings
    decoder_guidance_scale: float | None = None  # the same
    made_from: tuple[str, ...] = ()  # what made the decoder, if it is not the catalog's


@dataclass(frozen=True, kw_only=True)
class Materials:
    """All that methods are made from."""

    catalog: ItemSet
    judge: Judge
    prior: TrainedPrior
    captions: Sequence[Captions]  # of the real items, by content and style, or both together
    without_users: TrainedPrior | None
    seed: int


def wishes_of(method: str, materials: Materials) -> Wishes:
    """Return the decoder's inputs for a method of `config.evaluation.Method`."""
    embeds_ND = materials.catalog.embeds_ND
    prompts = {"empty_prompt": Prompt.NONE, "p1": Prompt.P1, "p2": Prompt.P2}
    if method in prompts:
        return Wishes(embeds_ND=np.zeros_like(embeds_ND), prompt=prompts[method], ip_adapter_scale=0.0)
    if method == "persona":
        personas = personas_of(materials)
        return Wishes(embeds_ND=np.zeros_like(embeds_ND), prompts=personas, ip_adapter_scale=0.0)
    if method in ("rebeca_p1", "rebeca_p2"):
        return Wishes(embeds_ND=embeds_ND, prompt=prompts[method.removeprefix("rebeca_")])
    if method == "no_user":
        return Wishes(embeds_ND=sample_without_users(materials))
    if method == "mean_of_likes":
        return Wishes(embeds_ND=means_of_likes(materials))
    return Wishes(embeds_ND=materials.judge.ratings.items.image_embeds[real_rows(method, materials)])


def personas_of(materials: Materials) -> tuple[list[str], list[str]]:
    """Return a prompt and a negative prompt per item: the keywords of its user's training ratings.

    Raises InputError without captions of the rated items.
    """
    ratings, judge = materials.judge.ratings, materials.judge
    if not materials.captions:
        raise InputError(
            "method persona: there are no captions of the real items; set caption_model, or leave it out"
        )
    users = judge.user_U.tolist()
    rated_U = [ratings.rows_of(user, TRAINING) for user in users]
    rows = np.unique(np.concatenate(rated_U))
    parts = [captions.of(ratings.items.item_id[rows].tolist()) for captions in materials.captions]
    text_of = {row: " ".join(texts) for row, *texts in zip(rows.tolist(), *parts, strict=True)}
    vocabulary = sorted(count_words(text_of.values()))
    personas = []
    for user, rated in zip(users, rated_U, strict=True):
        liked = ratings.likes_of_training(user)
        likes, dislikes = keywords(
            [text_of[row] for row in liked.tolist()],
            [text_of[row] for row in np.setdiff1d(rated, liked).tolist()],
            vocabulary,
            NUM_KEYWORDS,
        )
        personas.append((", ".join(likes), ", ".join(dislikes)))
    prompts, negatives = zip(*[personas[user] for user in materials.catalog.user_N.tolist()], strict=True)
    return list(prompts), list(negatives)


def real_rows(method: str, materials: Materials) -> np.ndarray:
    """Return the rows [N] of the real items that a method picks. The user has rated none of them."""
    ratings, judge = materials.judge.ratings, materials.judge
    rated = [ratings.rows_of(user) for user in judge.user_U.tolist()]
    counts = np.bincount(materials.catalog.user_N).tolist()
    if method == "retrieval":
        return np.concatenate(retrieved_by_selector(materials, counts))
    if method == "best_by_verifier":
        score_UI = judge.verifier.like_matrix(ratings.items.image_embeds, judge.user_U)
    elif method == "nearest_to_mean":
        unit_ID = F.normalize(torch.from_numpy(ratings.items.image_embeds))
        mean_UD = F.normalize(torch.from_numpy(user_means(materials)))
        score_UI = (mean_UD @ unit_ID.T).numpy()
    elif method == "most_popular":
        training = (ratings.interactions.split == TRAINING) & (ratings.interactions.like == 1)
        likes_I = np.bincount(ratings.item_N[training], minlength=len(ratings.items.item_id))
        score_UI = np.tile(likes_I.astype(np.float32), (len(rated), 1))
    else:
        random = np.random.default_rng(materials.seed)
        score_UI = random.random((len(rated), len(ratings.items.item_id)), np.float32)
    for score_I, rows in zip(score_UI, rated, strict=True):
        score_I[rows] = -np.inf
    best_UI = np.argsort(-score_UI, axis=1, kind="stable")
    return np.concatenate([best_I[:count] for best_I, count in zip(best_UI, counts, strict=True)])


def retrieved_by_selector(materials: Materials, counts: list[int]) -> list[np.ndarray]:
    """Return the rows of the items that the prior's selector likes most, from training ratings alone.

    Raises InputError for a prior without selector.
    """
    prior, ratings = materials.prior, materials.judge.ratings
    if prior.selector is None:
        raise InputError("method retrieval: the prior has no selector; leave the method out")
    block = ratings.block(ratings.interactions.split == TRAINING)
    x0_ID = prior.scaler.scale(torch.from_numpy(ratings.items.image_embeds))
    user_U = materials.judge.user_U
    factor_UF = factors_of(prior.selector, block, user_U, x0_ID.numpy())
    rated = [ratings.rows_of(user) for user in user_U.tolist()]
    rows = retrieve(prior.selector, factor_UF, x0_ID.numpy(), rated, max(counts))
    return [part[:count] for part, count in zip(rows, counts, strict=True)]


def user_means(materials: Materials) -> np.ndarray:
    """Return the mean embedding [U, D] of each user's training likes; that of all items without a like."""
    ratings = materials.judge.ratings
    x_ID = ratings.items.image_embeds
    likes = [ratings.likes_of_training(user) for user in materials.judge.user_U.tolist()]
    return np.stack([(x_ID[rows] if len(rows) else x_ID).mean(0) for rows in likes])


def means_of_likes(materials: Materials) -> np.ndarray:
    """Return each user's mean [N, D] with the typical length of an embedding, once per item."""
    mean_UD, x_ID = user_means(materials), materials.judge.ratings.items.image_embeds
    length = np.linalg.norm(x_ID, axis=1).mean()
    mean_UD *= length / np.linalg.norm(mean_UD, axis=1, keepdims=True)
    return mean_UD[materials.catalog.user_N].astype(np.float32)


def sample_without_users(materials: Materials) -> np.ndarray:
    """Return embeddings [N, D] of the prior that was trained without users (NoUE).

    Raises InputError for a prior with users.
    """
    prior = materials.without_users
    assert prior is not None  # the config names it
    if prior.settings.user_encoder != "none":
        raise InputError(
            f"without_users: that prior has the user encoder {prior.settings.user_encoder}; expected none; "
            "train one with network.user_encoder=none"
        )
    users = UserVectors(token_GUH=prior.network.null_user_UH.detach()[None])
    user_N = np.zeros(len(materials.catalog.user_N), int)
    return sample_items(prior, users, user_N, SamplerSettings(), materials.seed)


def sample_items(
    prior: TrainedPrior, users: UserVectors, user_N: np.ndarray, settings: SamplerSettings, seed: int
) -> np.ndarray:
    """Return an embedding [N, D] per item, for the users `user_N`. Other seeds give other noise."""
    sampler = settings.resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    seeds = range(seed * 2**32, seed * 2**32 + len(user_N))
    x0_ND = sample_liked(prior, Diffusion.build(prior.diffusion), users, user_N, seeds, sampler)
    return prior.scaler.unscale(x0_ND).numpy()
