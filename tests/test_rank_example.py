"""The example ranker, run from the command line, on two kinds of items far apart."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from tests.conftest import REPO, USERS, D
from tests.generation.test_nights import night


@pytest.fixture
def world(config: GenerateConfig, tmp_path: Path) -> tuple[Snapshot, list[str]]:
    """Write a catalog, forty real items, and ratings.

    Each user likes one kind, and one rated a generated item.
    """
    _, snapshot = night(config, USERS[:5])
    random = np.random.default_rng(0)
    centres = np.repeat(random.standard_normal((2, D)) * 3, 20, axis=0)
    embeds = (centres + 0.5 * random.standard_normal((40, D))).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(
        pa.table({"item_id": [f"i{number:02d}" for number in range(40)], "image_embeds": column}),
        tmp_path / "forty.parquet",
    )
    rows = [
        (user, f"i{item:02d}", 5.0 if item // 20 == number % 2 else 1.0)
        for number, user in enumerate(USERS)
        for item in random.choice(40, 16, replace=False)
    ]
    rows.append((USERS[0], snapshot.for_user(USERS[0])["item_id"][0].as_py(), 5.0))
    user_id, item_id, rating = zip(*rows, strict=True)
    table = pa.table({"user_id": user_id, "item_id": item_id, "rating": pa.array(rating, pa.float32())})
    pq.write_table(table, tmp_path / "rated.parquet")
    options = [
        "--catalog",
        config.catalog,
        "--items",
        f"{tmp_path}/forty.parquet",
        "--interactions",
        f"{tmp_path}/rated.parquet",
    ]
    return snapshot, options


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {"COLUMNS": "200", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, REPO / "infra" / "examples" / "rank_example.py", *options],
        capture_output=True,
        text=True,
        env=environment,
    )


def rate_nothing_known(items: str) -> Path:
    """Write interactions with unknown items."""
    path = Path(items).with_name("others.parquet")
    pq.write_table(
        pa.table({"user_id": ["a"], "item_id": ["unheard-of"], "rating": pa.array([5.0], pa.float32())}), path
    )
    return path


def test_it_ranks_unrated_items_real_and_generated_together(world: tuple[Snapshot, list[str]]) -> None:
    snapshot, options = world
    finished = run(*options, "--user", USERS[0], "--top", "100")
    assert finished.returncode == 0, finished.stderr
    rows = re.findall(r"│ (\d+) +│ ([\d.]+) +│ (\w+) +│ (\w+) +│", finished.stdout)
    # 24 real items that the user has not rated, and two generated ones.
    assert [int(row[0]) for row in rows] == list(range(1, 27))
    probability = [float(row[1]) for row in rows]
    assert probability == sorted(probability, reverse=True)
    generated = {row[3] for row in rows if row[2] == "generated"}
    assert generated == set(snapshot.for_user(USERS[0])["item_id"].to_pylist()[1:])  # the first was rated
    kind = [int(row[3][1:]) // 20 for row in rows if row[2] == "real"]
    assert kind == sorted(kind)  # this user likes the first kind
    assert "2 of the best 26 are generated; of all 26 ranked items 2 are" in finished.stdout


def test_it_takes_a_user_of_the_catalog_by_default_and_refuses_an_unknown_one(
    world: tuple[Snapshot, list[str]],
) -> None:
    finished = run(*world[1], "--top", "3")
    assert re.search(r"for user-[0-4]: \d+ likes and \d+ dislikes", finished.stdout)
    finished = run(*world[1], "--user", "nobody")
    assert (finished.returncode, finished.stderr) == (
        2,
        "error: user 'nobody': neither in the catalog nor in the interactions; give another with --user\n",
    )
    finished = run(*world[1][:4], "--interactions", str(rate_nothing_known(world[1][3])), "--user", USERS[0])
    assert (finished.returncode, finished.stderr.split(";")[0]) == (
        2,
        "error: interactions: none of them rates a known item",
    )
    finished = run("--catalog", "/nowhere")
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
