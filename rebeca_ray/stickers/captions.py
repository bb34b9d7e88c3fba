"""Captions of stickers in words: content and style, as real items have them and as the judge reads them.

Topic precision then has an exact truth: a real item has one subcategory and one style.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rebeca_ray.data.captions import Captions
from rebeca_ray.stickers import ITEMS
from rebeca_ray.stickers.build.data import to_pixels
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.studies.topics import CaptionSource


@dataclass(frozen=True, kw_only=True)
class StickerCaptions:
    """N captions each: of the content ("animal bird"), of the style ("noto style"), and of the whole."""

    content: list[str]
    style: list[str]
    whole: list[str]


def real_captions(path: Path = ITEMS) -> tuple[np.ndarray, StickerCaptions]:
    """Return the ids [N] of the real items, and their captions.

    The content is the subcategory, because the judge reads no more of a generated item. The whole caption
    has the name: "a noto sticker of parrot".
    """
    table = pq.read_table(path, columns=["item_id", "style", "subcategory", "name"]).to_pydict()
    return np.array(table["item_id"], object), caption_stickers(
        table["style"], table["subcategory"], table["name"]
    )


def judged_captions(judge: Judge, images: np.ndarray) -> StickerCaptions:
    """Return the captions of uint8 images [N, 64, 64, 3], by their likeliest style and subcategory.

    The whole caption has the subcategory in place of the name.
    """
    judgement = judge(images)
    subcategories = [judge.subcategories[best] for best in judgement.subcategory.argmax(1)]
    return caption_stickers(judge.style(judgement), subcategories, subcategories)


def caption_sources() -> list[CaptionSource]:
    """Return the stickers' captions by content and by style, for topic precision in an evaluation."""
    item_id, real = real_captions()
    judge = Judge()

    def source(name: str) -> CaptionSource:
        return CaptionSource(
            name=name,
            real=Captions(item_id=item_id, caption=np.array(getattr(real, name), object)),
            caption=lambda encoded: getattr(judged_captions(judge, to_pixels(list(encoded))), name),
        )

    return [source("content"), source("style")]


def caption_stickers(styles: list[str], subcategories: list[str], names: list[str]) -> StickerCaptions:
    """Return the captions of stickers."""
    return StickerCaptions(
        content=[words(subcategory) for subcategory in subcategories],
        style=[f"{words(style)} style" for style in styles],
        whole=[
            f"a {words(style)} sticker of {words(name)}" for style, name in zip(styles, names, strict=True)
        ],
    )


def words(label: str) -> str:
    """Return a label as words: "animal-bird" is "animal bird"."""
    return " ".join(label.replace("&", " ").replace("-", " ").split())
