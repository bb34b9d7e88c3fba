"""Verification finds every kind of damage, at the promised level."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import spread, stored_images, verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.storage.parquet import write_table
from tests.conftest import USERS
from tests.generation.test_nights import night


@pytest.fixture
def snapshot(config: GenerateConfig) -> Snapshot:
    return night(config, [*USERS[:3], "cold-start"])[1]


def path_of(snapshot: Snapshot, table: str) -> Path:
    return Path(snapshot.root, snapshot.paths(table)[0])


def listed_again(snapshot: Snapshot, table: str) -> Snapshot:
    """Return the snapshot with a changed file in its list: its bytes match the list, its content is wrong."""
    import hashlib

    data = path_of(snapshot, table).read_bytes()
    changes = {
        "rows": pq.read_metadata(path_of(snapshot, table)).num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    rows = [{**row, **changes} if row["table"] == table else row for row in snapshot.files.to_pylist()]
    return Snapshot(
        root=snapshot.root,
        path=snapshot.path,
        manifest=snapshot.manifest,
        files=pa.Table.from_pylist(rows, schema=snapshot.files.schema),
    )


def test_a_sound_snapshot_passes_every_level(snapshot: Snapshot) -> None:
    assert [verify(snapshot, level) for level in ("metadata", "sample", "full")] == [[], [], []]


def test_the_metadata_level_finds_a_missing_and_a_short_file(snapshot: Snapshot) -> None:
    path_of(snapshot, "users").write_bytes(b"short")
    path_of(snapshot, "images").unlink()
    damage = sorted(verify(snapshot, "metadata"))
    assert damage[0].endswith(".parquet: is missing")
    assert "has 5 bytes, the file list says" in damage[1]


def test_the_metadata_level_finds_a_manifest_that_does_not_add_up(snapshot: Snapshot) -> None:
    file = Path(snapshot.root, snapshot.path, "manifest.json")
    manifest = json.loads(file.read_text())
    manifest["counts"]["new"] += 1
    file.write_text(json.dumps(manifest))
    assert verify(read_catalog(snapshot.root), "metadata") == [
        "manifest: 12 items requested, but 13 accounted for",
        "items: 12 rows are listed, the manifest counts 13",
    ]


def test_the_hash_reveals_a_flipped_byte(snapshot: Snapshot) -> None:
    path = path_of(snapshot, "images")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify(snapshot, "metadata") == []
    assert "its sha256 is not the one in the file list" in verify(snapshot, "sample")[0]


def test_the_full_level_finds_unsorted_repeated_and_dangling_items(snapshot: Snapshot) -> None:
    items = pq.read_table(path_of(snapshot, "items"))
    wrong = {
        "is not sorted by user and rank": items.take([1, 0, *range(2, items.num_rows)]),
        "a user's ranks have a gap": items.set_column(
            2, items.schema.field(2), pc.multiply(items["rank"], pa.scalar(2, pa.int16()))
        ),
        "a user has an item twice": items.set_column(
            0, items.schema.field(0), pa.array([items["item_id"][0].as_py()] * items.num_rows)
        ),
        "points to row 99 of image file 0, which is not listed": items.set_column(
            11, items.schema.field(11), pa.array([99] * items.num_rows, pa.int32())
        ),
    }
    for message, table in wrong.items():
        write_table(table, str(path_of(snapshot, "items")), row_group_size=2000, embed_column="image_embeds")
        assert any(message in line for line in verify(listed_again(snapshot, "items"), "full")), message


def test_the_full_level_finds_an_image_of_another_item_and_a_damaged_image(snapshot: Snapshot) -> None:
    images = pq.read_table(path_of(snapshot, "images"))
    write_table(
        images.take(list(reversed(range(images.num_rows)))),
        str(path_of(snapshot, "images")),
        row_group_size=100,
    )
    assert any(
        "holds another item's image" in line for line in verify(listed_again(snapshot, "images"), "full")
    )
    rows = images.to_pylist()
    rows[0]["image"]["bytes"] = b"no image"
    write_table(
        pa.Table.from_pylist(rows, schema=images.schema), str(path_of(snapshot, "images")), row_group_size=100
    )
    damage = verify(listed_again(snapshot, "images"), "full")
    assert [f"the image of {rows[0]['item_id']} cannot be decoded" in line for line in damage] == [True]


def test_images_of_a_long_file_come_in_order_without_those_that_failed(tmp_path: Path) -> None:
    """250 rows are three batches. Every fifth row has no image."""
    images = [
        {"item_id": str(row), "seed": row, "image": {"bytes": b"x", "path": "x.png"} if row % 5 else None}
        for row in range(250)
    ]
    write_table(
        pa.Table.from_pylist(images, schema=schemas.IMAGES), f"{tmp_path}/long.parquet", row_group_size=40
    )
    every = [image["item_id"] for image in stored_images(str(tmp_path), "long.parquet", "full")]
    assert every == [str(row) for row in range(250) if row % 5]
    sample = [image["item_id"] for image in stored_images(str(tmp_path), "long.parquet", "sample")]
    assert sample == spread(every, "sample")
    assert len(sample) == 20
