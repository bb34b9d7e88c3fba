"""The map of a snapshot for embedding-atlas: every item once, with image, position and neighbours."""

import io
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from rebeca_ray.catalog.exports.atlas import NEIGHBOURS, export_atlas, project
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError
from tests.conftest import snapshot_of


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), float)


def test_every_item_has_an_image_a_position_and_its_nearest_others(
    config: GenerateConfig, tmp_path: Path
) -> None:
    snapshot_of(config)
    out = tmp_path / "atlas.parquet"
    command = f"catalog export atlas {config.catalog} {out}"
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    assert "16 of 16 items" in result.output
    assert f"uvx embedding-atlas {out} --x x --y y --neighbors neighbors --image image" in result.output
    snapshot = read_catalog(config.catalog)
    items, mapped = snapshot.items(), pq.read_table(out)
    assert mapped["item_id"].to_pylist() == items["item_id"].to_pylist()
    assert mapped["user_id"].to_pylist() == items["user_id"].to_pylist()
    assert len({*zip(mapped["x"].to_pylist(), mapped["y"].to_pylist(), strict=True)}) == 16
    embeds = np.array(items["image_embeds"].to_pylist())
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, np.inf)
    for row, neighbours in enumerate(mapped["neighbors"].to_pylist()):
        nearest = np.sort(distances[row])[:NEIGHBOURS]
        np.testing.assert_allclose(distances[row][neighbours["ids"]], nearest, atol=1e-5)
        np.testing.assert_allclose(neighbours["distances"], nearest, atol=1e-5)
    originals = np.array([pixels(image) for image in snapshot.images(items)])
    for row, image in enumerate(mapped["image"].to_pylist()):
        assert image["bytes"].startswith(b"\xff\xd8")
        difference = np.abs(originals - pixels(image["bytes"])).mean(axis=(1, 2, 3))
        assert difference.argmin() == row
    again = CliRunner().invoke(app, shlex.split(command))
    assert (again.exit_code, "already exists" in again.output) == (2, True)


def test_more_items_than_asked_for_are_sampled_evenly(config: GenerateConfig, tmp_path: Path) -> None:
    snapshot_of(config)
    snapshot = read_catalog(config.catalog)
    atlas = export_atlas(snapshot, str(tmp_path / "atlas.parquet"), 4)
    assert (atlas.items, atlas.total) == (4, 16)
    ids = snapshot.items()["item_id"].to_pylist()
    assert pq.read_table(tmp_path / "atlas.parquet")["item_id"].to_pylist() == [
        ids[i] for i in (0, 5, 10, 15)
    ]
    with pytest.raises(InputError, match="has 1 items, a map needs two"):
        export_atlas(snapshot, str(tmp_path / "one.parquet"), 1)


def test_groups_of_embeddings_are_groups_on_the_map() -> None:
    random = np.random.default_rng(0)
    directions = np.repeat(random.standard_normal((3, 32)), 40, axis=0)
    embeds = directions + 0.1 * random.standard_normal((120, 32))
    positions, ids, _ = project(embeds / np.linalg.norm(embeds, axis=1, keepdims=True))
    groups = np.arange(120) // 40
    assert (groups[ids] == groups[:, None]).all()
    centres = np.array([positions[groups == group].mean(0) for group in range(3)])
    nearest = np.linalg.norm(positions[:, None] - centres, axis=2).argmin(1)
    assert (nearest == groups).mean() > 0.95
