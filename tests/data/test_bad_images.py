"""Bad images are refused all at once, or left out, recorded, and mentioned every night."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data import embedding
from rebeca_ray.data.bad_images import describe_bad
from rebeca_ray.data.clip import ERROR, read_image
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import CLIP, ITEMS
from rebeca_ray.watchdog import Pulse


def write_items(path: Path, number: int, bad: dict[int, bytes | None]) -> list[str]:
    """Write the first stickers, some with other bytes; return their ids."""
    rows = pq.read_table(ITEMS, columns=["item_id", "image"]).slice(0, number).to_pylist()
    for row, encoded in bad.items():
        rows[row]["image"]["bytes"] = encoded
    pq.write_table(pa.Table.from_pylist(rows), path)
    return [row["item_id"] for row in rows]


class ReadImages:
    """EmbedImages without its CLIP, which takes seconds to load."""

    def __init__(self, clip: str, device: str, background: str, pulse: Pulse) -> None:
        self.background = background

    def __call__(self, batch: pa.Table) -> pa.Table:
        read = [read_image(value, self.background) for value in batch["image"].to_pylist()]
        values = [[float(np.asarray(image).mean() + 1)] for image, _ in read]
        embeds = pa.array(values, schemas.image_embeds(1))
        batch = batch.drop_columns(["image"]).append_column("image_embeds", embeds)
        return batch.append_column(ERROR, pa.array([error for _, error in read], pa.string()))


@pytest.fixture
def without_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "EmbedImages", ReadImages)


def beside(config: EmbedConfig, name: str) -> Path:
    """Return a file of the published version of the embedded items."""
    return Path(current_version(config.out, "items"), name)


@pytest.mark.usefixtures("ray_local", "without_clip")
def test_bad_images_are_refused_together_or_left_out_and_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "items.parquet"
    ids = write_items(path, 6, {1: b"no picture", 4: None})
    config = EmbedConfig(
        items=str(path),
        clip=f"local-dir:{CLIP}",
        out=str(tmp_path / "out"),
        batch_size=2,
        cpus_per_actor=0.5,
    )
    with pytest.raises(InputError) as caught:
        embed_items(config)
    assert f"items {path}: 2 of 6 images cannot be decoded (" in str(caught.value)
    assert f"{ids[1]!r} is no image that can be read" in str(caught.value)
    assert f"{ids[4]!r} has a path alone and null bytes" in str(caught.value)
    assert str(caught.value).endswith("or set bad_images=drop to leave them out")
    assert list((tmp_path / "out").rglob("*.parquet")) == []

    drop = config.model_copy(update={"bad_images": "drop"})
    good = [ids[row] for row in (0, 2, 3, 5)]
    with caplog.at_level(logging.WARNING, "rebeca_ray"):
        assert embed_items(drop) == 4
    assert [record.levelname for record in caplog.records if "2 of 6 images" in record.message] == ["WARNING"]
    assert sorted(read_image_embeds(drop.out).item_id) == sorted(good)
    assert set(json.loads(beside(drop, "bad_images.json").read_text())) == {ids[1], ids[4]}
    marker = json.loads(beside(drop, "embedding.json").read_text())
    assert (marker["rows"], marker["bad_images"]) == (4, 2)

    # The next night says so again, and embeds new items alone.
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rebeca_ray"):
        assert embed_items(drop, only_new=True) == 0
    assert "2 of 6 images cannot be decoded" in caplog.text
    ids = write_items(path, 8, {1: b"no picture", 4: None, 6: b"nor this"})
    assert embed_items(drop, only_new=True) == 1
    assert sorted(read_image_embeds(drop.out).item_id) == sorted([*good, ids[7]])
    record = beside(drop, "bad_images.json")
    assert set(json.loads(record.read_text())) == {ids[1], ids[4], ids[6]}

    # Mended images come in once their record is removed; `refuse` does not trust the record.
    write_items(path, 8, {4: None})
    with pytest.raises(InputError, match=rf"1 of 8 images cannot be decoded \({ids[4]!r} has a path"):
        embed_items(config, only_new=True)
    record.unlink()
    write_items(path, 8, {})
    assert embed_items(drop, only_new=True) == 3
    assert not beside(drop, "bad_images.json").exists()
    assert len(read_image_embeds(drop.out).item_id) == 8


@pytest.mark.usefixtures("ray_local", "without_clip")
def test_items_without_any_good_image_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", 2, {0: b"", 1: b"a"})
    config = EmbedConfig(
        items=str(tmp_path / "items.parquet"),
        clip=f"local-dir:{CLIP}",
        out=str(tmp_path / "out"),
        bad_images="drop",
        cpus_per_actor=0.5,
    )
    with pytest.raises(InputError, match="2 of 2 images cannot be decoded"):
        embed_items(config)
    assert list((tmp_path / "out").rglob("*.parquet")) == []


def test_ten_bad_images_are_named() -> None:
    reasons = {f"item-{number:02}": "has no bytes" for number in range(12)}
    text = describe_bad("a.parquet", reasons, 1000)
    assert text.startswith("items a.parquet: 12 of 1,000 images cannot be decoded ('item-00' has no bytes | ")
    assert text.endswith("| 'item-09' has no bytes | …)")
    assert "item-10" not in text
