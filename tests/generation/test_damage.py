"""Damaged files: an unfinished run makes its work again, and a published file costs its users alone."""

import datetime
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.generation import render
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.render import Rendered
from rebeca_ray.generation.repair import previous
from rebeca_ray.identity import bucket_of
from tests.conftest import NO_GATE, USERS, assembled, prepare, publish, snapshot_of
from tests.generation.light_render import PlainDecoder
from tests.generation.test_plan import write_histories, write_history_prior

MONDAY = datetime.date(2026, 3, 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_pages(path: Path, column: str) -> None:
    """Flip a bit of a column's values, which a reader of other columns does not notice."""
    group = pq.read_metadata(path).row_group(0)
    chunk = next(
        group.column(number)
        for number in range(group.num_columns)
        if group.column(number).path_in_schema.startswith(column)
    )
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b'{"parts": [], "files": [7]}'),
}


class Killed(BaseException):
    """Ends a run as a kill does: no handler of the package catches it."""


def by_user(snapshot: Snapshot) -> dict[str, list[tuple[str, int, str]]]:
    rows = snapshot.items(["user_id", "item_id", "rank", "origin"]).to_pylist()
    users: dict[str, list[tuple[str, int, str]]] = {}
    for row in rows:
        users.setdefault(row["user_id"], []).append((row["item_id"], row["rank"], row["origin"]))
    return users


def ids_by_user(snapshot: Snapshot) -> dict[str, list[str]]:
    return {user: [item for item, _, _ in items] for user, items in by_user(snapshot).items()}


@pytest.fixture
def plain_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plain images: a hundred nights load no weights, and nobody looks at their images."""
    monkeypatch.setattr(render, "build_decoder", lambda _: PlainDecoder())


@pytest.fixture
def half_done(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_decoder: None
) -> GenerateConfig:
    """The config of a run that was killed with one shard of two rendered, and half of the other."""
    ratings = write_histories(tmp_path, user_0=[(1, 5.0), (2, 1.0)], user_1=[(3, 4.0), (4, 2.0)])
    pq.write_table(pa.table({"user_id": [*USERS[:2], "nobody"]}), config.request)
    config = config.model_copy(
        update={
            "prior": write_history_prior(tmp_path, "history"),
            "interactions": ratings,
            "run_date": MONDAY,
            "gate": NO_GATE,
            "layout": LayoutSettings(num_buckets=2, items_per_shard=5, images_per_file=2),
            "decoder": config.decoder.model_copy(update={"batch_size": 2}),
        }
    )
    calls = 0
    whole = PlainDecoder.decode

    def decode(self: PlainDecoder, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Killed
        return whole(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(PlainDecoder, "decode", decode)
        with pytest.raises(Killed):
            generate_catalog(config, in_process=True)
    return config


def test_any_damaged_work_file_of_an_unfinished_run_is_made_again(
    half_done: GenerateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each work and image file in turn is damaged, a kind in two ways or more: the items are the same."""
    root, copy = Path(half_done.catalog), tmp_path / "copy"
    shutil.move(root, copy)

    def resumed() -> dict[str, list[tuple[str, int, str]]]:
        generate_catalog(half_done, in_process=True)
        snapshot = read_catalog(half_done.catalog)
        assert verify(snapshot, "full") == []
        items = by_user(snapshot)
        shutil.rmtree(root)
        return items

    shutil.copytree(copy, root)
    expected = resumed()
    assert sum(map(len, expected.values())) == 12
    files = sorted(
        path.relative_to(copy)
        for folder in ("work", "images")
        for path in (copy / folder).rglob("*")
        if path.is_file()
    )
    kinds = defaultdict[str, list[Path]](list)
    for file in files:
        kinds[str(file).split("/")[2].split("-")[0]].append(file)
    assert {*kinds} == {
        "decisions", "decisions.json", "plan", "plan.json", "records", "shards", "run.json", "request",
        "histories", *{str(file).split("/")[2] for file in files if file.parts[0] == "images"},
    }  # fmt: skip
    for kind, alike in enumerate(kinds.values()):
        for number in range(max(len(alike), 2)):
            damage, file = list(DAMAGES)[(kind + number) % len(DAMAGES)], alike[number % len(alike)]
            shutil.copytree(copy, root)
            DAMAGES[damage](root / file)
            assert resumed() == expected, (damage, file)


def test_a_damaged_record_of_a_resumed_run_is_written_again(half_done: GenerateConfig) -> None:
    """Without a record, garbage collection would leave the run's files for ever."""
    (record,) = Path(half_done.catalog, "runs").iterdir()
    before = record.read_bytes()
    record.write_bytes(before[:-9])
    generate_catalog(half_done, in_process=True)
    assert record.read_bytes() == before


@pytest.fixture
def two_buckets(config: GenerateConfig, plain_decoder: None) -> GenerateConfig:
    """The config of a catalog of two nights with two buckets, the pool among them."""
    pq.write_table(pa.table({"user_id": [*USERS, "nobody"]}), config.request)
    layout = LayoutSettings(num_buckets=2, images_per_file=4)
    config = config.model_copy(update={"layout": layout, "num_images": 2, "run_date": MONDAY})
    for day in range(2):
        snapshot_of(config.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=day)}))
    return config.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=2)})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_any_damaged_published_file_costs_the_users_with_items_in_it(
    two_buckets: GenerateConfig, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, copy = Path(two_buckets.catalog), tmp_path / "copy"
    before = read_catalog(two_buckets.catalog)
    expected = ids_by_user(before)
    users = before.table("users")["user_id"].to_pylist()
    shutil.copytree(root, copy)
    for row in before.files.to_pylist():
        if row["table"] in ("errors", "changes"):
            continue  # no later snapshot holds them
        shutil.rmtree(root)
        shutil.copytree(copy, root)
        DAMAGES[damage](root / row["path"])
        assert any(row["path"] in line for line in verify(read_catalog(str(root)), "full"))
        caplog.clear()
        manifest = snapshot_of(two_buckets)
        snapshot = read_catalog(str(root))
        assert verify(snapshot, "full") == []
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1, caplog.messages
        assert row["path"] in warnings[0].getMessage()
        assert "planned again" in warnings[0].getMessage()
        items = by_user(snapshot)
        assert ids_by_user(snapshot) == expected
        # Users of the other bucket keep their items, but for those who share the pool.
        here = {user for user in users if bucket_of(user, before.num_buckets) == row["bucket"]}
        new = {user for user, kept in items.items() if any(origin == "new" for _, _, origin in kept)}
        assert new <= here
        assert new or manifest.counts.population


def test_damage_of_a_shared_image_that_one_bucket_finds_is_known_to_all(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a bucket with a cold-start user hashes the images of the population pool, which is in another."""
    pool_bucket = bucket_of(POPULATION_USER, 2)
    cold = next(name for name in map("nobody-{}".format, range(99)) if bucket_of(name, 2) != pool_bucket)
    pq.write_table(pa.table({"user_id": [*USERS, cold]}), config.request)
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=2), "run_date": MONDAY})
    snapshot_of(config)
    before = read_catalog(config.catalog)
    file = before.for_user(POPULATION_USER)["image_file"][0].as_py()
    flip_pages(Path(config.catalog, before.image_files[file][0]), "image.bytes")

    def read(context: RunContext, bucket: int, requested: Set[str], known: previous.Damage) -> Any:
        monkeypatch.setattr(previous, "HASHED_BYTES", 0 if bucket == pool_bucket else 2**24)
        return previous.read_previous(context, bucket, requested, known)

    monkeypatch.setattr("rebeca_ray.generation.decide.read_previous", read)
    snapshot_of(config.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=1)}))
    snapshot = read_catalog(config.catalog)
    assert verify(snapshot, "full") == []
    assert ids_by_user(snapshot) == ids_by_user(before)


@pytest.mark.parametrize("table", ["items", "images"])
def test_damage_that_only_assembling_meets_costs_its_users_too(
    two_buckets: GenerateConfig,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No file of this night is hashed in advance; most users are planned anew, so files are compacted."""
    monkeypatch.setattr(previous, "HASHED_BYTES", 0)
    monkeypatch.setattr("rebeca_ray.generation.compact.MIN_LIVE", 1.1)
    before = read_catalog(two_buckets.catalog)
    first, second, *_ = (user for user in USERS if bucket_of(user, 2) == 0)
    file = before.items(["image_file"], [second])["image_file"][-1].as_py()
    rows = [row for row in before.files.to_pylist() if row["table"] == table and row["bucket"] == 0]
    row = next(row for row in rows if table == "items" or row["file"] == file)
    counts = pa.array([1 if user == first else 2 for user in USERS], pa.int32())
    pq.write_table(pa.table({"user_id": USERS, "num_images": counts}), two_buckets.request)
    flip_pages(Path(two_buckets.catalog, row["path"]), "image_embeds" if table == "items" else "image.bytes")
    manifest = snapshot_of(two_buckets)
    snapshot = read_catalog(two_buckets.catalog)
    assert f"{row['path']}: its sha256 is not the recorded one; this run makes its items again" in caplog.text
    assert verify(snapshot, "full") == []
    assert manifest.counts.requested == 2 * len(USERS) - 1
    assert row["path"] not in snapshot.files["path"].to_pylist()


def test_one_damaged_manifest_of_an_old_snapshot_stops_no_night(
    two_buckets: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    old, *_ = sorted(Path(two_buckets.catalog).glob("snapshots/*/*/manifest.json"))
    truncate(old)
    assert snapshot_of(two_buckets).counts.carried == 14
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_users_whose_items_are_lost_are_planned_again_on_a_later_night_when_time_runs_out(
    two_buckets: GenerateConfig,
) -> None:
    """Without time to render, they go without those items. The snapshot does without the file at once."""
    before = read_catalog(two_buckets.catalog)
    first = next(user for user in USERS if bucket_of(user, 2) == 0)
    file = before.items(["image_file"], [first])["image_file"][0].as_py()
    (row,) = (row for row in before.files.to_pylist() if row["table"] == "images" and row["file"] == file)
    Path(two_buckets.catalog, row["path"]).unlink()
    prepared = prepare(two_buckets)
    manifest = assembled(two_buckets, prepared._replace(rendered=Rendered(files=[], timed_out=True)))
    publish(two_buckets.catalog, prepared.run)
    snapshot = read_catalog(two_buckets.catalog)
    assert verify(snapshot, "full") == []
    assert row["path"] not in snapshot.files["path"].to_pylist()
    counts = manifest.counts
    assert 0 < counts.deferred < counts.requested == counts.carried + counts.population + counts.deferred
    later = snapshot_of(two_buckets.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=3)}))
    assert later.counts.requested == 16
    assert (later.counts.deferred, later.counts.filtered) == (0, 0)
    now = ids_by_user(read_catalog(two_buckets.catalog))
    assert {user: len(items) for user, items in now.items()} == dict.fromkeys(ids_by_user(before), 2)
