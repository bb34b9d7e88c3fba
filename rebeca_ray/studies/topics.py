"""Topic precision of a study's sets: is a user's picture on topics and in styles that the user likes?

captions of liked training items ─► topics ─┐
captions of generated images ─► topics ─────┴─► share of a user's images with liked topics alone

Shapes: U users, N items, T topics.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.data.captions import CaptionImages, Captions, caption_items, read_captions
from rebeca_ray.data.clip import ERROR
from rebeca_ray.data.sentences import SentenceModel
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.topic_model import MixtureTopics, fit_topics
from rebeca_ray.evaluation.topics import liked_topics, topic_precision, topic_sets
from rebeca_ray.studies.measure import Judge
from rebeca_ray.studies.sets import ItemSet

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 64
ONE_KIND = "topic"  # of captions that tell content and style together


@dataclass(frozen=True, kw_only=True)
class CaptionSource:
    """Captions of one kind, such as content or style: those of real items, and a captioner of images."""

    name: str
    real: Captions
    caption: Callable[[Sequence[bytes]], list[str]]


@dataclass(frozen=True, kw_only=True)
class NamedTopics:
    """Topics for captions of few different texts: each text is a topic."""

    names: list[str]

    def probability(self, captions: Sequence[str]) -> np.ndarray:
        """Return 1 at the topic of each caption [N, T]; all topics alike for an unknown one."""
        probability_NT = np.full((len(captions), len(self.names)), 1 / len(self.names))
        row_of = {name: row for row, name in enumerate(self.names)}
        for row, caption in enumerate(captions):
            if caption in row_of:
                probability_NT[row] = np.eye(len(self.names))[row_of[caption]]
        return probability_NT


@dataclass(frozen=True, kw_only=True)
class TopicJudge:
    """A topic model, and the topics [U, T] that each user of the study likes."""

    name: str
    model: NamedTopics | MixtureTopics
    liked_UT: np.ndarray
    caption: Callable[[Sequence[bytes]], list[str]]

    def precision(self, item_set: ItemSet) -> np.ndarray:
        """Return the share [U] of each user's images whose topics the user likes."""
        topics_NT = topic_sets(self.model.probability(self.caption(item_set.encoded)))
        return topic_precision(topics_NT, item_set.user_N, self.liked_UT)


def read_sources(config: EvaluateConfig) -> list[CaptionSource]:
    """Return the captions that the config names. Without a caption model there are none."""
    if config.caption_model is None:
        return []
    sources = []
    prompts = {"content": config.content_prompt, "style": config.style_prompt}
    given: dict[str, str | None] = {name: prompt for name, prompt in prompts.items() if prompt}
    for name, prompt in (given or {ONE_KIND: None}).items():
        model = CaptionImages(config.caption_model, config.device, prompt=prompt)
        if config.captions is not None:
            real = read_captions(config.captions)
        else:
            assert config.images is not None  # the config requires one of the two
            log.info(f"captioning the real items: {name}")
            real = caption_items(config.images, model)
        sources.append(CaptionSource(name=name, real=real, caption=captioner(model)))
    return sources


def captioner(model: CaptionImages) -> Callable[[Sequence[bytes]], list[str]]:
    """Return a function from encoded images to captions. It raises InputError for a broken image."""

    def caption(encoded: Sequence[bytes]) -> list[str]:
        captions: list[str] = []
        for start in range(0, len(encoded), IMAGES_AT_ONCE):
            part = encoded[start : start + IMAGES_AT_ONCE]
            images = [{"bytes": image, "path": None} for image in part]
            batch = model(pa.table({"item_id": [str(row) for row in range(len(part))], "image": images}))
            if errors := batch[ERROR].drop_null().to_pylist():
                raise InputError(f"an image {errors[0]}; run `rebeca catalog verify`")
            captions += batch["caption"].to_pylist()
        return captions

    return caption


def fit_topic_judge(source: CaptionSource, judge: Judge, config: EvaluateConfig) -> TopicJudge:
    """Return a topic model of the liked training items, with each user's liked topics.

    If their captions are of at most `num_topics` different texts, each text is a topic. Raises InputError for
    a liked item without a caption.
    """
    ratings = judge.ratings
    likes = [ratings.likes_of_training(user) for user in judge.user_U.tolist()]
    rows, row_of_like = np.unique(np.concatenate(likes), return_inverse=True)
    captions = source.real.of(ratings.items.item_id[rows].tolist())
    texts = sorted(set(captions))
    model: NamedTopics | MixtureTopics
    if len(texts) <= config.num_topics:
        model = NamedTopics(names=texts)
    else:
        embed = SentenceModel(config.sentence_model, config.device) if config.sentence_model else None
        model = fit_topics(captions, config.num_topics, embed=embed, seed=config.seed)
    owner = np.repeat(np.arange(len(likes)), [len(part) for part in likes])
    topics_NT = topic_sets(model.probability(captions))
    return TopicJudge(
        name=source.name,
        model=model,
        liked_UT=liked_topics(topics_NT[row_of_like], owner, len(likes)),
        caption=source.caption,
    )
