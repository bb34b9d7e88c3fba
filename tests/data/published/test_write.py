"""Writing an imported data set: missing images, row groups, and nothing that is visible by half."""

import os
import tracemalloc
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from rebeca_ray import schemas
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.data.published.csv_ratings import read_csv_ratings
from rebeca_ray.data.published.dataset import IMAGES_PER_GROUP, PublishedData, image_table
from rebeca_ray.data.published.flickr_aes import read_flickr_aes
from rebeca_ray.data.published.lapis import read_lapis
from rebeca_ray.data.published.write import GROUPS_PER_FILE, write_published
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import CLIP, EMBED_DIM, ITEMS
from rebeca_ray.storage.filesystem import list_files
from tests.data.published import trees
from tests.data.published.test_layouts import refused
from tests.data.published.trees import images_of, rows_of, write_flickr, write_images, write_lapis


def many(number: int, size: int = 10) -> PublishedData:
    """Return a data set of one user and many images of the same bytes."""
    items = [f"{index:06d}" for index in range(number)]

    def read_images(chosen: Collection[str]) -> Iterator[pa.Table]:
        ordered = sorted(chosen)
        for start in range(0, len(ordered), IMAGES_PER_GROUP):
            group = ordered[start : start + IMAGES_PER_GROUP]
            yield image_table(group, [bytes(size)] * len(group), group)

    ratings = pa.table({"user_id": ["u"] * number, "item_id": items, "rating": [5.0] * number})
    return PublishedData(
        name="many",
        source="memory",
        ratings={"interactions": ratings},
        available=frozenset(items),
        read_images=read_images,
    )


def test_a_missing_image_is_an_error_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = write_flickr(tmp_path / "flickr", images=["b.jpg"]), str(tmp_path / "out")
    data = read_flickr_aes(source)
    refused(
        lambda: write_published(data, out),
        f"FLICKR-AES {source}: 1 of 2 rated images are missing ('a.jpg'); expected every rated image; ",
        "leave out their 2 ratings with --allow-missing",
    )
    assert not (tmp_path / "out").exists()
    written = write_published(data, out, allow_missing=True)
    assert (written.ratings, written.users, written.items) == ({"interactions": 1}, 1, 1)
    assert rows_of(tmp_path / "out") == [("A1", "b.jpg", 2.0)]
    assert "1 of 2 rated images are missing ('a.jpg'); their 2 ratings are left out" in caplog.text


def test_without_any_image_nothing_is_imported(tmp_path: Path) -> None:
    data = replace(many(7), available=frozenset())
    refused(
        lambda: write_published(data, str(tmp_path / "out")),
        "7 of 7 rated images are missing ('000000', '000001', '000002', '000003', '000004', …)",
    )
    refused(
        lambda: write_published(data, str(tmp_path / "out"), allow_missing=True),
        "no rating is left for training (none)",
    )


def test_row_groups_hold_a_hundred_images_and_files_ten_thousand(tmp_path: Path) -> None:
    number = IMAGES_PER_GROUP * GROUPS_PER_FILE + 150
    write_published(many(number), str(tmp_path / "out"))
    parts = sorted((tmp_path / "out" / "items").iterdir())
    assert [part.name for part in parts] == ["part-00000.parquet", "part-00001.parquet"]
    groups = [
        [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        for metadata in map(pq.read_metadata, parts)
    ]
    assert groups == [[100] * 100, [100, 50]]
    assert pq.read_schema(parts[0]).equals(schemas.ITEMS)


def test_memory_holds_few_row_groups(tmp_path: Path) -> None:
    size, number = 10_000, 2_000
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    peak = 0

    def watched(chosen: Collection[str]) -> Iterator[pa.Table]:
        nonlocal peak
        for table in many(number, size).read_images(chosen):
            peak = max(peak, pool.bytes_allocated() - before)
            yield table

    write_published(replace(many(number, size), read_images=watched), str(tmp_path / "out"))
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + python_peak < number * size / 2  # 20 MB of images


def test_an_error_or_a_changed_source_leaves_nothing(tmp_path: Path) -> None:
    data, out = many(250), str(tmp_path / "new" / "out")

    def broken(chosen: Collection[str]) -> Iterator[pa.Table]:
        tables = data.read_images(chosen)
        yield next(tables)
        assert not (tmp_path / "new" / "out").exists()
        raise InputError("image 100: gone; expected bytes; restore it")

    refused(lambda: write_published(replace(data, read_images=broken), out), "image 100: gone")

    def short(chosen: Collection[str]) -> Iterator[pa.Table]:
        yield next(data.read_images(chosen))

    refused(
        lambda: write_published(replace(data, read_images=short), out),
        "100 images were read, 250 expected; it was changed meanwhile; run again",
    )
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_published(many(2), str(tmp_path / "out"))
    refused(lambda: write_published(many(2), str(tmp_path / "out")), "out ", "holds interactions.parquet")


def test_ids_that_no_stage_takes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("user_id,item_id,rating\na\tb,1,5\n")
    write_images(tmp_path / "images", ["1.jpg"])
    data = read_csv_ratings(str(tmp_path / "r.csv"), str(tmp_path / "images"))
    with pytest.raises(InputError, match="a control character in user_id"):
        write_published(data, str(tmp_path / "out"))


def test_an_object_store_as_source_and_target(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    root = f"rebeca/published-{os.urandom(4).hex()}"
    S3FileSystem(skip_instance_cache=True).put(
        write_lapis(tmp_path / "lapis"), f"{root}/lapis", recursive=True
    )
    out = f"s3://{root}/imported"
    write_published(read_lapis(f"s3://{root}/lapis"), out)
    assert rows_of(out) == [("7", "a.jpg", 88.5)]
    names = ["interactions", "items/part-00000", "test", "validation"]
    assert list_files(out) == [f"{out}/{name}.parquet" for name in names]
    refused(lambda: write_published(many(2), out), "holds interactions.parquet")


@pytest.mark.usefixtures("ray_local")
def test_imported_items_are_embedded_and_imported_ratings_are_trained_on(tmp_path: Path) -> None:
    stickers = pq.read_table(ITEMS).slice(0, 4).to_pylist()
    photos = {f"{row['item_id']}.webp": row["image"]["bytes"] for row in stickers}
    lines = [f"{worker},{photo},{score}" for worker, score in (("A", 5), ("B", 2)) for photo in photos]
    write_images(tmp_path / "40K", photos, photos)
    (tmp_path / trees.FLICKR_CSV).write_text("\n".join(["worker, imagePair, score", *lines, ""]))
    out = tmp_path / "out"
    write_published(read_flickr_aes(str(tmp_path)), str(out))
    assert {item: data for item, (data, _) in images_of(out).items()} == photos
    config = EmbedConfig(
        items=f"{out}/items",
        clip=f"local-dir:{CLIP}",
        out=f"{out}/embedded",
        batch_size=4,
        cpus_per_actor=0.5,
    )
    assert embed_items(config) == 4
    items = read_image_embeds(config.out)
    assert sorted(items.item_id.tolist()) == sorted(photos)
    assert items.image_embeds.shape == (4, EMBED_DIM)
    settings = InteractionSettings(path=f"{out}/interactions.parquet", min_likes=0, hold_out=0.0)
    interactions = read_interactions(settings)
    assert interactions.user_id.tolist() == ["A", "B"]
    assert interactions.like.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert build_histories(settings, items.item_id, str(tmp_path / "storage")).num_users == 2
