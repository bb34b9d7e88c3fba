"""Folders that are replaced as a whole: pointer, lease, leftovers and the older layout."""

import datetime
import logging
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog import versions
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Kind, read_pointer
from rebeca_ray.catalog.versions import current_version, replace_version
from rebeca_ray.errors import InputError, LeaseHeldError, StorageError
from rebeca_ray.storage.filesystem import join, list_files
from rebeca_ray.storage.objects import read_json, write_json

DATE = datetime.date(2026, 3, 1)


@pytest.fixture(params=["local", "s3"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    return f"s3://rebeca/{tmp_path.name}"


def write(root: str, value: int, kind: Kind = "prior", uses: tuple[str, ...] = ()) -> str:
    """Publish a version with one file; return the name of the version."""
    with replace_version(root, kind, "train") as version:
        folder = version.begin(f"fp{value}")
        write_json({"value": value}, join(folder, "config.json"))
        version.publish(DATE, uses=uses)
    return folder.rpartition("/")[2]


def value_at(root: str, kind: Kind = "prior") -> int | None:
    return (read_json(join(current_version(root, kind), "config.json")) or {}).get("value")


def files(root: str) -> list[str]:
    """Return the files of a folder but those of the pointer."""
    names = [uri.removeprefix(f"{root}/") for uri in list_files(root)]
    return [name for name in names if name not in ("prior.json", "items.json", ".prior.lock", ".items.lock")]


def test_readers_follow_the_pointer_and_the_previous_version_stays_for_one_publication(root: str) -> None:
    assert current_version(root, "prior") == root
    assert value_at(root) is None
    names = []
    for value in (1, 2, 3):
        names.append(write(root, value))
        assert value_at(root) == value
        assert files(root) == [f"_versions/{name}/config.json" for name in names[-2:]]
    assert names == ["00000001-fp1", "00000002-fp2", "00000003-fp3"]
    pointer, _ = read_pointer(root, "prior")
    assert (pointer.run_date, pointer.lease) == ("2026-03-01", None)


def test_a_version_that_others_list_files_of_stays(root: str) -> None:
    first = write(root, 1, "items")
    write(root, 2, "items", uses=(first,))
    third = write(root, 3, "items", uses=(first,))
    assert files(root) == [f"_versions/{name}/config.json" for name in (first, "00000002-fp2", third)]


def test_the_older_layout_is_a_version_like_any_other(root: str) -> None:
    for name in ("config.json", "training.csv", "theirs.txt", "notes/README.md"):
        write_json({"value": 0}, join(root, name))
    assert value_at(root) == 0
    write(root, 1)
    assert value_at(root) == 1
    assert read_json(join(root, "config.json")) == {"value": 0}  # its readers can finish
    write(root, 2)
    assert files(root) == [
        "_versions/00000001-fp1/config.json",
        "_versions/00000002-fp2/config.json",
        "notes/README.md",
        "theirs.txt",
    ]


def test_files_of_others_in_the_root_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("theirs")
    for value in (1, 2, 3):
        write(str(tmp_path), value)
    assert (tmp_path / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("error", [StorageError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_published_version_alone(root: str, error: BaseException) -> None:
    name = write(root, 1)
    with pytest.raises(type(error)), replace_version(root, "prior", "train") as version:  # noqa: PT012
        write_json({"value": 2}, join(version.begin("fp2"), "config.json"))
        raise error
    assert value_at(root) == 1
    assert files(root) == [f"_versions/{name}/config.json"]
    assert read_pointer(root, "prior")[0].lease is None


def test_the_leftover_of_a_killed_writer_goes_with_the_next_one(root: str) -> None:
    with hold_lease(root, "train", 1.0, "prior"):
        write_json({"value": 7}, join(root, "_versions", "00000001-fp7", "model.safetensors"))
    with replace_version(root, "prior", "train"):
        assert files(root) == []
    names = [write(root, value) for value in (1, 2)]
    write_json({"value": 7}, join(root, "_versions", "00000009-fp7", "config.json"))
    with replace_version(root, "prior", "train"):
        assert value_at(root) == 2
        assert files(root) == [f"_versions/{name}/config.json" for name in names]


def test_a_lost_pointer_costs_no_version_before_there_is_another(tmp_path: Path) -> None:
    root = str(tmp_path)
    names = [write(root, value) for value in (1, 2)]
    (tmp_path / "prior.json").unlink()
    with pytest.raises(ZeroDivisionError), replace_version(root, "prior", "train"):
        raise ZeroDivisionError
    assert files(root) == [f"_versions/{name}/config.json" for name in names]
    write(root, 3)
    assert value_at(root) == 3


def test_one_of_two_writers_works(tmp_path: Path) -> None:
    root = str(tmp_path)
    message = rf"^prior {root}: run train \(fencing token 1\) is at work on it"
    with (
        hold_lease(root, "train", 1.0, "prior"),
        pytest.raises(LeaseHeldError, match=message),
        replace_version(root, "prior", "train"),
    ):
        pass
    with replace_version(root, "items", "embed"):  # a lease of another kind
        pass


def test_a_writer_that_lost_its_lease_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), 1)
    monkeypatch.setattr(versions, "LEASE_SECONDS", 10_000.0)  # it is silent meanwhile
    with (  # noqa: PT012
        pytest.raises(LeaseHeldError, match="it publishes nothing"),
        replace_version(str(tmp_path), "prior", "train") as version,
    ):
        write_json({"value": 2}, join(version.begin("fp2"), "config.json"))
        pointer = read_json(str(tmp_path / "prior.json")) or {}
        pointer["lease"]["holder"] = "another"
        write_json(pointer, str(tmp_path / "prior.json"))
        version.publish(DATE)
    assert value_at(str(tmp_path)) == 1


@pytest.mark.parametrize("text", ['{"snapshot": 7}', "[]", "{"])
def test_a_damaged_pointer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "items.json").write_text(text)
    with pytest.raises(InputError, match=r"items.json.*; .*remove it"):
        current_version(str(tmp_path), "items")
    with pytest.raises(InputError, match=r"^items .*items.json is damaged; remove it, and write a new"):
        write(str(tmp_path), 1, "items")


def test_a_file_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str) -> None:
        raise StorageError(f"{uri}: cannot be removed; check the path")

    for value in (1, 2):
        write(str(tmp_path), value)
    monkeypatch.setattr(versions, "delete", refuse)
    with caplog.at_level(logging.WARNING):
        write(str(tmp_path), 3)
    assert value_at(str(tmp_path)) == 3
    assert "an old version is not removed yet" in caplog.text
