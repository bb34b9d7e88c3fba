"""LPIPS to later likes, by torchmetrics on a network of random weights; the real ones are downloaded."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.errors import InputError
from rebeca_ray.studies.methods import Materials
from rebeca_ray.studies.perceptual import LIKED_PER_USER, PerceptualJudge

WEIGHTS = "squeezenet1_1-b8a52dc0.pth"  # where torchvision keeps them


def noise(seed: int) -> bytes:
    """Return a PNG of 64 x 64 random pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def config(study: EvaluateConfig, materials: Materials, tmp_path: Path) -> EvaluateConfig:
    ids = materials.judge.ratings.items.item_id.tolist()
    images = [{"bytes": noise(row), "path": None} for row in range(len(ids))]
    pq.write_table(
        pa.table({"item_id": ids, "image": pa.array(images, schemas.IMAGE)}), tmp_path / "images.parquet"
    )
    return study.model_copy(update={"images": str(tmp_path / "images.parquet"), "lpips": "squeeze"})


@pytest.fixture
def _random_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import squeezenet1_1

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "hub" / "checkpoints" / WEIGHTS)


@pytest.mark.usefixtures("_random_network")
def test_the_distance_is_the_mean_over_all_pairs(config: EvaluateConfig, materials: Materials) -> None:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity as lpips

    judge = PerceptualJudge("squeeze", materials.judge, config)
    distance_U = judge.distances(materials.catalog)
    assert distance_U.shape == (len(materials.catalog.user_id),)
    user, ratings = 5, materials.judge.ratings
    liked = ratings.likes_of_test(int(materials.judge.user_U[user]))[-LIKED_PER_USER:]

    def tensor(encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded)).resize((64, 64), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2).float() / 127.5 - 1

    pairs = [
        float(lpips(tensor(materials.catalog.encoded[row]), tensor(noise(int(other))), net_type="squeeze"))
        for row in materials.catalog.rows_of(user)
        for other in liked
    ]
    assert distance_U[user] == pytest.approx(np.mean(pairs), rel=1e-4)


@pytest.mark.usefixtures("_random_network")
def test_an_image_is_at_no_distance_from_itself(config: EvaluateConfig, materials: Materials) -> None:
    judge = PerceptualJudge("squeeze", materials.judge, config)
    assert judge.mean_distance([noise(1)], [noise(1)]) == pytest.approx(0, abs=1e-6)
    assert judge.mean_distance([noise(1)], [noise(2)]) > 0.001


def test_missing_weights_are_named(
    config: EvaluateConfig, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty"))

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(InputError, match="lpips squeeze: its weights cannot be loaded .*no route to host"):
        PerceptualJudge("squeeze", materials.judge, config)


def test_lpips_needs_images(study: EvaluateConfig) -> None:
    with pytest.raises(ValueError, match="encoders and lpips need `images`"):
        EvaluateConfig.model_validate({**study.model_dump(exclude_unset=True), "lpips": "alex"})
