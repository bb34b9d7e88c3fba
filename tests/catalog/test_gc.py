"""Garbage collection: what readers hold stays, what nobody needs goes, and one that dies on the way has lost nothing."""

import datetime
from pathlib import Path

import pyarrow as pa
import pytest

from rebeca_ray.catalog import gc
from rebeca_ray.catalog.gc import collect, find_garbage, kept_snapshots
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer, Replaced, read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import find_snapshot, list_snapshots, publish_snapshot, roll_back
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import LeaseHeldError, QualityGateError, UserError
from rebeca_ray.generation.runs import begin
from rebeca_ray.storage.filesystem import list_files
from tests.cli.test_commands import run
from tests.conftest import USERS, prepare
from tests.generation.test_nights import change_digest, night


@pytest.fixture
def four_nights(config: GenerateConfig) -> GenerateConfig:
    """Of five users one changes every night, so that every snapshot but the first leans on the files of those before it."""
    for number in range(4):
        change_digest(config, USERS[number])
        night(config, USERS[:5], number)
    return config


def test_what_goes_is_what_no_kept_snapshot_needs(four_nights: GenerateConfig) -> None:
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
        for run in (third, fourth)
        for path in open_snapshot(root, find_snapshot(root, run).path).files["path"].to_pylist()
    }
    there = {file.removeprefix(f"{root}/") for file in list_files(root, ".parquet")}
    assert there - needed == {f"{find_snapshot(root, run)['files']['path']}" for run in (third, fourth)}
    assert not (Path(root) / "work").exists() or not any((Path(root) / "work").iterdir())
    assert collect(root, keep=2, grace_hours=0).files == []
    with pytest.raises(
        UserError, match=f"run {first} has no complete snapshot; the latest are: {third}, {fourth}"
    ):
        publish_snapshot(root, first)
    assert second not in garbage.kept


def test_a_collection_that_dies_anywhere_loses_nothing_and_the_next_one_ends_it(
    four_nights: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, deleted = four_nights.catalog, gc.delete
    kept = [manifest.run_id for manifest in list_snapshots(root)[-2:]]
    deaths = 0
    while True:
        left = 2  # deletions before it dies

        def die(uri: str) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
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
    assert [left["run_id"] for left in pointer.previously_published] == [
        manifest.run_id for manifest in snapshots[:3]
    ]
    assert kept_snapshots(snapshots, pointer, 1, now, hour) == snapshots
    assert (
        kept_snapshots(snapshots, pointer, 1, now + 2 * hour, hour) == snapshots[2:]
    )  # it, and the one it followed
    assert kept_snapshots(snapshots, pointer, 3, now + 2 * hour, hour) == snapshots[1:]
    long_ago = [
        {**manifest, "created_at": "2020-01-01T00:00:00+00:00"} for manifest in snapshots
    ]  # made long before they were followed
    assert kept_snapshots(long_ago, pointer, 1, now, hour) == long_ago
    never = {
        **snapshots[0],
        "run_id": "refused",
        "created_at": now.isoformat(),
    }  # by the gate, tonight: it counts for nobody's place
    assert kept_snapshots([*snapshots, never], pointer, 2, now + 2 * hour, hour) == snapshots[2:]
    assert kept_snapshots([*snapshots, never], pointer, 2, now, hour) == [*snapshots, never]
    garbage = find_garbage(root, keep=1, now=now + 2 * hour, grace=hour)
    assert len(garbage.manifests) == 2
    assert read_catalog(root).manifest.run_id in garbage.kept


@pytest.mark.parametrize(
    ("published", "left", "kept"),
    [
        ("D", "ABAC", "ACD"),  # A was published again after B was
        ("D", "", "BCD"),  # latest.json was lost, and with it what was published before: the newest
        (None, "", "BCD"),  # and a run that came to nothing made another
        ("B", "ABC", "ABC"),  # and the one that it followed
    ],
)
def test_the_last_published_stay(published: str | None, left: str, kept: str) -> None:
    """R, the newest, was refused and never published; C was refused and published all the same."""
    at = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).isoformat()
    snapshots = [
        {
            "run_id": name,
            "previous": before,
            "created_at": at,
            "gate": {"refused": ["too dark"] if name in "CR" else [], "forced": name == "C"},
        }
        for name, before in zip("ABCDR", (None, *"ABCD"), strict=True)
    ]
    pointer = Pointer(
        run_id=published, previously_published=tuple(Replaced(run_id=name, replaced_at=at) for name in left)
    )
    now = datetime.datetime(2026, 3, 9, tzinfo=datetime.UTC)
    found = kept_snapshots(snapshots, pointer, 3, now, datetime.timedelta(hours=1))
    assert "".join(manifest.run_id for manifest in found) == kept


def test_an_unfinished_run_stays_for_the_grace_period_and_is_then_given_up(config: GenerateConfig) -> None:
    night(config, USERS[:2])
    prepared = prepare(config)  # killed before it was assembled
    begin(config.catalog, prepared.run.run_id, datetime.date(2026, 3, 3), {})
    images = Path(config.catalog) / prepared.run.images
    collect(config.catalog, keep=1, grace_hours=1)
    assert list_files(str(images), ".parquet") == []  # everything is carried: nothing was drawn
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
    assert roll_back(root)["run_id"] == third
    assert read_catalog(root).manifest.run_id == third
    assert publish_snapshot(root, fourth)["run_id"] == fourth
    assert read_catalog(root).manifest.run_id == fourth
    Path(root, read_catalog(root).paths("items")[0]).unlink()
    with pytest.raises(
        QualityGateError, match=r"is not published: .*items/bucket=0/.*: is missing \(1 such\)"
    ):
        publish_snapshot(root, fourth)


def test_a_lost_pointer_is_mended_by_what_is_listed(
    config: GenerateConfig,
) -> None:
    _, snapshot = night(config, USERS[:2])
    Path(config.catalog, "latest.json").unlink()
    told = run("catalog", "list", config.catalog).stdout
    assert snapshot.run_id in told
    assert "no snapshot is published: `rebeca catalog publish --run-id ID` publishes one" in told
    publish_snapshot(config.catalog, snapshot.run_id)
    assert read_catalog(config.catalog).for_user(USERS[0]).equals(snapshot.for_user(USERS[0]))


def test_a_slip_of_the_keyboard_makes_no_catalog(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is none \(no latest.json\)"):
        collect(str(tmp_path / "typo"), keep=1, grace_hours=0)
    (tmp_path / "latest.json").write_text("{}")
    for hours in (float("nan"), -1.0, 1e13):
        with pytest.raises(UserError, match="for 0 to 100,000 hours"):
            collect(str(tmp_path), keep=1, grace_hours=hours)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.json"]


def test_there_is_nothing_before_the_first(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="nothing is published there; there is nothing to roll back"):
        roll_back(config.catalog)
    night(config, USERS[:1])
    with pytest.raises(UserError, match="is the first there was"):
        roll_back(config.catalog)
    assert pa.types.is_string(read_catalog(config.catalog).items().schema.field("item_id").type)
