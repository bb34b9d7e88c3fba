"""Erasure: nothing of a person stays in the catalog and its exports, and nothing of anybody else goes."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

from rebeca_ray import schemas
from rebeca_ray.catalog import lease, read
from rebeca_ray.catalog.erasure.receipts import read_receipts, receipt_uri
from rebeca_ray.catalog.erasure.rewriting import Rewriting
from rebeca_ray.catalog.erasure.tombstones import KEY, read_tombstones
from rebeca_ray.catalog.exports.iceberg import open_iceberg
from rebeca_ray.catalog.exports.image_objects import read_export
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import Snapshot, open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.catalog.verify import verify
from rebeca_ray.cli.commands import app
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.sections import InteractionSettings, LayoutSettings, SelectionSettings
from rebeca_ray.data.histories import AddBucket, build_histories
from rebeca_ray.errors import InputError, LeaseHeldError
from rebeca_ray.forget import Erased, Iceberg, Places, find_traces, forget
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.identity import bucket_of
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.storage.filesystem import list_files, open_filesystem
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.watchdog import Activity
from tests.catalog.exported import objects, urls
from tests.conftest import D
from tests.faults.disk import Counter, FailingDisk, Killed, watched
from tests.faults.outage import is_on_a_server
from tests.faults.world import Drawn, World, export_all, in_this_process, write_inputs
from tests.generation.test_sharing import owners

ANN, BEN, STRANGER = "user-2", "user-3", "stranger"
SECRET = "a secret of sixteen characters or more"
KILLS = 7  # of the operations of an erasure, evenly spread


@dataclass(frozen=True)
class Person:
    """Everything of a person that must not stay: id, items and images."""

    user_id: str
    item_ids: set[str]
    images: set[bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> World:
    """Make two nights with their exports, a rated item of two users, and a run that was killed."""
    folder = tmp_path_factory.mktemp("forget")
    (folder / "inputs").mkdir()
    world = World(root=str(folder / "world"), inputs=write_inputs(folder / "inputs", tiny_decoder))
    Path(world.root).mkdir()
    with in_this_process(Drawn()):
        for number in range(2):
            generate_catalog(world.night(number), in_process=True)
            export_all(world)
        rated = read_catalog(world.catalog).items(["item_id", "image_embeds"], [ANN, BEN])
        rated = rated.cast(schemas.embedded_items(D))
        write_table(rated, f"{world.catalog}/rated/clip-{D}/part-0.parquet", row_group_size=10)
        with suppress(Killed), watched(world.root, FailingDisk("killed before", 90)):
            generate_catalog(world.night(2), in_process=True)
    assert list(Path(world.catalog, "work").iterdir())
    shutil.copytree(world.root, folder / "kept")
    return world


@pytest.fixture
def world(made: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv(KEY, SECRET)
    with in_this_process(Drawn()):
        yield restored(made)


def restored(world: World) -> World:
    """Return the world as it was made, at the same root: Iceberg keeps absolute paths."""
    shutil.rmtree(world.root, ignore_errors=True)
    shutil.copytree(Path(world.root).parent / "kept", world.root)
    return world


def places_of(world: World) -> Places:
    tables = Iceberg(f"sqlite:///{world.out('iceberg.db')}", world.out("warehouse"))
    return Places(folders=[world.out("images"), world.out("values")], iceberg=tables)


def erase(world: World, *users: str, dry_run: bool = False) -> Erased:
    return forget(world.catalog, users or [ANN], places_of(world), dry_run=dry_run)


def person_of(world: World, user: str) -> Person:
    """Collect what all snapshots hold of a person whose items nobody shares."""
    item_ids, images = set[str](), set[bytes]()
    for manifest in list_snapshots(world.catalog):
        snapshot = open_snapshot(world.catalog, manifest.path)
        items = snapshot.items(user_ids=[user])
        item_ids.update(items["item_id"].to_pylist())
        images.update(snapshot.images(items))
    assert len(item_ids) == len(images) > 0
    return Person(user, item_ids, images)


def traces_of(person: Person, root: str) -> list[str]:
    """Return the files below a root whose name, bytes or decompressed tables hold anything of a person."""
    needles = [person.user_id.encode(), *(item.encode() for item in person.item_ids), *person.images]
    hits = []
    for uri in list_files(root):
        filesystem, path = open_filesystem(uri)
        data = uri.removeprefix(root).encode() + filesystem.cat_file(path)
        if ".parquet" in uri and data.endswith(b"PAR1"):
            file = pq.ParquetFile(BytesIO(filesystem.cat_file(path)))
            data += repr(file.metadata.to_dict()).encode() + repr(file.read().to_pylist()).encode()
            data += b"".join(image["bytes"] for image in images_in(file.read()))
        if any(needle in data for needle in needles):
            hits.append(uri.removeprefix(root))
    return hits


def images_in(table: pa.Table) -> list[dict[str, bytes]]:
    return table["image"].drop_null().to_pylist() if "image" in table.column_names else []


def others(snapshot: Snapshot) -> list[dict[str, object]]:
    """Return items and images of everybody but ANN, without the locations."""
    items = snapshot.items()
    items = items.filter(pc.not_equal(items["user_id"], ANN))
    images = snapshot.images(items)
    rows = items.drop_columns(["image_file", "image_row"]).to_pylist()
    return [{**row, "image": image} for row, image in zip(rows, images, strict=True)]


def test_nothing_of_a_person_stays_and_nothing_of_others_goes(world: World) -> None:
    ann, before = person_of(world, ANN), [others(snapshot) for snapshot in snapshots_of(world)]
    counts = [snapshot.manifest.counts for snapshot in snapshots_of(world)]
    keys_of_others = {row["image_key"] for row in urls(world.out("images")) if row["user_id"] != ANN}
    avro = set(list_files(world.out("warehouse"), ".avro"))
    assert len(traces_of(ann, world.root)) > 10
    erased = erase(world)
    assert traces_of(ann, world.root) == []
    assert [others(snapshot) for snapshot in snapshots_of(world)] == before
    for snapshot, old in zip(snapshots_of(world), counts, strict=True):
        assert verify(snapshot, "full") == []
        new = snapshot.manifest.counts
        assert (new.requested, new.users) == (old.requested - 3, old.users - 1)
    assert not any(Path(world.catalog, "work").glob("*"))
    rated = read_table(f"{world.catalog}/rated/clip-{D}", "rated items")["item_id"].to_pylist()
    assert sorted(rated) == sorted(read_catalog(world.catalog).for_user(BEN)["item_id"].to_pylist())
    assert collect(world.catalog, keep=7, grace_hours=48, dry_run=True).files == []
    # Exports: whole, and the same for everybody else.
    export = read_export(world.out("images"))
    assert export is not None
    assert export.urls == len(urls(world.out("images")))
    assert keys_of_others == {row["image_key"] for row in urls(world.out("images"))}
    assert keys_of_others <= objects(world.out("images")).keys()
    assert not avro & set(list_files(world.out("warehouse"), ".avro"))
    # Again: nothing to do, and no second receipt.
    again = erase(world)
    assert (dict(again.removed.counts), again.receipt) == ({}, None)
    assert erased.receipt is not None
    assert erased.receipt["removed"]["rows of items"] == 6
    assert erased.receipt["removed"]["folders of work"] == 1


def snapshots_of(world: World) -> list[Snapshot]:
    return [open_snapshot(world.catalog, manifest.path) for manifest in list_snapshots(world.catalog)]


def test_a_later_night_leaves_an_erased_user_out(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(world)
    ann = replace(person_of(world, BEN), user_id=ANN, item_ids=set(), images=set())
    with caplog.at_level(logging.INFO, logger="rebeca_ray"):
        manifest = generate_catalog(world.night(2), in_process=True).manifest  # ANN is requested too
    assert "1 of 6 users were erased, and are left out" in caplog.text
    assert (manifest.counts.users, manifest.counts.requested) == (5, 3 * 4 + 5)
    assert verify(read_catalog(world.catalog), "full") == []
    assert traces_of(ann, world.catalog) == []
    monkeypatch.delenv(KEY)
    with pytest.raises(InputError, match=f"1 users were erased, but {KEY} is not set"):
        generate_catalog(world.night(3), in_process=True)
    monkeypatch.setenv(KEY, "another secret of sixteen characters")
    with pytest.raises(InputError, match="is not the key of its tombstones"):
        generate_catalog(world.night(3), in_process=True)


def test_ratings_of_an_erased_user_are_left_out_of_histories(world: World, tmp_path: Path) -> None:
    erase(world)
    ratings = pa.table({"user_id": [ANN, BEN, ANN, BEN], "item_id": ["a", "a", "b", "b"]})
    pq.write_table(ratings, tmp_path / "interactions.parquet")
    settings = InteractionSettings(path=str(tmp_path / "interactions.parquet"), min_likes=1)
    items = np.array(["a", "b"], object)
    everybody = build_histories(settings, items, str(tmp_path))
    histories = build_histories(settings, items, str(tmp_path), catalog=world.catalog)
    assert [everybody.num_users, histories.num_users] == [2, 1]
    assert read_table(histories.uri, "histories", ["user_id"])["user_id"].to_pylist() == [BEN]
    # Many ratings are split by Ray tasks, each batch so:
    split = AddBucket(2, "ratings", Activity().listen(), read_tombstones(world.catalog))
    assert split(ratings)["user_id"].to_pylist() == [BEN, BEN]
    # The storage of trainings: the histories with her go, and checkpoints, which do not say whose they are.
    checkpoint = tmp_path / "prior-0123456789ab" / "checkpoint_2026"
    checkpoint.mkdir(parents=True)
    removed = forget(world.catalog, [ANN], Places(storages=[str(tmp_path)])).removed
    assert removed.counts == {"training runs": 1, "folders of histories": 1}
    assert not Path(everybody.uri).exists()
    assert not checkpoint.exists()
    assert Path(histories.uri).exists()


def test_an_erasure_that_is_killed_anywhere_shows_whole_snapshots_and_the_next_one_completes_it(
    world: World,
) -> None:
    ann = person_of(world, ANN)
    places = replace(places_of(world), iceberg=None)
    for at in chosen_changes(world, places):
        restored(world)
        shutil.rmtree(world.out("warehouse"))
        kill_and_repeat(world, places, at)
        assert traces_of(ann, world.root) == [], at


def test_an_erasure_that_is_killed_in_iceberg_is_completed(world: World) -> None:
    ann, counter = person_of(world, ANN), Counter()
    with watched(world.root, counter):
        erase(world)
    drops = [number for number, operation in enumerate(counter.operations) if operation.name == "commit"]
    restored(world)
    kill_and_repeat(world, places_of(world), drops[len(drops) // 2])
    assert traces_of(ann, world.root) == []
    listed = read_catalog(world.catalog)
    database = open_iceberg(f"sqlite:///{world.out('iceberg.db')}", world.out("warehouse"))
    scanned = database.load_table("rebeca.items").scan(selected_fields=("user_id",)).to_arrow()
    assert sorted(scanned["user_id"].to_pylist()) == sorted(listed.items()["user_id"].to_pylist())


def chosen_changes(world: World, places: Places) -> list[int]:
    """Return the numbers of some operations of an erasure that change something, evenly spread."""
    counter = Counter()
    with watched(world.root, counter):
        forget(world.catalog, [ANN], places)
    # An erasure opens no image file of another bucket.
    other = 1 - bucket_of(ANN, 2)
    opened = [operation.path for operation in counter.operations if operation.name == "open r"]
    assert any("catalog/images" in path for path in opened)
    assert not any("catalog/images" in path and f"bucket={other}/" in path for path in opened)
    changes = [number for number, operation in enumerate(counter.operations) if operation.is_change]
    return [changes[index] for index in np.linspace(1, 0.95 * len(changes), KILLS).astype(int)]


def kill_and_repeat(world: World, places: Places, at: int) -> None:
    with pytest.raises(Killed), watched(world.root, FailingDisk("killed before", at)):
        forget(world.catalog, [ANN], places)
    assert [verify(snapshot, "full") for snapshot in snapshots_of(world)] == [[], []], at
    forget(world.catalog, [ANN], places)
    assert [verify(snapshot, "full") for snapshot in snapshots_of(world)] == [[], []], at
    assert len(read_receipts(world.catalog)[0]) == 1


def test_a_reader_of_the_old_files_is_sent_to_the_new_ones(world: World) -> None:
    reader = read_catalog(world.catalog)
    assert reader.refresh() is reader
    erase(world)
    with pytest.raises(InputError, match="because somebody was erased from it; go on with `refresh"):
        reader.items(user_ids=[ANN])
    fresh = reader.refresh()
    assert (fresh.run_id, fresh.refresh() is fresh) == (reader.run_id, True)
    assert fresh.items(user_ids=[ANN]).num_rows == 0
    # A reader that had read the manifest alone, when the file list went.
    with patch.object(read, "read_manifest", side_effect=[reader.manifest, fresh.manifest]):
        assert open_snapshot(world.catalog, reader.path).manifest == fresh.manifest


def test_an_image_that_another_user_shows_stays_and_the_pool_is_nobodys(world: World) -> None:
    shared = {"selection": SelectionSettings(share_within=1.0), "layout": LayoutSettings(num_buckets=1)}
    catalog = world.out("shared")
    generate_catalog(world.night(0).model_copy(update={**shared, "catalog": catalog}), in_process=True)
    snapshot = read_catalog(catalog)
    users = owners(snapshot)  # of each item that several users have
    erased = next(names[0] for names in users.values() if "" not in names)
    everybody = {*snapshot.items()["user_id"].to_pylist()}
    kept = sorted(everybody - {erased, STRANGER})
    before = snapshot.items(user_ids=kept)
    images = snapshot.images(before)
    alone = [item for item in snapshot.for_user(erased)["item_id"].to_pylist() if item not in users]
    removed = forget(catalog, [erased, STRANGER], Places()).removed
    snapshot = read_catalog(catalog)
    after = snapshot.items(user_ids=kept)
    assert after.equals(before)  # among them the pool's, and those that the erased user shared
    assert snapshot.images(after) == images
    assert verify(snapshot, "full") == []
    assert {*snapshot.items()["user_id"].to_pylist()} == {*kept}
    assert len(alone) < 3
    assert removed.counts["rows of images"] == len(alone)


def test_a_mistake_is_refused_before_anything_is_written(world: World) -> None:
    with pytest.raises(InputError, match="names the population pool, which is nobody's"):
        forget(world.catalog, [""], Places())
    with pytest.raises(InputError, match="no export of images, no key-values and no prior"):
        forget(world.catalog, [ANN], Places(folders=[world.catalog]))
    Path(list_files(f"{world.catalog}/snapshots", "/manifest.json")[0]).write_text("{}")
    with pytest.raises(InputError, match="nobody can be erased from .*/snapshots/run_date=2026-03-02"):
        forget(world.catalog, [ANN], Places(), dry_run=True)
    assert not Path(world.catalog, "erasures").exists()


def test_a_dry_run_lists_and_changes_nothing_and_the_command_prints_json(world: World) -> None:
    def contents() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in Path(world.root).rglob("*") if file.is_file()}

    before = contents()
    places = ["--from", world.out("images"), "--from", world.out("values")]
    command = ["catalog", "forget", world.catalog, "--user", ANN, *places]
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert contents() == before
    assert planned["removed"]["rows of items"] == 6
    assert planned["receipt"] is None
    assert all(Path(path).exists() for path in planned["paths"])
    result = CliRunner().invoke(app, command)
    assert json.loads(result.stdout)["receipt"]["number"] == 1


def test_a_night_at_work_keeps_an_erasure_out(world: World) -> None:
    with (
        lease.hold_lease(world.catalog, "night", 0.4),
        patch.object(lease, "time", time),  # which waits for a heartbeat
        pytest.raises(LeaseHeldError, match="run night .* is at work on it"),
    ):
        erase(world)


def test_receipts_are_a_chain_and_a_place_may_follow_later(world: World) -> None:
    ann = person_of(world, ANN)
    forget(world.catalog, [ANN], Places())
    assert traces_of(ann, world.catalog) == []
    erase(world)
    assert traces_of(ann, world.root) == []
    receipts, _ = read_receipts(world.catalog)
    assert [len(receipt["places"]) for receipt in receipts] == [1, 5]
    assert receipts[0]["tombstones"] == receipts[1]["tombstones"]
    first = Path(receipt_uri(world.catalog, 1))
    first.write_text(first.read_text().replace('"fencing_token": ', '"fencing_token": 1'))
    with pytest.raises(InputError, match=r"000002\.json: does not follow the receipt before it"):
        erase(world, BEN)


def test_images_go_that_no_snapshot_knows_any_more(world: World) -> None:
    """All rows of BEN's items are gone, as after a collection. Files with live rows keep the images."""
    ben = person_of(world, BEN)
    with lease.hold_lease(world.catalog, "test", 60) as held:
        rewriting = Rewriting(lease=held, users=[BEN])
        for trace in find_traces(world.catalog, [BEN]):
            for row in trace.tables.values():
                rewriting.replace_table(row)
            assert rewriting.replace_manifest(trace)
    forgotten = replace(ben, user_id=min(ben.item_ids))
    assert traces_of(forgotten, f"{world.catalog}/images") != []
    forget(world.catalog, [BEN], Places())
    assert traces_of(forgotten, f"{world.catalog}/images") == []
    assert [verify(snapshot, "full") for snapshot in snapshots_of(world)] == [[], []]


def test_a_prior_loses_its_row_and_nobody_else_changes(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.inputs.prior, tmp_path / "prior")
    uri = str(tmp_path / "prior")
    before = load_prior(uri)
    assert before.users is not None
    assert before.user_rows is not None
    index = before.users["user_id"].to_pylist().index(ANN)
    erased = forget(world.catalog, [ANN], Places(folders=[uri]))
    assert erased.removed.counts["users of priors"] == 1
    after = load_prior(uri)
    assert after.users is not None
    assert after.user_rows is not None
    assert ANN not in after.users["user_id"].to_pylist()
    assert after.users.num_rows == 6
    changed = (after.user_rows != before.user_rows).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [index]
    assert not after.user_rows[index].any()
    assert [name for name in list_files(uri) if ANN.encode() in Path(name).read_bytes()] == []
    assert len(list_files(uri, "/config.json")) == 1
    forget(world.catalog, [BEN], Places(folders=[uri]))  # from a folder with versions
    assert [name for name in list_files(uri) if BEN.encode() in Path(name).read_bytes()] == []
    assert len(list_files(uri, "/config.json")) == 1


def test_an_erasure_on_s3(
    world: World, tmp_path: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    ann, remote = person_of(world, ANN), replace(world, root=f"s3://rebeca/{tmp_path.name}")
    filesystem, prefix = open_filesystem(remote.root)
    files = [file for file in Path(world.root).rglob("*") if file.is_file()]
    names = {file: file.relative_to(world.root) for file in files}
    filesystem.pipe(
        {f"{prefix}/{name}": file.read_bytes() for file, name in names.items() if is_on_a_server(name)}
    )
    places = Places(folders=[remote.out("images"), remote.out("values")])
    erased = forget(remote.catalog, [ANN], places)
    assert traces_of(ann, remote.root) == []
    assert verify(read_catalog(remote.catalog), "full") == []
    assert erased.receipt is not None
    assert erased.receipt["removed"]["image objects"] == len(ann.item_ids)
