"""The feature spaces of a study: planned embeddings, the items' CLIP, and other image encoders.

Every space has the real items in its own features, and a verifier that was fitted to them.

Shapes: N items, I real items, D dimensions of the space.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.data.clip import ERROR, EmbedImages, clip_fingerprint
from rebeca_ray.data.encoders import EncodeImages
from rebeca_ray.data.items import EmbeddedItems
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.parquet import open_parquet
from rebeca_ray.studies.measure import PLANNED, Judge
from rebeca_ray.studies.metrics import VerifierFigures
from rebeca_ray.studies.sets import ItemSet
from rebeca_ray.studies.verifying import fit_study_verifier

log = logging.getLogger(__name__)

BACKGROUND = "#ffffff"
IMAGES_AT_ONCE = 256
CLIP = "clip"

Embed = Callable[[pa.Table], pa.Table]  # images -> item_id, image_embeds and ERROR


@dataclass(frozen=True, kw_only=True)
class Space:
    """A feature space: its judge, and what embeds images there. Planned embeddings need nothing."""

    name: str
    judge: Judge
    embed: Embed | None = None

    def features_of(self, item_set: ItemSet) -> np.ndarray | None:
        """Return the features [N, D] of a set; None for prompts alone, which plan no embeddings."""
        if self.embed is None:
            return item_set.embeds_ND if item_set.embeds_ND.any() else None
        parts = []
        for start in range(0, len(item_set.encoded), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            images = [{"bytes": encoded, "path": None} for encoded in item_set.encoded[part]]
            batch = self.embed(pa.table({"item_id": item_set.item_id[part], "image": images}))
            if errors := batch[ERROR].drop_null().to_pylist():
                raise InputError(f"{item_set.description}: an image {errors[0]}; run `rebeca catalog verify`")
            parts.append(features(batch))
        return np.concatenate(parts)


def read_spaces(config: EvaluateConfig, judge: Judge) -> tuple[list[Space], dict[str, VerifierFigures]]:
    """Return the spaces of a study, and the figures of the verifier of each image encoder.

    `judge` is that of the items' CLIP. Raises InputError for encoders and images that cannot be read.
    """
    spaces = [Space(name=PLANNED, judge=judge)]
    verifiers = {}
    if config.clip:
        check_clip(config.clip, judge.ratings.items, config.items)
        spaces.append(
            Space(name=CLIP, judge=judge, embed=EmbedImages(config.clip, config.device, BACKGROUND))
        )
    for name in config.encoders:
        assert config.images is not None  # the config requires it
        encode = EncodeImages(name, config.device, BACKGROUND)
        log.info(f"encoding the real items by {name}")
        ratings = replace(judge.ratings, items=encode_items(encode, config.images, judge.ratings.items))
        verifier, verifiers[name] = fit_study_verifier(ratings, config)
        spaces.append(
            Space(name=name, judge=replace(judge, ratings=ratings, verifier=verifier), embed=encode)
        )
    return spaces, verifiers


def check_clip(clip: str, items: EmbeddedItems, uri: str) -> None:
    """Raise InputError if `clip` is another CLIP than that of the items."""
    if items.clip and (fingerprint := clip_fingerprint(clip)) != items.clip:
        raise InputError(
            f"clip {clip}: its fingerprint is {fingerprint}, that of {uri} is {items.clip}; "
            "give the CLIP that embedded the items"
        )


def encode_items(embed: Embed, uri: str, items: EmbeddedItems) -> EmbeddedItems:
    """Return the same items, in the same order, with an encoder's features of their images.

    Raises InputError for an item without an image, and for an image that cannot be read.
    """
    source = open_parquet(uri, "images")
    expected = pa.array(items.item_id, pa.string())
    ids: list[str] = []
    parts: list[np.ndarray] = []
    for batch in source.batches(check_columns(source, schemas.ITEMS), IMAGES_AT_ONCE):
        batch = batch.filter(pc.is_in(batch["item_id"], expected))
        if not batch.num_rows:
            continue
        encoded = embed(batch)
        for item, error in zip(encoded["item_id"].to_pylist(), encoded[ERROR].to_pylist(), strict=True):
            if error is not None:
                raise InputError(f"images {uri}: item {shown(item)} {error}; give its image")
            ids.append(item)
        parts.append(features(encoded))
    row_I = pc.index_in(expected, value_set=pa.array(ids, pa.string()))
    if row_I.null_count:
        missing = items.item_id[row_I.is_null().to_numpy(zero_copy_only=False)]
        raise InputError(
            f"images {uri}: no image of {len(missing)} items, such as {shown(missing[0])}; "
            "give all real items"
        )
    return replace(items, image_embeds=np.concatenate(parts)[row_I.to_numpy()], clip=None)


def features(batch: pa.Table) -> np.ndarray:
    """Return the column `image_embeds` as an array [N, D]."""
    column = batch["image_embeds"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)
