"""Inputs of somebody who means harm: one line, little memory, nothing written, nothing removed elsewhere."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.items import open_items, read_item_ids
from rebeca_ray.errors import InputError, UserError
from rebeca_ray.storage import expansion
from rebeca_ray.storage.listing import list_data
from rebeca_ray.storage.objects import read_json
from rebeca_ray.storage.parquet import open_parquet
from rebeca_ray.storage.records import read_record
from tests.conftest import USERS, prior_users, write_tiny_prior
from tests.data.pictures import picture
from tests.generation.test_nights import change_digest, night

READ = """
import resource, sys
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_DATA, (before * 1024 + 2**32, before * 1024 + 2**32))
for path in sys.argv[1:]:
    try:
        read_interactions(InteractionSettings(path=path))
    except UserError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


def repeated(text: str | bytes, rows: int) -> pa.Array:
    """Return a column that holds one value, and its index once per row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def test_a_small_file_that_stands_for_gigabytes_is_refused_before_they_are_made(tmp_path: Path) -> None:
    """200 GB of one id, and more rows than a file of its size can tell apart."""
    long, many = tmp_path / "long.parquet", tmp_path / "many.parquet"
    pq.write_table(
        pa.table({"user_id": repeated("x" * 100_000, 2_000_000), "item_id": repeated("i", 2_000_000)}), long
    )
    rows = expansion.FREE_ROWS + 5_000_000
    columns = {"user_id": repeated("u", rows), "item_id": repeated("i", rows)}
    pq.write_table(pa.table(columns), many, max_rows_per_page=rows)
    assert long.stat().st_size + many.stat().st_size < 100_000
    ended = subprocess.run(
        [sys.executable, "-c", READ, long, many], capture_output=True, text=True, check=True, timeout=100
    )
    first, second = ended.stdout.splitlines()
    assert f"interactions {long}: not readable as Parquet (its " in first
    assert "stand for texts of more than 1,075," in first
    assert f"{many}: many.parquet is damaged: its footer claims {rows:,} rows, but it has" in second
    assert max(int(line.split()[0]) for line in (first, second)) < 200
    assert ended.stderr == ""


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 2**20)


@pytest.mark.usefixtures("little_memory")
def test_the_texts_of_a_file_are_counted_where_one_of_them_is_long(tmp_path: Path) -> None:
    """One long text among many short ones is read; as many long ones as fit into the file are not."""
    path = tmp_path / "a.parquet"
    for longs, fits in ((1, True), (3_000, False)):
        index = np.zeros(5_000, np.int32)
        index[:longs] = 1
        prompt = pa.DictionaryArray.from_arrays(pa.array(index), pa.array(["short", "y" * 9_000]))
        pq.write_table(pa.table({"user_id": [f"u{row}" for row in range(5_000)], "prompt": prompt}), path)
        table = open_parquet(str(path), "request")
        columns = pa.schema([schemas.REQUEST.field(name) for name in ("user_id", "prompt")])
        if fits:
            assert table.read(columns).num_rows == 5_000
        else:
            with pytest.raises(InputError, match="stand for texts of more than .*; write it again"):
                table.read(columns)


@pytest.mark.usefixtures("little_memory")
def test_long_texts_in_many_row_groups_are_added_up(tmp_path: Path) -> None:
    """Without a dictionary, a first row without a text tells nothing of those after it."""
    path, rows = tmp_path / "a.parquet", 20_000
    prompts = [None if row % 200 == 0 else "z" * 9_000 for row in range(rows)]
    table = pa.table({"user_id": [f"u{row}" for row in range(rows)], "prompt": prompts})
    pq.write_table(table, path, row_group_size=200, use_dictionary=False, compression="zstd")
    with pytest.raises(InputError, match="its footer claims .* bytes of one column"):
        open_parquet(str(path), "request")


@pytest.mark.parametrize("field", ["bytes", "path"])
@pytest.mark.usefixtures("little_memory")
def test_one_image_many_times_is_counted_too(tmp_path: Path, field: str) -> None:
    path, rows = tmp_path / "items.parquet", 10_000
    texts = {"bytes": repeated(picture(), rows), "path": repeated("path", rows)}
    texts[field] = repeated(texts[field].dictionary[0].as_py() * 2_000, rows)
    image = pa.StructArray.from_arrays([*texts.values()], [*texts])
    pq.write_table(pa.table({"item_id": [str(row) for row in range(rows)], "image": image}), path)
    with pytest.raises(InputError, match="stand for texts of more than"):
        list(open_parquet(str(path), "items").batches(schemas.ITEMS, 16))
    assert len(read_item_ids(open_items(str(path)))) == rows  # without the images


@pytest.mark.usefixtures("little_memory")
def test_a_packed_csv_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    rows = gzip.compress(b"u,i\n" * 2**18)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n") + rows * 8)
    with pytest.raises(InputError, match=r"not readable as CSV \(its .* bytes stand for texts of more than"):
        read_interactions(InteractionSettings(path=str(tmp_path)))


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"checksum":['])
def test_json_that_is_nested_without_end_is_refused(tmp_path: Path, opening: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(opening * 200_000)
    with pytest.raises(InputError, match="not valid JSON; restore it"):
        read_json(str(path))
    assert read_record(str(path)) is None
    for text in (opening * 4_000, "a: " + "[" * 40_000, "{a: " * 20_000):
        path.write_text(text)
        with pytest.raises(InputError, match="not valid YAML"):
            load_config(GenerateConfig, path)


def test_yaml_that_multiplies_itself_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="found an alias, write the value itself in line 2"):
        load_config(GenerateConfig, tmp_path / "a.yaml")


def test_an_id_is_never_a_path(config: GenerateConfig, tmp_path: Path) -> None:
    """A night of users of such names writes below its catalog alone, and every user is read back."""
    names = ["../../x", "/etc/passwd", "..", "a/../../b", "%2e%2e%2f", "~/x", "*", "s3://b/x", "x" * 1000]
    write_tiny_prior(tmp_path, users=prior_users(names))
    before = set(tmp_path.rglob("*"))
    _, snapshot = night(config, names)
    assert [snapshot.for_user(name).num_rows for name in names] == [3] * len(names)
    written = {str(path.relative_to(tmp_path)) for path in {*tmp_path.rglob("*")} - before}
    assert {path for path in written if path != "catalog" and not path.startswith("catalog/")} == set()
    assert all(re.fullmatch(r"[\w./=-]+", path) and len(path) < 250 for path in written)


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    """Twenty-four links would otherwise stand for sixteen million folders, and a link upwards for no end."""
    pq.write_table(pa.table({"item_id": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "up").symlink_to(tmp_path)
    for level in range(12):
        for side in "lr":
            (tmp_path / f"{level}").mkdir(exist_ok=True)
            (tmp_path / f"{level}" / side).symlink_to(tmp_path / f"{level + 1}")
    (tmp_path / "12").mkdir()
    pq.write_table(pa.table({"item_id": ["b"]}), tmp_path / "12" / "b.parquet")
    assert [Path(file.path).name for file in list_data(str(tmp_path), "items")] == ["b.parquet", "a.parquet"]


def test_a_collection_removes_nothing_behind_a_link(config: GenerateConfig, tmp_path: Path) -> None:
    """A link in the folder of a run leads to files with the names of ours. They stay."""
    first, _ = night(config, USERS[:2])
    for number in (1, 2):
        change_digest(config, USERS[0])
        change_digest(config, USERS[1])
        night(config, USERS[:2], number)
    theirs = tmp_path / "theirs" / "part-000001-0123456789abcdef.parquet"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    folder = Path(config.catalog, "images", f"run_id={first.run_id}")
    (folder / "bucket=999").symlink_to(theirs.parent)
    garbage = collect(config.catalog, keep=1, grace_hours=0)
    assert first.run_id in garbage.runs
    assert theirs.read_text() == "theirs"


def test_a_manifest_that_names_files_elsewhere_is_refused(config: GenerateConfig) -> None:
    _, snapshot = night(config, USERS[:1])
    manifest = Path(config.catalog, snapshot.path, "manifest.json")
    for path in ("../../etc/x", "/etc/passwd", "a//b", "./a"):
        values = json.loads(manifest.read_text())
        values["files"]["path"] = path
        manifest.write_text(json.dumps(values))
        with pytest.raises(UserError, match="is no path below the root"):
            read_catalog(config.catalog)
