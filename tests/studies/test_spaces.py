"""Feature spaces: another encoder has real items and a verifier of its own."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.data.clip import ERROR, EmbedImages
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import CLIP, EMBED_DIM
from rebeca_ray.studies.evaluate import evaluate
from rebeca_ray.studies.spaces import encode_items, features
from tests.studies.conftest import ITEMS_PER_TASTE, STUDY_USERS, TASTES, publish_catalog

NAME = f"local-dir:{CLIP}"


def write_images(path: Path, item_ids: list[str]) -> str:
    """Write a picture per item, in the colour of its taste."""
    pictures = [picture(int(item[1:]) if item[1:].isdigit() else 0) for item in item_ids]
    images = [{"bytes": encoded, "path": None} for encoded in pictures]
    columns = {"item_id": item_ids, "image": pa.array(images, schemas.IMAGE)}
    pq.write_table(pa.table(columns), path)
    return str(path)


def picture(item: int) -> bytes:
    """Return a PNG of one colour: red, green or blue by taste, in another shade for every item."""
    channels = [0, 0, 0]
    channels[item // ITEMS_PER_TASTE % TASTES] = 255 - item % ITEMS_PER_TASTE
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16), tuple(channels)).save(encoded, "png")
    return encoded.getvalue()


def test_an_encoder_is_a_space_with_a_verifier_of_its_own(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    items = [f"i{item:03}" for item in range(TASTES * ITEMS_PER_TASTE)]
    update = {
        "catalog": publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS).root,
        "images": write_images(tmp_path / "images.parquet", ["unrated", *reversed(items)]),
        "encoders": (NAME,),
    }
    metrics = evaluate(study.model_copy(update=update)).metrics
    assert list(metrics.sets[0].spaces) == ["planned", NAME]
    assert list(metrics.verifiers) == [NAME]
    assert metrics.verifiers[NAME].seen.auc.value > 0.8  # the colour tells the taste
    assert metrics.verifiers[NAME].ratings == metrics.verifier.ratings
    assert metrics.sets[0].spaces[NAME].distances.fid is None


def test_items_get_an_encoders_features_in_their_own_order(study: EvaluateConfig, tmp_path: Path) -> None:
    real = read_image_embeds(study.items)
    uri = write_images(tmp_path / "images.parquet", real.item_id.tolist()[::-1])
    embed = EmbedImages(NAME, "cpu", "#ffffff")
    encoded = encode_items(embed, uri, real)
    assert encoded.item_id.tolist() == real.item_id.tolist()
    assert encoded.image_embeds.shape == (len(real.item_id), EMBED_DIM)
    last = embed(pq.read_table(uri).slice(0, 1))
    np.testing.assert_allclose(encoded.image_embeds[-1], features(last)[0], rtol=1e-4, atol=1e-5)


def test_missing_and_broken_images_of_real_items_are_named(study: EvaluateConfig, tmp_path: Path) -> None:
    real = read_image_embeds(study.items)

    def embed(batch: pa.Table) -> pa.Table:
        blank = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ones(batch.num_rows, np.float32)), type=schemas.image_embeds(1)
        )
        errors = ["is broken" if item == "i007" else None for item in batch["item_id"].to_pylist()]
        columns = {"item_id": batch["item_id"], "image_embeds": blank, ERROR: pa.array(errors, pa.string())}
        return pa.table(columns)

    few = write_images(tmp_path / "few.parquet", real.item_id.tolist()[10:])
    with pytest.raises(InputError, match=r"no image of 10 items, such as 'i000'; give all real items"):
        encode_items(embed, few, real)
    every = write_images(tmp_path / "all.parquet", real.item_id.tolist())
    with pytest.raises(InputError, match=r"item 'i007' is broken; give its image"):
        encode_items(embed, every, real)


def test_encoders_need_images(study: EvaluateConfig) -> None:
    with pytest.raises(ValueError, match="encoders and lpips need `images`"):
        EvaluateConfig.model_validate({**study.model_dump(), "encoders": [NAME]})
