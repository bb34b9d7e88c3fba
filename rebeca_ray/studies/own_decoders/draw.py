"""The methods that change the decoder itself for a user: LoRAs of liked images, and attention to them.

Shapes: U users, N items.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.decoder.interface import DecodedImage, Decoder, Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.schemas import TRAINING
from rebeca_ray.storage.listing import digest_of, list_data
from rebeca_ray.studies.drawing import draw_set
from rebeca_ray.studies.methods import Materials, Prompt, Wishes
from rebeca_ray.studies.own_decoders.fabric import FabricDecoder
from rebeca_ray.studies.own_decoders.lora import train_lora
from rebeca_ray.studies.pictures import read_pictures
from rebeca_ray.studies.sets import ItemSet

IMAGES_PER_USER = 100  # of a LoRA, the latest
SHARED_IMAGES = 1000
REFERENCES = 4  # liked and disliked images of FABRIC, the latest of each
VERSION = "2"  # of both methods: with another one, kept sets are drawn again


class BuiltAtUse:
    """A decoder that is built when it draws: a set that an earlier start drew needs none."""

    def __init__(self, build: Callable[[], Decoder]) -> None:
        self.build = build

    @cached_property
    def decoder(self) -> Decoder:
        return self.build()

    def decode(self, rows: Rows) -> list[DecodedImage]:
        return self.decoder.decode(rows)


class References:
    """The real items that a method sees: their rows by user, and their images, read at first use."""

    def __init__(self, method: str, materials: Materials, images: str) -> None:
        ratings = materials.judge.ratings
        self.item_id, self.images = ratings.items.item_id, images
        self.made_from = (VERSION, digest_of(list_data(images, "images")))
        self.liked: list[list[int]] = []
        self.disliked: list[list[int]] = []
        for user in materials.judge.user_U.tolist():
            liked = ratings.likes_of_training(user)
            rated = ratings.rows_of(user, TRAINING)
            disliked = rated[~np.isin(rated, liked)]
            most = REFERENCES if method == "fabric" else IMAGES_PER_USER
            self.liked.append(liked[-most:].tolist())
            self.disliked.append(disliked[-most:].tolist() if method == "fabric" else [])

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Encoded images by item."""
        rows = {row for part in (*self.liked, *self.disliked) for row in part}
        return read_pictures(self.images, {str(self.item_id[row]) for row in rows})

    def encoded(self, rows: Sequence[int]) -> list[bytes]:
        """Return the encoded images of some real items."""
        return [self.pictures[str(self.item_id[row])] for row in rows]

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Return the ids of some real items."""
        return [str(self.item_id[row]) for row in rows]


def draw_with_own_decoder(method: str, materials: Materials, config: EvaluateConfig) -> ItemSet:
    """Return the items of a method of IMAGE_METHODS. Each user is drawn once: files keep the images.

    The decoder must pass `check_trainable`. Raises InputError for missing images.
    """
    assert config.decoder is not None  # the config requires both
    assert config.images is not None
    references = References(method, materials, config.images)
    catalog = materials.catalog
    if method == "lora_shared":
        liked = sorted({row for rows in references.liked for row in rows})
        some = np.linspace(0, len(liked) - 1, min(len(liked), SHARED_IMAGES)).astype(int)
        rows = [liked[row] for row in some]
        return draw_lora(method, catalog, rows, "liked image.", references, config)
    users = range(len(catalog.user_id))
    if method == "lora_per_user":
        parts = [
            draw_lora(
                method,
                catalog.of_users([user]),
                references.liked[user],
                f"<{catalog.user_id[user]}> liked image.",
                references,
                config,
            )
            for user in users
        ]
    else:
        fabric = BuiltAtUse(lambda: FabricDecoder(settings))
        settings = config.decoder
        parts = [draw_fabric(user, catalog, references, fabric, config) for user in users]
    return joined(method, catalog, parts)


def draw_lora(
    name: str,
    catalog: ItemSet,
    rows: list[int],
    prompt: str,
    references: References,
    config: EvaluateConfig,
) -> ItemSet:
    """Return the items of some users, drawn with a LoRA of some real items and its prompt.

    Without an item there is no LoRA, and the prompt alone draws.
    """
    assert config.decoder is not None
    settings, count = config.decoder, len(catalog.item_id)

    def build() -> Decoder:
        if not rows:
            return LocalDecoder(settings)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            train_lora(settings, references.encoded(rows), prompt, config.lora, file)
            return LocalDecoder(settings.model_copy(update={"lora": str(file)}))

    wishes = Wishes(
        embeds_ND=np.zeros_like(catalog.embeds_ND),
        prompts=([prompt] * count, [""] * count),
        ip_adapter_scale=0.0,
        made_from=(*references.made_from, config.lora.model_dump_json(), *references.ids(rows)),
    )
    return draw_set(name, wishes, catalog, BuiltAtUse(build), settings, config.out)


def draw_fabric(
    user: int, catalog: ItemSet, references: References, fabric: BuiltAtUse, config: EvaluateConfig
) -> ItemSet:
    """Return the items of one user, drawn with the prompt P1 and attention to rated images."""
    assert config.decoder is not None
    liked, disliked = references.liked[user], references.disliked[user]

    def build() -> Decoder:
        decoder = fabric.decoder
        assert isinstance(decoder, FabricDecoder)
        decoder.refer_to(references.encoded(liked), references.encoded(disliked))
        return decoder

    part = catalog.of_users([user])
    wishes = Wishes(
        embeds_ND=np.zeros_like(part.embeds_ND),
        prompt=Prompt.P1,
        ip_adapter_scale=0.0,
        made_from=(*references.made_from, *references.ids(liked), "", *references.ids(disliked)),
    )
    return draw_set("fabric", wishes, part, BuiltAtUse(build), config.decoder, config.out)


def joined(method: str, catalog: ItemSet, parts: list[ItemSet]) -> ItemSet:
    """Return the items of all users as one set."""
    return replace(
        catalog,
        name=method,
        description=parts[0].description,
        item_id=[item for part in parts for item in part.item_id],
        embeds_ND=np.concatenate([part.embeds_ND for part in parts]),
        encoded=[encoded for part in parts for encoded in part.encoded],
    )
