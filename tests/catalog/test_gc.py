"""Garbage collection: a reader's snapshot stays, garbage goes, and a killed collection loses nothing."""

import datetime
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from rebeca_ray.catalog import gc, snapshots
from rebeca_ray.catalog.gc import collect, find_garbage, kept_snapshots
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import FileList, GateOutcome, Manifest
from rebeca_ray.catalog.pointer import Pointer, Replaced, change_pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import find_snapshot, list_snapshots, publish_snapshot, roll_back
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError, LeaseHeldError, QualityGateError, UserError
from rebeca_ray.generation.runs import begin
from rebeca_ray.storage.filesystem import list_files
from tests.cli.test_commands import run
from tests.conftest import USERS, prepare, synthetic_manifest
from tests.generation.test_nights import change_digest, night


@pytest.fixture
def four_nights(config: GenerateConfig) -> GenerateConfig:
    """Return a catalog of four nights.

    One of five users changes every night, so every snapshot but the first uses files of earlier ones.
    """
    for number in range(4):
        change_digest(config, USERS[number])
        night(config, USERS[:5], number)
    return config


def test_a_collection_removes_everything_that_no_kept_snapshot_needs(four_nights: GenerateConfig) -> None:
    root = four_nights.catalog
    first, second, third, fourth = (manifest.run_id for manifest in list_snapshots(root))
    before = read_catalog(root)
    images = before.images(before.items())
    assert collect(root, keep=4, grace_hours=0).manifests == []
    garbage = collect(root, keep=2, grace_hours=0)
    assert garbage.kept == sorted([third, fourth])
    assert [manifest.run_id for manifest in list_snapshots(root)] == [third, fourth]
    for manifest in list_snapshots(root):
        assert verify(open_snapshot(root, manifest.path), "full") == []
    assert read_catalog(root).images(read_catalog(root).items()) == images
    needed = {
        path
        for run_id in (third, fourth)
        for path in open_snapshot(root, find_snapshot(root, run_id).path).files["path"].to_pylist()
    }
    existing = {file.removeprefix(f"{root}/") for file in list_files(root, ".parquet")}
    assert existing - needed == {find_snapshot(root, run_id).files.path for run_id in (third, fourth)}
    assert not (Path(root) / "work").exists() or not any((Path(root) / "work").iterdir())
    assert collect(root, keep=2, grace_hours=0).files == []
    with pytest.raises(
        UserError, match=f"run {first} has no complete snapshot; the latest are: {third}, {fourth}"
    ):
        publish_snapshot(root, first)
    assert second not in garbage.kept


def test_a_collection_that_is_killed_anywhere_loses_nothing_and_the_next_one_completes_it(
    four_nights: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, deleted = four_nights.catalog, gc.delete
    kept = [manifest.run_id for manifest in list_snapshots(root)[-2:]]
    deaths = 0
    while True:
        remaining = 1  # deletions before the collection is killed

        def die(uri: str) -> None:
            nonlocal remaining
            if remaining == 0:
                raise KeyboardInterrupt
            remaining -= 1
            deleted(uri)

        monkeypatch.setattr(gc, "delete", die)
        monkeypatch.setattr(gc, "delete_files", lambda files: [die(file) for file in files])
        try:
            collect(root, keep=2, grace_hours=0)
            break
        except KeyboardInterrupt:
            deaths += 1
        for run_id in kept:
            assert verify(open_snapshot(root, find_snapshot(root, run_id).path), "full") == []
    assert deaths >= 2
    monkeypatch.setattr(gc, "delete", deleted)
    rest = collect(root, keep=2, grace_hours=0, dry_run=True)
    assert (rest.manifests, rest.folders, rest.files) == ([], [], [])


def test_a_snapshot_stays_through_the_grace_period_after_it_was_followed(four_nights: GenerateConfig) -> None:
    root = four_nights.catalog
    now = datetime.datetime.now(datetime.UTC)
    snapshots = list_snapshots(root)
    hour = datetime.timedelta(hours=1)
    pointer, _ = read_pointer(root)
    assert [entry["run_id"] for entry in pointer.previously_published] == [
        manifest.run_id for manifest in snapshots[:3]
    ]
    ids = [manifest.run_id for manifest in snapshots]
    assert kept_snapshots(snapshots, pointer, 1, now, hour) == set(ids)
    # The published snapshot, and the one it followed.
    assert kept_snapshots(snapshots, pointer, 1, now + 2 * hour, hour) == set(ids[2:])
    assert kept_snapshots(snapshots, pointer, 3, now + 2 * hour, hour) == set(ids[1:])
    # Made long before they were followed.
    long_ago = [
        manifest.model_copy(update={"created_at": "2020-01-01T00:00:00+00:00"}) for manifest in snapshots
    ]
    assert kept_snapshots(long_ago, pointer, 1, now, hour) == set(ids)
    # Refused by the gate tonight: it replaces no kept snapshot.
    never = snapshots[0].model_copy(update={"run_id": "refused", "created_at": now.isoformat()})
    assert kept_snapshots([*snapshots, never], pointer, 2, now + 2 * hour, hour) == set(ids[2:])
    assert kept_snapshots([*snapshots, never], pointer, 2, now, hour) == {*ids, "refused"}
    garbage = find_garbage(root, keep=1, now=now + 2 * hour, grace=hour)
    assert len(garbage.manifests) == 2
    assert read_catalog(root).manifest.run_id in garbage.kept


@pytest.mark.parametrize(
    ("published", "replaced", "kept"),
    [
        ("D", "ABAC", "ACD"),  # A was published again after B was
        ("D", "", "BCD"),  # latest.json was lost, and the earlier publications with it: the newest stay
        (None, "", "BCD"),  # and a failed run wrote another
        ("B", "ABC", "ABC"),  # and the one that it followed
    ],
)
def test_the_last_published_snapshots_stay(published: str | None, replaced: str, kept: str) -> None:
    """R, the newest, was refused and never published. C was refused and published all the same."""
    at = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).isoformat()
    snapshots = [
        synthetic_manifest(
            Run(root="", run_date="2026-03-01", run_id=name, fencing_token=1),
            FileList(path="files.parquet", rows=0, bytes=0, sha256=""),
            previous_run_id=before,
            created_at=at,
            gate=GateOutcome(refused=["too dark"] if name in "CR" else [], forced=name == "C"),
        )
        for name, before in zip("ABCDR", (None, *"ABCD"), strict=True)
    ]
    before = tuple(Replaced(run_id=name, replaced_at=at) for name in replaced)
    pointer = Pointer(run_id=published, previously_published=before)
    now = datetime.datetime(2026, 3, 9, tzinfo=datetime.UTC)
    run_ids = kept_snapshots(snapshots, pointer, 3, now, datetime.timedelta(hours=1))
    assert "".join(sorted(run_ids)) == kept


def test_an_unfinished_run_stays_for_the_grace_period_and_is_then_removed(config: GenerateConfig) -> None:
    night(config, USERS[:2])
    prepared = prepare(config)  # killed before it was assembled
    begin(config.catalog, prepared.run.run_id, datetime.date(2026, 3, 3), {})
    images = Path(config.catalog) / prepared.run.images
    collect(config.catalog, keep=1, grace_hours=1)
    assert list_files(str(images), ".parquet") == []  # everything is carried: nothing was rendered
    assert Path(prepared.run.work, "run.json").exists()
    collect(config.catalog, keep=1, grace_hours=0)
    assert not Path(prepared.run.work).exists()
    assert verify(read_catalog(config.catalog), "full") == []


def test_nothing_is_collected_while_a_run_is_at_work(config: GenerateConfig) -> None:
    night(config, USERS[:2])
    with (
        hold_lease(config.catalog, "tonight", 2),
        pytest.raises(LeaseHeldError, match="run tonight .* is at work"),
    ):
        collect(config.catalog, keep=1, grace_hours=0)


def test_publishing_by_hand_and_back_again(four_nights: GenerateConfig) -> None:
    root = four_nights.catalog
    third, fourth = (manifest.run_id for manifest in list_snapshots(root)[-2:])
    assert roll_back(root).run_id == third
    assert read_catalog(root).manifest.run_id == third
    assert publish_snapshot(root, fourth).run_id == fourth
    assert read_catalog(root).manifest.run_id == fourth
    Path(root, read_catalog(root).paths("items")[0]).unlink()
    with pytest.raises(
        QualityGateError, match=r"is not published: .*items/bucket=0/.*: is missing \(1 such\)"
    ):
        publish_snapshot(root, fourth)


@pytest.mark.parametrize("back", [False, True])
def test_a_snapshot_that_is_collected_after_its_check_is_not_published(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    root = config.catalog
    first = night(config, USERS[:1])[0].run_id
    second = night(config, USERS[:2], 1)[0].run_id
    third = night(config, USERS[:3], 2)[0].run_id
    check = snapshots.verified

    def collected_after(root: str, run_id: str) -> Manifest:
        manifest = check(root, run_id)
        monkeypatch.undo()
        if back:  # gc keeps the snapshot that the published one followed
            publish_snapshot(root, first)
            collect(root, keep=1, grace_hours=0)
            change_pointer(root, lambda pointer: replace(pointer, run_id=third))
        else:
            collect(root, keep=1, grace_hours=0)
        return manifest

    monkeypatch.setattr(snapshots, "verified", collected_after)
    run_id = second if back else first
    with pytest.raises(InputError, match=f"run {run_id} was collected meanwhile; publish another"):
        roll_back(root) if back else publish_snapshot(root, first)
    assert read_pointer(root)[0].run_id == third


def test_a_lost_pointer_is_repaired_by_publishing_a_listed_snapshot(config: GenerateConfig) -> None:
    _, snapshot = night(config, USERS[:2])
    Path(config.catalog, "latest.json").unlink()
    listing = run("catalog", "list", config.catalog).stdout
    assert snapshot.run_id in listing
    assert "no snapshot is published: `rebeca catalog publish --run-id ID` publishes one" in listing
    publish_snapshot(config.catalog, snapshot.run_id)
    assert read_catalog(config.catalog).for_user(USERS[0]).equals(snapshot.for_user(USERS[0]))


def test_a_mistyped_root_creates_no_catalog(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is none \(no latest.json\)"):
        collect(str(tmp_path / "typo"), keep=1, grace_hours=0)
    (tmp_path / "latest.json").write_text("{}")
    for hours in (float("nan"), -1.0, 1e13):
        with pytest.raises(UserError, match="for 0 to 100,000 hours"):
            collect(str(tmp_path), keep=1, grace_hours=hours)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.json"]


def test_the_first_snapshot_cannot_be_rolled_back(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="nothing is published there; there is nothing to roll back"):
        roll_back(config.catalog)
    night(config, USERS[:1])
    with pytest.raises(UserError, match="is the first there was"):
        roll_back(config.catalog)
    assert pa.types.is_string(read_catalog(config.catalog).items().schema.field("item_id").type)
