"""Groups of users: exact figures of a snapshot made by hand, and no group so small that it names somebody."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rebeca_ray import schemas
from rebeca_ray.catalog.file_list import write_file_list
from rebeca_ray.catalog.layout import POPULATION_USER, Run
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.groups import NO_GROUP, SMALL_GROUPS, compare_groups, merged_groups
from rebeca_ray.identity import bucket_of, read_user_key
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from tests.conftest import publish, synthetic_manifest

BUCKETS = 2
EAST, NORTH = [1.0, 0.0], [0.0, 2.0]
# Of each user: requested, failed, stale, cold start, and items as (embedding, like probability, flagged).
KINDS: dict[str, tuple[int, int, bool, bool, list[tuple[list[float], float | None, bool]]]] = {
    "a": (2, 0, False, False, [(EAST, 0.75, False), (NORTH, 0.25, False)]),
    "b": (4, 1, False, True, [(EAST, 0.25, True), (EAST, 0.25, False)]),
    "c": (2, 0, True, False, [(EAST, None, False)]),
    "alone": (1, 0, False, False, [(NORTH, 0.5, False)]),
    "pool": (9, 9, False, True, [(NORTH, 1.0, True)]),
}
KIND_OF = {
    **{f"a{number}": "a" for number in range(25)},
    **{f"b{number}": "b" for number in range(12)},
    **{f"c{number}": "c" for number in range(10)},
    "alone": "alone",
    POPULATION_USER: "pool",
}


def write_snapshot(root: Path, kind_of: dict[str, str], key: str | None = None) -> str:
    """Publish a snapshot of users of some kinds; return its root."""
    run = Run(root=str(root), run_date="2026-03-02", run_id="by-hand", fencing_token=1)
    files: list[Any] = []
    for bucket in range(BUCKETS):
        names = sorted(user for user in kind_of if bucket_of(user, BUCKETS) == bucket)
        for table, rows in (("users", users_of(names, kind_of)), ("items", items_of(names, kind_of))):
            path = run.table(table, bucket)
            embeds = "image_embeds" if table == "items" else None
            written = write_table(rows, f"{root}/{path}", row_group_size=10, embed_column=embeds)
            ends = {"min_user_id": names[0], "max_user_id": names[-1]}
            files.append({"table": table, "bucket": bucket, "file": bucket, "path": path, **written, **ends})
    listing = write_file_list(str(root), run.snapshot, 1, files)
    manifest = synthetic_manifest(run, listing, embed_dim=2, num_buckets=BUCKETS, user_key_fingerprint=key)
    write_json(manifest.model_dump(), run.manifest)
    publish(str(root), run)
    return str(root)


def users_of(names: list[str], kind_of: dict[str, str]) -> pa.Table:
    rows = []
    for name in names:
        requested, failed, stale, cold_start, items = KINDS[kind_of[name]]
        rows.append(
            {
                "user_id": name,
                "num_images": requested,
                "num_items": len(items),
                "num_failed": failed,
                "cold_start": cold_start,
                "stale": stale,
                **dict.fromkeys(("history_digest", "prior", "settings_digest", "planned_by"), ""),
                "generation": 0,
                "planned_on": np.datetime64("2026-03-02").item(),
            }
        )
    return pa.Table.from_pylist(rows, schema=schemas.USERS)


def items_of(names: list[str], kind_of: dict[str, str]) -> pa.Table:
    rows = [
        {
            "item_id": f"{name}-{rank}",
            "user_id": name,
            "rank": rank,
            "image_embeds": embeds,
            "like_probability": like,
            "safety_flag": flagged,
            "origin": "new",
            "generated_at": np.datetime64("2026-03-02T00:00:00", "us").item(),
            "image_file": 0,
            "image_row": 0,
        }
        for name in names
        for rank, (embeds, like, flagged) in enumerate(KINDS[kind_of[name]][4])
    ]
    return pa.Table.from_pylist(rows, schema=schemas.items(2))


def write_groups(folder: Path, groups: dict[str, str]) -> str:
    pq.write_table(pa.table({"user_id": [*groups], "group": [*groups.values()]}), folder / "groups.parquet")
    return str(folder / "groups.parquet")


GROUP_OF = {user: kind for user, kind in KIND_OF.items() if kind in "abc"} | {"nobody": "a"}


def test_the_figures_are_means_over_users(tmp_path: Path) -> None:
    root, groups = write_snapshot(tmp_path / "catalog", KIND_OF), write_groups(tmp_path, GROUP_OF)
    report = compare_groups(read_catalog(root), groups)
    everybody, large, small = report.everybody, *report.groups
    assert [(part.group, part.merged, part.users, part.items) for part in (everybody, large, small)] == [
        ("(all users)", 1, 48, 85),
        ("a", 1, 25, 50),
        (SMALL_GROUPS, 3, 23, 35),
    ]
    means = {
        part.group: [figure and figure.mean for figure in part.figures.values()]
        for part in (everybody, large, small)
    }
    # Like probability, diversity, failed, unsafe, cold start.
    assert means["(all users)"] == pytest.approx([16 / 38, 25 / 37, 3 / 48, 6 / 48, 12 / 48])
    assert means["a"] == pytest.approx([0.5, 1.0, 0.0, 0.0, 0.0])
    assert means[SMALL_GROUPS] == pytest.approx([3.5 / 13, 0.0, 3 / 23, 6 / 23, 12 / 23])
    figures = {name: figure for name, figure in small.figures.items() if figure}
    assert (figures["like_probability"].users, figures["diversity"].users) == (13, 12)
    assert all(figure.low <= figure.mean <= figure.high for figure in figures.values())
    assert all(figure.differs for figure in figures.values())
    assert not any(figure.differs for figure in everybody.figures.values() if figure)


def test_groups_that_are_large_enough_stand_alone_and_a_figure_may_be_missing(tmp_path: Path) -> None:
    root = write_snapshot(tmp_path / "catalog", KIND_OF)
    groups = write_groups(tmp_path, {**GROUP_OF, "alone": "b"})
    report = compare_groups(read_catalog(root), groups, min_users=10)
    assert [(part.group, part.users) for part in report.groups] == [("a", 25), ("b", 13), ("c", 10)]
    last = report.groups[-1].figures
    assert (last["like_probability"], last["diversity"]) == (None, None)
    assert last["unsafe"] is not None
    assert last["unsafe"].mean == 0.0


def test_the_command_prints_a_table_or_json_also_of_pseudonyms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REBECA_USER_KEY", "a secret of sixteen bytes or more")
    key = read_user_key("env:REBECA_USER_KEY")
    assert key is not None
    hidden = {key.pseudonym(user): kind for user, kind in KIND_OF.items()}
    root = write_snapshot(tmp_path / "catalog", hidden, key.fingerprint)
    groups = write_groups(tmp_path, GROUP_OF)
    printed = CliRunner().invoke(app, ["catalog", "groups", root, groups, "--json"])
    values = json.loads(printed.stdout)
    assert [(part["group"], part["users"]) for part in values["groups"]] == [("a", 25), (SMALL_GROUPS, 23)]
    assert values["groups"][0]["figures"]["failed"] == {
        "users": 25,
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
        "differs": True,
    }
    table = CliRunner().invoke(app, ["catalog", "groups", root, groups])
    assert "0.500]*" in table.stdout  # a narrow terminal breaks the cell before it


@pytest.mark.parametrize(
    ("groups", "min_users", "message"),
    [
        ({"x": "a"}, 20, "none of its 1 users is in catalog"),
        ({"a1": ""}, 20, "1 of 1 rows have an empty group"),
        ({"a1": NO_GROUP}, 20, r"'\(no group\)' is a name of the report; give the group another"),
        ({"a1": "a"}, 49, "48 users, fewer than --min-users 49"),
    ],
)
def test_bad_groups_are_refused(tmp_path: Path, groups: dict[str, str], min_users: int, message: str) -> None:
    snapshot = read_catalog(write_snapshot(tmp_path / "catalog", KIND_OF))
    with pytest.raises(InputError, match=message):
        compare_groups(snapshot, write_groups(tmp_path, groups), min_users)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 25))
def test_no_part_is_small_unless_all_users_are_few(sizes: list[int], min_users: int) -> None:
    group_U = [f"group {number}" for number, size in enumerate(sizes) for _ in range(size)]
    parts = merged_groups(group_U, min_users)
    assert sorted(name for names in parts.values() for name in names) == sorted(set(group_U))
    if sum(sizes) >= min_users:
        assert min(sum(map(group_U.count, names)) for names in parts.values()) >= min_users
    # Nothing is merged without need.
    assert len(parts) >= sum(size >= min_users for size in sizes)
