"""An item's embedding is that of the picture as a person sees it."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rebeca_ray.data.clip import ERROR, EmbedImages, clip_fingerprint
from rebeca_ray.stickers import CLIP, EMBED_DIM, ITEMS
from tests.test_pixels import encoded


@pytest.fixture(scope="module")
def stage() -> EmbedImages:
    return EmbedImages(f"local-dir:{CLIP}", "cpu", "#ffffff")


@pytest.fixture(scope="module")
def sticker() -> Image.Image:
    image = pq.read_table(ITEMS, columns=["image"])["image"][7]["bytes"].as_py()
    return Image.open(io.BytesIO(image)).convert("RGB").resize((96, 96))


def embeds_of(stage: EmbedImages, *images: bytes | None) -> tuple[np.ndarray, list[str | None]]:
    batch = pa.table(
        {
            "item_id": [str(row) for row in range(len(images))],
            "image": [{"bytes": image, "path": "a"} for image in images],
            "style": ["noto"] * len(images),
        }
    )
    out = stage(batch)
    assert out.column_names == ["item_id", "image_embeds", ERROR]
    return np.array(out["image_embeds"].to_pylist(), np.float32), out[ERROR].to_pylist()


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def cut_out(image: Image.Image) -> Image.Image:
    """Make the white around a drawing clear. What lies below it is black."""
    pixels = np.array(image.convert("RGBA"))
    white = (pixels[..., :3] == 255).all(axis=-1)
    pixels[white] = 0
    assert 0.1 < white.mean() < 0.95
    return Image.fromarray(pixels)


def test_every_spelling_of_a_picture_has_the_same_embedding(stage: EmbedImages, sticker: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = sticker.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    pairs: list[tuple[Any, Any]] = [
        (encoded(cut_out(sticker)), encoded(sticker)),
        (encoded(cut_out(sticker), "WEBP", lossless=True), encoded(sticker)),
        (encoded(cut_out(grey.convert("RGB")).convert("LA")), encoded(grey)),
        (encoded(sticker.transpose(Image.Transpose.ROTATE_90), exif=exif), encoded(sticker)),
        (encoded(deep), encoded(grey)),
        (encoded(deep, "TIFF"), encoded(grey)),
        (encoded(floats, "TIFF"), encoded(grey)),
    ]
    for variant, seen in pairs:
        (one, other), errors = embeds_of(stage, variant, seen)
        assert errors == [None, None]
        assert cosine(one, other) > 0.999


def test_a_bad_image_has_a_reason_and_its_neighbours_have_their_embeddings(
    stage: EmbedImages, sticker: Image.Image
) -> None:
    good = encoded(sticker)
    (alone,), _ = embeds_of(stage, good)
    embeds, errors = embeds_of(stage, good, None, good[:-200], good)
    assert embeds.shape == (4, EMBED_DIM)
    np.testing.assert_allclose(embeds[[0, 3]], [alone, alone], atol=1e-4)
    assert errors[0] is errors[3] is None
    assert str(errors[1]).startswith("has a path alone and null bytes")
    assert str(errors[2]).startswith("is a broken image")


def test_the_fingerprint_tells_the_backgrounds_apart() -> None:
    """Prints of the CLIP's files alone made the embeddings without a rule for transparent images."""
    name = f"local-dir:{CLIP}"
    prints = {clip_fingerprint(name), clip_fingerprint(name, "#000000"), clip_fingerprint(name, "#ffffff")}
    assert len(prints) == 2
    assert "d6eac745777d5b38" not in prints
