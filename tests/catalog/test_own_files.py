"""A catalog removes, reads and replaces only what its own records name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.layout import inside
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import manifest_version, write_manifest
from rebeca_ray.catalog.pointer import change_pointer, read_pointer, swap
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.runs import RunRecord, read_records, write_run_record
from rebeca_ray.catalog.snapshots import find_snapshot, list_snapshots, publish_snapshot, roll_back
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError, LeaseHeldError, ResumableError
from rebeca_ray.generation.pipeline import generate_catalog
from tests.conftest import NO_GATE, USERS
from tests.generation.test_nights import change_digest, night, request_for

FOREIGN = [
    "images/holiday/beach.parquet",
    "images/run_id=20260101T000000-abcdef/bucket=0/part-000001-0123456789abcdef.parquet",
    "snapshots/run_date=2020-01-01/run_id=theirs/manifest.json.bak",
    "snapshots/theirs/manifest.yaml",
    "work/run_id=theirs/run.yaml",
    "work/notes.txt",
    "runs/readme.md",
    "src/main.py",
]


@pytest.fixture
def three_nights(config: GenerateConfig) -> GenerateConfig:
    for number in range(3):
        change_digest(config, USERS[number])
        night(config, USERS[:4], number)
    return config


def run_ids(root: str) -> list[str]:
    return [manifest.run_id for manifest in list_snapshots(root)]


def test_a_collection_leaves_everything_that_it_did_not_make(three_nights: GenerateConfig) -> None:
    root = Path(three_nights.catalog)
    first, _, third = run_ids(str(root))
    beside = f"snapshots/run_date=2026-03-02/run_id={first}/notes.md"
    of_ours = f"images/run_id={first}/bucket=0/thumbnail.png"
    for name in (*FOREIGN, beside, of_ours):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("theirs")
    garbage = collect(str(root), keep=1, grace_hours=0)
    assert len(garbage.manifests) == 1
    assert [name for name in (*FOREIGN, beside, of_ours) if not (root / name).exists()] == []
    assert first not in run_ids(str(root))
    assert verify(read_catalog(str(root)), "full") == []
    assert read_catalog(str(root)).run_id == third


def test_runs_of_a_catalog_that_was_copied_over_this_one_stay(three_nights: GenerateConfig) -> None:
    root = three_nights.catalog
    first = run_ids(root)[0]
    catalog_id = read_pointer(root)[0].catalog_id
    assert {record.run_id for record in read_records(root, catalog_id or "")} >= {first}
    write_run_record(root, RunRecord(catalog_id="another", run_id=first, run_date="2026-03-02"))
    assert collect(root, keep=1, grace_hours=0).files == []
    assert first in run_ids(root)
    assert verify(open_snapshot(root, find_snapshot(root, first).path), "full") == []


@pytest.mark.parametrize("name", ["photos/a.png", "images/holiday/a.png", "snapshots/old/a", "work/tmp/a"])
def test_a_root_with_another_folder_is_refused_for_writing(
    config: GenerateConfig, name: str, tmp_path: Path
) -> None:
    file = Path(config.catalog, name)
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    config = request_for(config, USERS[:2])
    folder = name.rpartition("/")[0]
    with pytest.raises(InputError, match=rf"not a catalog's \({folder}\); move it elsewhere"):
        generate_catalog(config, in_process=True)
    assert [path for path in Path(config.catalog).rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "_tmp", "lost+found"])
def test_folders_of_tools_are_no_others(config: GenerateConfig, name: str) -> None:
    Path(config.catalog, name).mkdir(parents=True)
    night(config, USERS[:2])
    assert Path(config.catalog, name).is_dir()


@pytest.mark.parametrize("path", ["", "/etc", "../precious", "a/../../b", "a//b", "./a", "s3://bucket/a"])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path below the root"):
        inside(path)
    assert inside("snapshots/run_date=2026-01-01/run_id=a..b") == "snapshots/run_date=2026-01-01/run_id=a..b"


@pytest.mark.parametrize("where", ["pointer", "previous", "list"])
def test_records_that_lead_out_of_the_catalog_are_damaged(three_nights: GenerateConfig, where: str) -> None:
    root = Path(three_nights.catalog)
    snapshot = read_catalog(str(root))
    name = {"pointer": "latest.json", "previous": f"{snapshot.path}/manifest.json"}.get(
        where, f"{snapshot.path}/manifest.json"
    )
    record = json.loads((root / name).read_text())
    if where == "pointer":
        record["snapshot"] = "../elsewhere"
    elif where == "previous":
        record["previous_path"] = "../elsewhere"
    else:
        record["files"]["path"] = "../elsewhere.parquet"
    (root / name).write_text(json.dumps(record))
    with pytest.raises(InputError, match="damaged|is no path below the root"):
        read_catalog(str(root))


def test_a_snapshot_that_is_being_collected_cannot_be_published(three_nights: GenerateConfig) -> None:
    root = three_nights.catalog
    first, second, third = run_ids(root)
    with hold_lease(root, "gc", 60) as lease:
        lease.doom([first])
        with pytest.raises(InputError, match=f"run {first}: its snapshot is being collected"):
            publish_snapshot(root, first)
        publish_snapshot(root, second)  # any other, whoever holds the lease
        with pytest.raises(LeaseHeldError, match=f"run {second} was published while garbage"):
            lease.doom([second])
    assert read_pointer(root)[0].run_id == second
    assert read_pointer(root)[0].lease is None
    assert third in run_ids(root)


def test_a_collection_that_lost_its_lease_removes_nothing(
    three_nights: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = three_nights.catalog
    before = sorted(path for path in Path(root).rglob("*.parquet"))

    def steal(*_: object, **__: object) -> object:
        change_pointer(root, lambda pointer: replace(pointer, lease=None))
        return garbage

    from rebeca_ray.catalog import gc

    now = gc.datetime.now(gc.UTC)
    garbage = gc.find_garbage(root, keep=1, now=now, grace=gc.timedelta(0))
    monkeypatch.setattr(gc, "find_garbage", steal)
    with pytest.raises(LeaseHeldError):
        collect(root, keep=1, grace_hours=0)
    assert sorted(path for path in Path(root).rglob("*.parquet")) == before


def test_a_rollback_while_a_run_is_at_work_is_not_published_over(three_nights: GenerateConfig) -> None:
    root = three_nights.catalog
    _, second, third = run_ids(root)
    with hold_lease(root, "tonight", 60) as lease:
        assert roll_back(root).run_id == second
        with pytest.raises(ResumableError, match=f"run {second} was published by hand while run tonight"):
            lease.publish(run_id="tonight", run_date="2026-03-05", snapshot="snapshots/tonight")
    pointer = read_pointer(root)[0]
    assert (pointer.run_id, pointer.withdrawn) == (second, ({"run_id": third, "run_date": "2026-03-04"},))
    publish_snapshot(root, third)
    assert read_pointer(root)[0].withdrawn == ()


def test_two_rollbacks_go_back_twice_also_past_a_damaged_manifest(three_nights: GenerateConfig) -> None:
    root = three_nights.catalog
    first, second, third = run_ids(root)
    assert roll_back(root).run_id == second
    Path(root, find_snapshot(root, second).path, "manifest.json").write_text("{")
    assert roll_back(root).run_id == first
    assert [entry["run_id"] for entry in read_pointer(root)[0].withdrawn] == [third, second]


def test_a_stale_attempt_does_not_replace_the_manifest_of_its_heir(config: GenerateConfig) -> None:
    manifest, snapshot = night(config, USERS[:2])
    root, uri = config.catalog, f"{config.catalog}/{snapshot.path}/manifest.json"
    stale = manifest_version(uri)
    heir = manifest.model_copy(update={"fencing_token": 7})
    write_manifest(heir, root, stale)
    write_manifest(heir, root, stale)  # a repeated write whose answer was lost
    with pytest.raises(LeaseHeldError, match="was finished by another attempt"):
        write_manifest(manifest, root, stale)
    assert json.loads(Path(uri).read_text())["fencing_token"] == 7


def test_a_lost_pointer_stops_the_night_and_names_the_repair(config: GenerateConfig) -> None:
    manifest, _ = night(config, USERS[:2])
    root = config.catalog
    pointer = read_pointer(root)[0]
    Path(root, "latest.json").unlink()
    remedy = f"`rebeca catalog publish {root} --run-id {manifest.run_id}`"
    with pytest.raises(InputError, match=rf"latest.json is missing, but there are 1 snapshots.*{remedy}"):
        generate_catalog(request_for(config, USERS[:2], 1), in_process=True)
    assert not Path(root, "latest.json").exists()
    publish_snapshot(root, manifest.run_id)
    repaired = read_pointer(root)[0]
    assert (repaired.catalog_id, repaired.fencing_token) == (pointer.catalog_id, manifest.fencing_token)


def test_the_same_command_after_success_changes_nothing(config: GenerateConfig) -> None:
    config = request_for(config.model_copy(update={"gate": NO_GATE}), USERS[:3])
    made = generate_catalog(config, in_process=True).manifest
    pointer = read_pointer(config.catalog)[0]
    # Killed after the swap, before its work was removed.
    work = Path(config.catalog, "work", f"run_id={made.run_id}")
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    again = generate_catalog(config, in_process=True).manifest
    assert again == made
    assert not work.exists()
    assert (
        generate_catalog(config.model_copy(update={"run_id": made.run_id}), in_process=True).manifest == made
    )
    after = read_pointer(config.catalog)[0]
    assert replace(after, fencing_token=0) == replace(pointer, fencing_token=0)
    assert run_ids(config.catalog) == [made.run_id]
    other = config.model_copy(update={"num_images": 2})
    assert generate_catalog(other, in_process=True).manifest.run_id != made.run_id
    assert generate_catalog(other, in_process=True, resume="never").manifest.previous_run_id is not None
    assert len(run_ids(config.catalog)) == 3


def test_a_refused_first_run_leaves_nothing(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from rebeca_ray.generation import pipeline

    def refuse(*_: object) -> None:
        Path(config.catalog, "theirs.txt").write_text("put there meanwhile")
        raise InputError("bad")

    monkeypatch.setattr(pipeline, "request_histories", refuse)
    with pytest.raises(InputError, match="bad"):
        generate_catalog(request_for(config, USERS[:2]), in_process=True)
    assert [path.name for path in Path(config.catalog).rglob("*")] == ["theirs.txt"]


def test_one_damaged_manifest_blocks_no_collection(
    three_nights: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = three_nights.catalog
    first, second, third = run_ids(root)
    path = Path(root, find_snapshot(root, first).path)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[:100])
    garbage = collect(root, keep=1, grace_hours=0)
    assert first in caplog.text
    assert garbage.kept == sorted([second, third])
    (path / "manifest.json").write_text(text)  # restored from a backup: all its files are still there
    assert verify(open_snapshot(root, str(path.relative_to(root))), "full") == []


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1", "1e300"])
def test_a_lease_of_no_sensible_time_is_damage(tmp_path: Path, seconds: str) -> None:
    with hold_lease(str(tmp_path), "a", 5):
        pointer, version = read_pointer(str(tmp_path))
        assert swap(str(tmp_path), pointer, version)
        text = (tmp_path / "latest.json").read_text()
    (tmp_path / "latest.json").write_text(text.replace('"seconds": 5', f'"seconds": {seconds}'))
    with pytest.raises(InputError, match="is damaged"):
        read_pointer(str(tmp_path))
