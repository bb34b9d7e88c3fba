"""Erasure: nothing of a person stays in the catalog and its exports, and nothing of anybody else goes."""

import json
import logging
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

from rebeca_ray.catalog import lease, read
from rebeca_ray.catalog.erasure.receipts import read_receipts, receipt_uri
from rebeca_ray.catalog.erasure.rewriting import Rewriting
from rebeca_ray.catalog.erasure.tombstones import KEY, read_tombstones
from rebeca_ray.catalog.exports.iceberg import open_iceberg
from rebeca_ray.catalog.exports.image_objects import read_export
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.catalog.versions import NewVersion, replace_version
from rebeca_ray.cli.commands import app
from rebeca_ray.config.sections import InteractionSettings, LayoutSettings, SelectionSettings
from rebeca_ray.data.histories import AddBucket, build_histories
from rebeca_ray.errors import InputError, LeaseHeldError
from rebeca_ray.forget import Iceberg, Places, find_traces, forget
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.identity import bucket_of
from rebeca_ray.prior import erasure as prior_erasure
from rebeca_ray.prior.checkpoint import load_prior, publish_prior
from rebeca_ray.storage.filesystem import list_files, open_filesystem
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.watchdog import Activity
from tests.catalog.erasure_world import (
    ANN,
    BEN,
    SECRET,
    STRANGER,
    erase,
    others,
    person_of,
    places_of,
    restored,
    snapshots_of,
    traces_of,
)
from tests.catalog.erasure_world import made as made  # fixtures
from tests.catalog.erasure_world import world as world
from tests.catalog.exported import objects, urls
from tests.conftest import D
from tests.faults.disk import Counter, FailingDisk, Killed, watched
from tests.faults.outage import is_on_a_server
from tests.faults.world import World
from tests.generation.test_sharing import owners

KILLS = 7  # of the operations of an erasure, evenly spread


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
    monkeypatch.setenv(KEY, f"{SECRET}\n")  # as a mounted file has it
    assert generate_catalog(world.night(3), in_process=True).manifest.counts.requested == 3 * 4 + 5


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
    split = AddBucket(2, 1, "ratings", Activity().listen(), read_tombstones(world.catalog))
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
    tables = Iceberg(f"sqlite:///{world.out('iceberg.db')}", world.out("warehouse"), "other")
    with pytest.raises(InputError, match="has no namespace other; give the one that `rebeca catalog export"):
        forget(world.catalog, [ANN], Places(iceberg=tables))
    with pytest.raises(InputError, match="namespace 'rebeca.': has an empty part; give one such as rebeca"):
        forget(world.catalog, [ANN], Places(iceberg=replace(tables, namespace="rebeca.")))
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
        lease.hold_lease(world.catalog, "night", 3.0),
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


def test_a_storage_without_anything_is_a_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    forget(world.catalog, [ANN], Places(storages=[world.out("trainning")]))
    assert f"storage {world.out('trainning')}: is empty or missing, so nothing is erased" in caplog.text


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
    torn = Path(uri, "_versions", "00000009-torn")  # of a training that was killed
    torn.mkdir()
    (torn / "users.parquet").write_bytes(b"user-77")
    assert forget(world.catalog, ["user-77"], Places(folders=[uri])).removed.counts["unfinished priors"] == 1
    assert not torn.exists()
    forget(world.catalog, [BEN], Places(folders=[uri]))  # from a folder with versions
    assert [name for name in list_files(uri) if BEN.encode() in Path(name).read_bytes()] == []
    assert len(list_files(uri, "/config.json")) == 1


def test_a_training_that_publishes_while_an_erasure_waits_keeps_its_prior_without_the_erased_user(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "prior")
    prior = load_prior(world.inputs.prior)
    with replace_version(uri, "prior", "train") as version:
        publish_prior(prior, version, None)
    (unfinished,) = Path(uri, "_versions").iterdir()
    config = (unfinished / "config.json").read_bytes()
    (unfinished / "config.json").unlink()
    pointer = Path(uri, "prior.json").read_bytes()
    Path(uri, "prior.json").write_text(json.dumps({**json.loads(pointer), "snapshot": None}))

    def publish_then_lead(*arguments: Any) -> AbstractContextManager[NewVersion]:
        (unfinished / "config.json").write_bytes(config)
        Path(uri, "prior.json").write_bytes(pointer)
        return replace_version(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prior_erasure, "replace_version", publish_then_lead)
        forget(world.catalog, [ANN], Places(folders=[uri]))
    users = load_prior(uri).users
    assert users is not None
    assert prior.users is not None
    assert {*users["user_id"].to_pylist()} == {*prior.users["user_id"].to_pylist()} - {ANN}


def test_what_a_first_training_left_when_it_was_killed_is_erased(world: World, tmp_path: Path) -> None:
    uri = str(tmp_path / "prior")
    with hold_lease(uri, "train", 60, "prior"):
        folder = Path(uri, "_versions", "00000001-torn")
        folder.mkdir(parents=True)
        (folder / "users.parquet").write_bytes(ANN.encode())
    removed = forget(world.catalog, [ANN], Places(folders=[uri])).removed
    assert removed.counts["unfinished priors"] == 1
    assert [name for name in list_files(uri) if ANN.encode() in Path(name).read_bytes()] == []


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
