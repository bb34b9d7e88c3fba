"""Embedding items with the bundled CLIP through Ray Data."""

import datetime
import io
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data import embedding
from rebeca_ray.data.clip import ERROR, clip_fingerprint, load_clip
from rebeca_ray.data.embedding import Kept, WriteEmbeds, embed_items
from rebeca_ray.data.items import open_items, read_image_embeds
from rebeca_ray.errors import InputError, LeaseHeldError, StorageError, UserError
from rebeca_ray.stickers import CLIP, EMBED_DIM, ITEMS
from rebeca_ray.storage.parquet import ParquetInput
from rebeca_ray.watchdog import Activity


@pytest.mark.usefixtures("ray_local")
def test_every_item_gets_open_clips_own_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activity = Activity()
    monkeypatch.setattr(embedding, "Activity", lambda _: activity)
    some = pq.read_table(ITEMS).slice(0, 30)
    pq.write_table(some, tmp_path / "items.parquet")
    config = EmbedConfig(
        items=str(tmp_path / "items.parquet"),
        clip=f"local-dir:{CLIP}",
        out=str(tmp_path / "out"),
        batch_size=8,
        cpus_per_actor=0.5,
    )
    assert embed_items(config) == 30
    assert activity.pulse is not None
    assert activity.pulse.count() > 0
    items = read_image_embeds(config.out)
    assert sorted(items.item_id) == sorted(some["item_id"].to_pylist())  # actors end in any order
    assert open_items(config.out).names == ["item_id", "image_embeds"]
    assert "style" in some.column_names  # which nobody declared
    assert items.image_embeds.shape == (30, EMBED_DIM)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    image = preprocess(Image.open(io.BytesIO(some["image"][7]["bytes"].as_py())).convert("RGB"))
    with torch.inference_mode():
        expected = model.eval().encode_image(image[None])[0].numpy()
    row = items.item_id.tolist().index(some["item_id"][7].as_py())
    np.testing.assert_allclose(items.image_embeds[row], expected, atol=1e-4)
    assert items.clip is not None
    assert len(items.clip) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:/nothing/here", "cannot be loaded"),
        ("ViT-H-14", "names no weights"),
        ("ViT-H-14-quikgelu/openai", "unknown architecture; did you mean 'ViT-H-14-quickgelu'"),
    ],
)
def test_a_clip_that_cannot_be_had_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_clip(name)


def test_a_damaged_clip_directory_is_refused_before_any_actor_starts(tmp_path: Path) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"is damaged \(SafetensorError: .*save it again with open_clip"):
        clip_fingerprint(f"local-dir:{tmp_path / 'clip'}")
    weights.unlink()
    with pytest.raises(UserError, match=r"open_clip_model.safetensors is not in"):
        clip_fingerprint(f"local-dir:{tmp_path / 'clip'}")


def test_repeated_items_are_refused(tmp_path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ones(16, np.float32)), type=schemas.image_embeds(8)
    )
    pq.write_table(pa.table({"item_id": ["a", "a"], "image_embeds": column}), tmp_path / "items.parquet")
    with pytest.raises(UserError, match="1 item_ids are repeated"):
        read_image_embeds(str(tmp_path / "items.parquet"))


def test_an_item_that_is_no_image_is_named_and_the_last_embedding_stays(
    tmp_path: Path, ray_local: str
) -> None:
    """An error in a Ray actor ends the command with its exit code and one line.

    The command runs in another process, which takes its actors with it.
    """
    some = pq.read_table(ITEMS, columns=["item_id", "image"]).slice(0, 3).to_pylist()
    some[1]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(some), tmp_path / "items.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "yesterday.parquet").write_bytes(b"")
    (tmp_path / "out" / "embedding.json").write_text('{"clip": null}')
    (tmp_path / "embed.yaml").write_text(
        f"items: {tmp_path}/items.parquet\nclip: local-dir:{CLIP}\nout: {tmp_path}/out\ncpus_per_actor: 0.5\n"
    )
    command = [Path(sys.executable).parent / "rebeca", "embed", "--config", tmp_path / "embed.yaml"]
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "RAY_ADDRESS": ray_local}
    )
    assert out.returncode == 2
    assert out.stderr.splitlines()[-1].startswith(
        f"error: items {tmp_path}/items.parquet: 1 of 3 images cannot be decoded "
        f"({some[1]['item_id']!r} is no image"
    )
    assert "Traceback" not in out.stdout + out.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "embedding.json",
        "yesterday.parquet",
    ]


def test_an_output_that_holds_the_items_is_refused(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(ITEMS).slice(0, 3), tmp_path / "items.parquet")
    with pytest.raises(UserError, match="holds the items themselves and would be replaced"):
        embed_items(
            EmbedConfig(items=str(tmp_path / "items.parquet"), clip=f"local-dir:{CLIP}", out=str(tmp_path))
        )
    assert (tmp_path / "items.parquet").exists()


def test_an_embedding_that_did_not_finish_is_not_read(tmp_path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float32)), type=schemas.image_embeds(8))
    pq.write_table(pa.table({"item_id": ["a"], "image_embeds": column}), tmp_path / "part.parquet")
    assert read_image_embeds(str(tmp_path)).clip is None
    (tmp_path / "embedding.json").write_text('{"clip": null, "rows": null}')
    with pytest.raises(UserError, match="did not finish; run `rebeca embed` again"):
        read_image_embeds(str(tmp_path))


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(ITEMS).slice(0, 3), tmp_path / "items.parquet")
    (tmp_path / "data" / "catalog").mkdir(parents=True)
    (tmp_path / "data" / "catalog" / "latest.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"holds something else \(no items.json or embedding.json of ours\) and would be replaced",
    ):
        embed_items(
            EmbedConfig(
                items=str(tmp_path / "items.parquet"), clip=f"local-dir:{CLIP}", out=str(tmp_path / "data")
            )
        )
    assert (tmp_path / "data" / "catalog" / "latest.json").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"item_id": ["a"], "image": [b"encoded"]},
            "column 'image' is binary, expected struct<bytes: binary, path: string>",
        ),
        ({"item_id": [1], "image": [{"bytes": b"encoded"}]}, "column 'item_id' is int64, expected string"),
        ({"item_id": ["a"], "picture": [b"encoded"]}, "column 'image' is missing"),
        ({"item_id": ["a"], "image_embeds": [[1.0]]}, "column 'image' is missing; nothing is left to embed"),
    ],
)
def test_items_of_other_types_are_refused(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    with pytest.raises(UserError, match=message):
        embed_items(
            EmbedConfig(
                items=str(tmp_path / "items.parquet"), clip=f"local-dir:{CLIP}", out=str(tmp_path / "out")
            )
        )
    assert not (tmp_path / "out").exists()


def test_embeddings_of_several_sizes_are_refused(tmp_path: Path) -> None:
    """Rows of 4 and 8 would add up to two rows of 6."""
    embeds = pa.array([[1.0] * 4, [1.0] * 8], pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": ["a", "b"], "image_embeds": embeds}), tmp_path / "items.parquet")
    with pytest.raises(
        UserError, match=r"image_embeds has rows of 2 sizes \(\[4, 8\]\); every item needs the same D"
    ):
        read_image_embeds(str(tmp_path / "items.parquet"))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_embeddings_that_have_no_direction_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    embeds = np.ones((4, 8), np.float32)
    embeds[2] = bad
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(8))
    pq.write_table(
        pa.table({"item_id": ["a", "b", "c", "d"], "image_embeds": column}), tmp_path / "items.parquet"
    )
    with pytest.raises(
        UserError, match=r"1 of 4 image_embeds are zero or not finite \(c\); embed those items again"
    ):
        read_image_embeds(str(tmp_path / "items.parquet"))


class World(NamedTuple):
    """An embedding without Ray: `reads` gets the ids and values that a reader sees half-way."""

    config: EmbedConfig
    reads: list[list[str]]
    error: list[BaseException]

    def put(self, *names: str) -> None:
        image = pq.read_table(ITEMS)["image"][0].as_py()
        table = pa.table({"item_id": names, "image": [image] * len(names)}, schema=schemas.ITEMS)
        pq.write_table(table, self.config.items)

    def ids(self) -> list[str]:
        return sorted(read_image_embeds(self.config.out).item_id.tolist())

    def files(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.config.out)) for path in Path(self.config.out).rglob("*.parquet")
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    config = EmbedConfig(
        items=str(tmp_path / "items.parquet"), clip=f"local-dir:{CLIP}", out=str(tmp_path / "out")
    )
    world = World(config, [], [])

    def between() -> None:
        if Path(config.out, "items.json").exists():
            with suppress(InputError):
                world.reads.append(world.ids())
        for error in world.error:
            raise error

    def embed(
        config: EmbedConfig, source: ParquetInput, _: pa.Schema, kept: Kept, folder: str, activity: Activity
    ) -> pa.Table:
        """Write two files, without an image that is bad; `between` runs after the first."""
        table = source.read(pa.schema([("item_id", pa.string())]))
        known = pa.array(kept.item_id, pa.string())
        table = table.filter(pc.invert(pc.is_in(table["item_id"], value_set=known)))
        vector = np.full((table.num_rows, 8), len(config.clip), np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vector.ravel()), type=schemas.image_embeds(8))
        table = table.append_column("image_embeds", column)
        table = table.append_column(ERROR, pa.nulls(table.num_rows, pa.string()))
        write = WriteEmbeds(folder)
        first = write(table.slice(0, 1))
        between()
        return pa.concat_tables([first, write(table.slice(1))])

    monkeypatch.setattr(embedding, "embed_images", embed)
    monkeypatch.setattr(embedding, "clip_fingerprint", lambda *_: "clip")
    return world


def test_new_items_join_the_others_and_no_reader_sees_half(world: World) -> None:
    world.put("a", "b")
    assert embed_items(world.config) == 2
    world.put("a", "b", "c", "d")
    assert embed_items(world.config, only_new=True) == 2
    folders = ["_versions/00000001-clip", "_versions/00000002-clip"]
    assert [os.path.dirname(file) for file in world.files()] == [
        folders[0],
        folders[0],
        folders[1],
        folders[1],
    ]
    assert world.ids() == ["a", "b", "c", "d"]
    assert embed_items(world.config, only_new=True) == 0  # nothing is new, so nothing is published
    assert read_pointer(world.config.out, "items")[0].fencing_token == 3
    assert embed_items(world.config) == 4  # all again: readers of the previous version can finish
    assert world.reads == [["a", "b"], ["a", "b", "c", "d"]]
    assert len(world.files()) == 6
    pinned = read_image_embeds(f"{world.config.out}/{folders[1]}")
    assert sorted(pinned.item_id.tolist()) == ["a", "b", "c", "d"]
    assert pinned.clip == "clip"
    world.put("a", "b", "c", "d", "e", "f")
    assert embed_items(world.config, only_new=True, run_date=datetime.date(2026, 3, 1)) == 2
    assert len(world.files()) == 4  # the all again, and the two new ones
    assert world.ids() == ["a", "b", "c", "d", "e", "f"]
    assert read_pointer(world.config.out, "items")[0].run_date == "2026-03-01"


def test_an_older_layout_is_read_and_extended(world: World) -> None:
    world.put("a", "b", "c")
    out = Path(world.config.out)
    out.mkdir()
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float32)), type=schemas.image_embeds(8))
    pq.write_table(pa.table({"item_id": ["a"], "image_embeds": column}), out / "part.parquet")
    (out / "embedding.json").write_text('{"clip": "clip", "rows": 1}')
    assert world.ids() == ["a"]
    assert embed_items(world.config, only_new=True) == 2
    assert world.reads == [["a"]]
    assert world.ids() == ["a", "b", "c"]
    world.put("a", "b", "c", "d", "e")
    assert embed_items(world.config, only_new=True) == 2
    assert world.ids() == ["a", "b", "c", "d", "e"]
    assert embed_items(world.config) == 5
    assert (out / "part.parquet").exists()  # the previous version lists it
    world.put("a", "b", "c", "d", "e", "f", "g")
    assert embed_items(world.config, only_new=True) == 2
    assert not (out / "part.parquet").exists()
    assert not (out / "embedding.json").exists()
    assert world.ids() == ["a", "b", "c", "d", "e", "f", "g"]


@pytest.mark.parametrize("error", [StorageError("disk full"), KeyboardInterrupt()])
def test_an_embedding_that_fails_leaves_the_items(world: World, error: BaseException) -> None:
    world.put("a", "b")
    embed_items(world.config)
    world.put("a", "b", "c", "d")
    world.error.append(error)
    with pytest.raises(type(error)):
        embed_items(world.config, only_new=True)
    assert world.ids() == ["a", "b"]
    assert len(world.files()) == 2


def test_one_of_two_embeddings_works(world: World) -> None:
    world.put("a", "b")
    with (
        hold_lease(world.config.out, "embed", 1.0, "items"),
        pytest.raises(LeaseHeldError, match="^items .*out: run embed .* is at work on it"),
    ):
        embed_items(world.config)


def test_a_listed_file_that_is_gone_is_named(world: World) -> None:
    world.put("a", "b")
    embed_items(world.config)
    name = world.files()[0]
    Path(world.config.out, name).unlink()
    with pytest.raises(InputError, match=rf"^items .*: file .*{name} is missing; restore it"):
        read_image_embeds(world.config.out)
