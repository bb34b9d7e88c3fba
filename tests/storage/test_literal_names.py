"""Names that look like patterns, escapes or chains: read as they are, or refused when the config is read."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest

from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import (
    arrow_filesystem,
    delete,
    delete_files,
    exists,
    list_files,
    list_folders,
    open_filesystem,
)
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.store import open_store
from rebeca_ray.storage.writable import require_own, require_writable

NAMES = ["a*b", "a[12]b", "{x}", "a b", "a+b", "a%20b", "ä", "**", "[!a]*", "a=b", "a;b", "a,b", "a&b", "~a"]
LOCAL_NAMES = ["a?b", "a::b", "a#b", "a:b", "file:x", "?", "a\\b"]
NEIGHBOURS = ["axb", "a1b", "a2b", "x", "a20b", "abb", "b"]
TABLE = pa.table({"user_id": ["a"], "rank": [0]})


def names_of(root: str) -> list[str]:
    if root.startswith("gs://"):
        return NAMES[:7]  # the fake server is slow
    return NAMES if "://" in root else [*NAMES, *LOCAL_NAMES]


def test_every_verb_takes_a_name_as_it_is(root: str) -> None:
    for name in NEIGHBOURS:
        write_json({"name": name}, f"{root}/{name}/kept.json")
    kept = [f"{root}/{name}/kept.json" for name in sorted(NEIGHBOURS)]
    for name in names_of(root):
        folder = f"{root}/{name}"
        assert absolute(folder) == folder
        assert not exists(folder)
        assert list_files(folder) == list_folders(folder) == []
        delete(folder)
        require_own(folder, "out", {"marker.json": "key"})
        require_writable(folder, "out")
        write_json({"name": name}, f"{folder}/{name}/{name}.json")
        write_table(TABLE, f"{folder}/{name}.parquet", row_group_size=10)
        assert read_json(f"{folder}/{name}/{name}.json") == {"name": name}
        assert read_table(folder, "table").equals(TABLE)
        assert read_table(f"{folder}/{name}.parquet", "table").equals(TABLE)
        assert list_files(folder) == sorted([f"{folder}/{name}.parquet", f"{folder}/{name}/{name}.json"])
        assert list_folders(folder) == [name]
        assert exists(folder)
        assert exists(f"{folder}/{name}.parquet")
        delete_files([f"{folder}/{name}.parquet", f"{folder}/{name}.parquet"])
        assert not exists(f"{folder}/{name}.parquet")
        delete(folder)
        delete(folder)
        assert not exists(folder)
        assert list_files(root) == kept
    delete(f"{root}/{NEIGHBOURS[0]}/kept.json")
    assert len(list_files(root)) == len(kept) - 1


def test_arrows_view_of_a_store_takes_a_name_as_it_is(root: str) -> None:
    """Ray Data and Ray Train remove and copy through it."""
    filesystem = pickle.loads(pickle.dumps(arrow_filesystem(open_filesystem(root)[0])))
    for name in names_of(root):
        folder = f"{root}/{name}"
        for file in (f"{root}/axb/kept", f"{root}/a1b/kept", f"{folder}/one", f"{folder}/two/three"):
            write_json({}, file)
        path = open_filesystem(folder)[1]
        scan = open_store(folder).scan_filesystem()
        with scan.open_output_stream(f"{path}/scan") as file:
            file.write(b"written")
        assert scan.open_input_file(f"{path}/scan").read() == b"written"
        delete(f"{folder}/scan")
        filesystem.copy_file(f"{path}/one", f"{path}/copy")
        filesystem.move(f"{path}/copy", f"{path}/moved")
        assert list_files(folder) == [f"{folder}/moved", f"{folder}/one", f"{folder}/two/three"]
        filesystem.delete_file(f"{path}/moved")
        filesystem.delete_dir(f"{path}/two")
        assert list_files(folder) == [f"{folder}/one"]
        filesystem.delete_dir_contents(path)
        assert list_files(root) == [f"{root}/a1b/kept", f"{root}/axb/kept"]
        delete(folder)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://bucket/a//b", r"holds an empty folder name \(//\); "),
        ("s3://bucket//a", r"holds an empty folder name \(//\); "),
        ("gs://bucket/a//", r"holds an empty folder name \(//\); "),
        ("abfss://box/a//b", r"holds an empty folder name \(//\); "),
        ("s3://bucket/a::b", r"holds '::', "),
        ("simplecache::s3://bucket/a", r"holds '::', "),
        ("s3://bucket/a?b", r"holds '\?', "),
        ("s3a://bucket/a?versionId=3", r"holds '\?', "),
        ("gs://bucket/a#12345", r"holds '#', "),
        ("abfss://box/a?b", r"holds '\?', "),
        ("s3://bucket/a/../b", r"holds the folder '\.\.'; "),
        ("s3://bucket/./b", r"holds the folder '\.'; "),
        ("file:///data/a%20b", r"holds '%', "),
        ("file:///data/a?b", r"holds '\?', "),
        ("file:///data/a#b", r"holds '#', "),
    ],
)
def test_a_name_that_a_client_reads_otherwise_is_refused(uri: str, why: str) -> None:
    for read in (absolute, open_filesystem, list_files):
        with pytest.raises(InputError, match=why) as caught:
            read(uri)
        assert str(caught.value).count(";") == 1


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    out = str(tmp_path / "out")
    for _ in range(2):
        delete(out)
        assert (tmp_path / "out").is_symlink()
        write_table(TABLE, f"{out}/a.parquet", row_group_size=10)
        write_json({"a": 1}, f"{out}/a.json")
        assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a.json", "a.parquet"]
        assert list_files(out) == [f"{out}/a.json", f"{out}/a.parquet"]


def test_a_linked_file_is_written_through_its_link(tmp_path: Path) -> None:
    for name, write in (
        ("a.json", lambda uri: write_json({"a": 1}, uri)),
        ("a.parquet", lambda uri: write_table(TABLE, uri, row_group_size=10)),
    ):
        (tmp_path / "disk").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(f"disk/{name}")
        write(str(tmp_path / name))
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name).stat().st_size > 0
    assert read_json(str(tmp_path / "a.json")) == {"a": 1}


def test_a_folder_is_removed_without_the_targets_of_links_in_it(tmp_path: Path) -> None:
    write_json({}, f"{tmp_path}/precious/a.json")
    write_json({}, f"{tmp_path}/out/b.json")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "precious")
    delete(f"{tmp_path}/out")
    assert list_files(str(tmp_path)) == [f"{tmp_path}/precious/a.json"]
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(InputError, match=rf"^out {tmp_path}/out: cannot be written \("):
        require_writable(f"{tmp_path}/out", "out")
