"""Captions of stickers: exact words of real items, and those that the judge reads of images."""

from typing import Any

import numpy as np

from rebeca_ray.evaluation.topics import liked_topics, topic_precision, topic_sets
from rebeca_ray.stickers.captions import judged_captions, real_captions
from rebeca_ray.stickers.judge import Judgement


class KnowingJudge:
    """Read style and subcategory off the first two channel values of the first pixel."""

    styles, subcategories = ("noto", "flat"), ("animal-bird", "food")

    def __call__(self, images: np.ndarray) -> Judgement:
        style, subcategory = images[:, 0, 0, 0], images[:, 0, 0, 1]
        return Judgement(style=np.eye(2)[style], subcategory=np.eye(2)[subcategory])

    def style(self, judgement: Judgement) -> list[str]:
        return [self.styles[best] for best in judgement.style.argmax(1)]


def test_real_items_have_their_labels_as_captions() -> None:
    item_id, captions = real_captions()
    row = item_id.tolist().index("noto-1f99c")
    assert captions.content[row] == "animal bird"
    assert captions.style[row] == "noto style"
    assert captions.whole[row] == "a noto sticker of parrot"
    assert len(item_id) == len(captions.content) == len(captions.style) == len(captions.whole) == 7096
    assert len(set(captions.style)) == 5
    assert len(set(captions.content)) == 94


def test_generated_items_have_the_judges_words_and_its_probabilities_are_topics() -> None:
    images = np.zeros((3, 64, 64, 3), np.uint8)
    images[1, 0, 0, :2] = 1
    images[2, 0, 0, 0] = 1
    judge: Any = KnowingJudge()
    captions = judged_captions(judge, images)
    assert captions.content == ["animal bird", "food", "animal bird"]
    assert captions.style == ["noto style", "flat style", "flat style"]
    assert captions.whole[1] == "a flat sticker of food"
    # A user who likes birds, and has a bird, food and a bird.
    liked = liked_topics(np.eye(2, dtype=bool)[[0]], np.array([0]), 1)
    topics = topic_sets(judge(images).subcategory)
    assert topic_precision(topics, np.zeros(3, int), liked).tolist() == [2 / 3]
