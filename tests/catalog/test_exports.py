"""Exports: image objects with URLs, and key-value files in a real Redis.

They run on disk and on a real S3 server.
"""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.exports import image_objects
from rebeca_ray.catalog.exports.iceberg import register_snapshot
from rebeca_ray.catalog.exports.image_objects import export_images, read_export
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.errors import LeaseHeldError, StorageError, UserError
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.local import make_folder, partial_of
from tests.catalog.exported import CDN, objects, urls
from tests.cli.test_commands import run
from tests.conftest import USERS, snapshot_of
from tests.generation.test_failed_and_late import MONDAY, THURSDAY, TUESDAY, WEDNESDAY, on
from tests.generation.test_failed_and_late import night as late_night
from tests.generation.test_nights import change_digest, night


def assert_every_item_has_its_image(snapshot: Snapshot, out: str) -> None:
    """Check that every item of every user has a URL, and that its object is the item's image."""
    items = snapshot.items()
    url_rows = {(row["user_id"], row["item_id"]): row for row in urls(out)}
    stored = objects(out)
    assert len(url_rows) == items.num_rows
    for row, image in zip(items.to_pylist(), snapshot.images(items), strict=True):
        url = url_rows[row["user_id"], row["item_id"]]
        assert url["rank"] == row["rank"]
        assert url["image_key"] == f"objects/{row['item_id'][:2]}/{row['item_id']}.png"
        assert url["image_url"] == f"{CDN}/{url['image_key']}"
        assert stored[url["image_key"]] == image


def test_an_image_object_is_written_once_and_outlives_its_snapshot_by_one_export(
    on_store: GenerateConfig, root: str
) -> None:
    out = f"{root}/cdn"
    _, monday = night(on_store, [*USERS[:4], "cold-start"])
    done = export_images(monday, out, CDN)
    assert (done.written, done.removed, done.urls) == (15, 0, 18)  # a cold-start user shares the pool's three
    assert_every_item_has_its_image(monday, out)
    assert export_images(monday, out, f"{CDN}/").written == 0
    if root.startswith("s3"):
        key = next(iter(objects(out)))
        head = fsspec.filesystem("s3").call_s3(
            "head_object", Bucket="rebeca", Key=f"{out}/{key}".removeprefix("s3://rebeca/")
        )
        assert (head["ContentType"], head["CacheControl"]) == (
            "image/png",
            "public, max-age=31536000, immutable",
        )

    before = objects(out)
    change_digest(on_store, USERS[0])
    _, tuesday = night(on_store, [*USERS[:3], "cold-start"], 1)
    done = export_images(tuesday, out, CDN)
    assert (done.written, done.removed) == (3, 0)
    assert_every_item_has_its_image(tuesday, out)
    assert before.items() <= objects(out).items()  # all that Monday showed keeps its images

    _, wednesday = night(on_store, USERS[:3], 2)
    done = export_images(wednesday, out, CDN)
    assert (done.written, done.removed) == (0, 6)  # of one changed user, and one that left on Tuesday
    assert_every_item_has_its_image(wednesday, out)
    pool = {
        f"objects/{item[:2]}/{item}.png" for item in monday.for_user(POPULATION_USER)["item_id"].to_pylist()
    }
    # The cold-start user has left, and the images of the pool stay.
    assert set(objects(out)) == {row["image_key"] for row in urls(out)} | pool
    assert len(list_files(f"{out}/urls", ".parquet")) == 2
    with (
        hold_lease(out, "export of another", 60),
        pytest.raises(LeaseHeldError, match="export of another .* is at work on it"),
    ):
        export_images(monday, out, CDN)
    assert export_images(wednesday, out, "https://other.example.com").written == 0
    assert {row["image_url"].split("/objects")[0] for row in urls(out)} == {"https://other.example.com"}


def test_a_killed_export_leaves_the_previous_one_visible_and_can_be_repeated(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "cdn")
    _, monday = night(config, USERS[:4])
    export_images(monday, out, CDN)
    change_digest(config, USERS[0])
    _, tuesday = night(config, USERS[:4], 1)
    write = image_objects.write_image
    remaining = iter(range(2))

    def dying(uri: str, image: bytes) -> None:
        if next(remaining, None) is None:
            raise StorageError(f"{uri}: cannot be written (No space left on device)")
        write(uri, image)

    monkeypatch.setattr(image_objects, "write_image", dying)
    with pytest.raises(StorageError):
        export_images(tuesday, out, CDN)
    assert_every_item_has_its_image(monday, out)
    monkeypatch.setattr(image_objects, "write_image", write)
    killed = partial_of(tmp_path / "cdn" / "objects" / "00" / "image.png")
    make_folder(killed.parent)
    killed.write_bytes(b"half")
    os.utime(killed, (0, 0))
    assert export_images(tuesday, out, CDN).written == 3
    assert_every_item_has_its_image(tuesday, out)
    assert not killed.exists()
    other = config.model_copy(update={"catalog": str(tmp_path / "another-catalog")})
    night(other, USERS[:1])
    with pytest.raises(
        UserError, match=r"holds something else \(images\) than an export of images; choose another folder"
    ):
        export_images(tuesday, other.catalog, CDN)


def test_a_user_who_keeps_an_earlier_pool_has_its_images(config: GenerateConfig, tmp_path: Path) -> None:
    """Two cold-start users share a bucket without the pool. Then each gets a prompt, and time runs out.

    They keep items that no pool has any more.
    """
    layout = LayoutSettings(num_buckets=2)
    names = [
        name
        for name in (f"cold-start-{number}" for number in range(20))
        if bucket_of(name, 2) != bucket_of(POPULATION_USER, 2)
    ][:2]
    request, out = tmp_path / "cold-start.parquet", str(tmp_path / "cdn")
    config = config.model_copy(update={"request": str(request), "layout": layout})
    pq.write_table(pa.table({"user_id": names}), request)
    snapshot_of(on(MONDAY, config))
    assert export_images(read_catalog(config.catalog), out, CDN).written == 3
    before = urls(out)
    pq.write_table(pa.table({"user_id": names, "prompt": ["a cat", "a dog"]}), request)
    for day in (TUESDAY, WEDNESDAY, THURSDAY):
        manifest, _ = late_night(on(day, config), shards=0)
        assert manifest.counts.requested == 6
        done = export_images(read_catalog(config.catalog), out, CDN)
        assert (done.urls, done.written, done.removed) == (6, 0, 0)
        assert_every_item_has_its_image(read_catalog(config.catalog), out)
    assert [row["image_key"] for row in urls(out)] == [
        row["image_key"] for row in before if row["user_id"] != POPULATION_USER
    ]


def test_a_pool_that_was_never_exported_stays_while_a_user_has_it(
    config: GenerateConfig, tmp_path: Path
) -> None:
    """Two cold-start users of two buckets get a prompt, but time runs out, and they keep the pool.

    Then one of them leaves.
    """
    names = [
        next(name for name in map(str, range(20)) if bucket_of(name, 2) == bucket) for bucket in range(2)
    ]
    request, out = tmp_path / "cold-start.parquet", str(tmp_path / "cdn")
    config = config.model_copy(update={"request": str(request), "layout": LayoutSettings(num_buckets=2)})
    pq.write_table(pa.table({"user_id": names}), request)
    snapshot_of(on(MONDAY, config))
    for day, users in ((TUESDAY, names), (WEDNESDAY, names[1:]), (THURSDAY, names[1:])):
        pq.write_table(pa.table({"user_id": users, "prompt": ["a cat"] * len(users)}), request)
        manifest, _ = late_night(on(day, config), shards=0)
        assert manifest.counts.requested == 3 * len(users)
        assert export_images(read_catalog(config.catalog), out, CDN).removed == 0
        assert_every_item_has_its_image(read_catalog(config.catalog), out)
    Path(out, read_export(out).files[0]).unlink()  # type: ignore[union-attr]
    export_images(read_catalog(config.catalog), out, CDN)  # of the same run again, because a table is lost
    assert_every_item_has_its_image(read_catalog(config.catalog), out)


def test_a_lost_table_of_urls_is_written_again_and_nothing_is_removed(
    config: GenerateConfig, tmp_path: Path
) -> None:
    out = str(tmp_path / "cdn")
    for number, users in enumerate((USERS[:4], USERS[:3])):
        _, snapshot = night(config, users, number)
        export_images(snapshot, out, CDN)
    before, export = objects(out), read_export(out)
    assert export is not None
    for path in export.files:
        (tmp_path / "cdn" / path).unlink()
    _, snapshot = night(config, USERS[:3], 2)
    done = export_images(snapshot, out, CDN)
    assert (done.written, done.removed) == (9, 0)
    assert_every_item_has_its_image(snapshot, out)
    assert objects(out) == before
    for key in before:
        (tmp_path / "cdn" / key).unlink()
    assert export_images(snapshot, out, CDN).written == 0  # the tables say that the objects exist
    (tmp_path / "cdn" / "latest.json").unlink()
    assert export_images(snapshot, out, CDN).written == 9
    assert_every_item_has_its_image(snapshot, out)


def test_a_refused_export_writes_nothing(config: GenerateConfig, tmp_path: Path) -> None:
    _, monday = night(config, USERS[:2])
    before = list_files(config.catalog)
    for out in (config.catalog, f"{config.catalog}/cdn"):
        with pytest.raises(
            UserError, match=r"is in the catalog .*, whose files are nobody else's; choose another folder"
        ):
            export_images(monday, out, CDN)
        with pytest.raises(UserError, match=r"is in the catalog .*; choose another folder"):
            export_key_values(monday, out, "jsonl")
    inside = f"file://{config.catalog}/warehouse"
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": inside}
    with pytest.raises(UserError, match=r"warehouse .* is in the catalog .*; choose another folder"):
        register_snapshot(monday, **database)
    with pytest.raises(UserError, match="namespace '': has an empty part; give one such as rebeca"):
        register_snapshot(monday, **database | {"warehouse": f"{tmp_path}/warehouse"}, namespace="")
    for url_base in ("cdn.example.com", "", "ftp:", "https://", "https://cdn.example.com/a b"):
        with pytest.raises(
            UserError, match=f"url_base '{url_base}': is no URL; give one such as https://cdn.example.com"
        ):
            export_images(monday, str(tmp_path / "cdn"), url_base)
    file = tmp_path / "file"
    file.write_text("in the way")
    for out, reason in (("", "is empty"), (" ", "is empty"), (str(file), "is a file; give a folder")):
        name = f"out {out}" if out == str(file) else "out"
        with pytest.raises(UserError, match=f"^{name}: {reason}"):
            export_images(monday, out, CDN)
        with pytest.raises(UserError, match=reason):
            export_key_values(monday, out, "jsonl")
    with pytest.raises(
        UserError,
        match=r"out .*: holds something else \(.*\) than an export of images; choose another folder",
    ):
        export_images(monday, str(tmp_path), CDN)
    assert list_files(config.catalog) == before
    assert not (tmp_path / "cdn").exists()


def test_many_buckets_are_exported_in_parallel(
    config: GenerateConfig, tmp_path: Path, ray_local: str
) -> None:
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=3)})
    users = [*USERS[:5], "cold-start", "passer-by", "guest"]
    _, monday = night(config, users)
    out = str(tmp_path / "cdn")
    assert export_images(monday, out, CDN).written == 18
    assert_every_item_has_its_image(monday, out)
    for number in (1, 2, 3):
        change_digest(config, USERS[number])
        _, later = night(config, users[:-number], number)
        export_images(later, out, CDN)
        assert_every_item_has_its_image(later, out)
    done = export_key_values(later, str(tmp_path / "kv"), "jsonl")
    assert done.users == 5
    done = export_key_values(later, str(tmp_path / "kv"), "jsonl", since=monday.run_id)
    assert done.users >= 3
    assert done.removed == 4  # the three cold-start users, and the pool with them


def test_the_commands_report_their_results(config: GenerateConfig, tmp_path: Path) -> None:
    _, monday = night(config, USERS[:2])
    result = run("catalog", "export", "images", config.catalog, str(tmp_path / "cdn"), "--url-base", CDN)
    assert result.returncode == 0, result.stderr
    assert (
        f"run {monday.run_id} -> {tmp_path}/cdn: 6 images written, 0 removed, 6 rows of URLs in 1 files"
        in result.stdout
    )
    result = run("catalog", "export", "key-values", config.catalog, str(tmp_path / "kv"), "--format", "redis")
    assert (
        f"2 users to set, 0 to remove -> 1 files in {tmp_path}/kv/redis/run_id={monday.run_id}"
        in result.stdout
    )
    database = f"sqlite:///{tmp_path}/iceberg.db"
    result = run(
        "catalog",
        "export",
        "iceberg",
        config.catalog,
        "--catalog",
        database,
        "--warehouse",
        f"file://{tmp_path}/warehouse",
    )
    assert f"rebeca.items: run {monday.run_id}, 1 files added, 0 dropped" in result.stdout
    result = run("catalog", "export", "key-values", str(tmp_path), str(tmp_path / "kv"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nothing is published there" in result.stderr
