"""The example ranker on two kinds of items far apart: once as a script, then in this process."""

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from typer.testing import CliRunner

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.console import console
from rebeca_ray.data.histories import histories_table
from rebeca_ray.data.interactions import interactions_of
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.prior.users import History
from rebeca_ray.training.selector import fit_selector
from tests.conftest import REPO, USERS, D
from tests.generation.test_nights import night

SCRIPT = REPO / "infra" / "examples" / "rank_example.py"


@pytest.fixture
def world(config: GenerateConfig, tmp_path: Path) -> tuple[Snapshot, list[str]]:
    """Write a catalog, forty real items, ratings, and a selector that is fitted to them.

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
    add_selector(config.prior, table.slice(0, len(rows) - 1), embeds)
    options = [
        "--catalog",
        config.catalog,
        "--items",
        f"{tmp_path}/forty.parquet",
        "--interactions",
        f"{tmp_path}/rated.parquet",
        "--prior",
        config.prior,
    ]
    return snapshot, options


def add_selector(prior: str, ratings: pa.Table, embeds: np.ndarray) -> None:
    """Fit a selector to ratings of the items `i00`, `i01`, …, and add it to a prior."""
    trained = load_prior(prior)
    interactions = interactions_of(ratings, InteractionSettings(path="of the test", hold_out=0.0))
    item_index = np.array([int(item_id[1:]) for item_id in interactions.item_id])
    block = UserBlock(histories_table(interactions, item_index, bucket=0), np.zeros(1, int))
    x0_ID = trained.scaler.scale(torch.from_numpy(embeds)).numpy()
    save_prior(replace(trained, selector=fit_selector([block], x0_ID, seed=0)), prior)


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {"COLUMNS": "200", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, env=environment)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Return what the script would, without the seconds of its start."""
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["rank"])
    with patch.multiple(console, _width=200, _height=50):
        result = CliRunner().invoke(app, options)
    return subprocess.CompletedProcess(options, result.exit_code, result.stdout, result.stderr)


def rate_nothing_known(items: str) -> Path:
    """Write interactions with unknown items."""
    path = Path(items).with_name("others.parquet")
    pq.write_table(
        pa.table({"user_id": ["a"], "item_id": ["unheard-of"], "rating": pa.array([5.0], pa.float32())}), path
    )
    return path


def rows_of(finished: subprocess.CompletedProcess[str]) -> list[tuple[str, ...]]:
    """Return number, like probability, kind and id of each row."""
    assert finished.returncode == 0, finished.stderr
    return re.findall(r"│ (\d+) +│ ([\d.]+) +│ (\w+) +│ (\w+) +│", finished.stdout)


def test_it_ranks_unrated_items_retrieved_and_generated_together(world: tuple[Snapshot, list[str]]) -> None:
    snapshot, options = world
    finished = run_script(*options, "--user", USERS[0], "--top", "100")
    rows = rows_of(finished)
    # 24 real items that the user has not rated, and two generated ones.
    assert [int(row[0]) for row in rows] == list(range(1, 27))
    probability = [float(row[1]) for row in rows]
    assert probability == sorted(probability, reverse=True)
    generated = {row[3] for row in rows if row[2] == "generated"}
    assert generated == set(snapshot.for_user(USERS[0])["item_id"].to_pylist()[1:])  # the first was rated
    ratings = pq.read_table(options[options.index("--interactions") + 1]).to_pylist()
    rated = {row["item_id"] for row in ratings if row["user_id"] == USERS[0]}
    retrieved = [row[3] for row in rows if row[2] == "retrieved"]
    assert set(retrieved) == {f"i{number:02d}" for number in range(40)} - rated
    kind = [int(item_id[1:]) // 20 for item_id in retrieved]
    assert kind == sorted(kind)  # this user likes the first kind
    assert "2 of these 26 items are generated, 24 are retrieved real items" in finished.stdout

    # Fewer rows are the first of the same ranking.
    finished = run(*options, "--user", USERS[0], "--top", "7")
    assert rows_of(finished) == rows[:7]


def test_like_probabilities_are_those_of_the_selector(world: tuple[Snapshot, list[str]]) -> None:
    snapshot, options = world
    prior, user = load_prior(options[options.index("--prior") + 1]), USERS[3]
    assert prior.selector is not None
    real = read_image_embeds(options[options.index("--items") + 1])
    x_ID = prior.scaler.scale(torch.from_numpy(real.image_embeds))
    ratings = pq.read_table(options[options.index("--interactions") + 1]).to_pylist()
    likes = {int(row["item_id"][1:]): row["rating"] > 3 for row in ratings if row["user_id"] == user}
    history = History(
        x_ID[list(likes)][None],
        torch.tensor([list(likes.values())]).long(),
        torch.zeros(1, 16),
        torch.ones(1, 16, dtype=torch.bool),
    )
    with torch.inference_mode():
        factor_1F = prior.selector.user_factors(history)
    items = snapshot.for_user(user, ["item_id", "image_embeds"])
    embeds = torch.tensor(items["image_embeds"].to_pylist(), dtype=torch.float32)
    x_ND = torch.cat([x_ID, prior.scaler.scale(embeds)])
    like_N = prior.selector.like_probability(x_ND, factor_1F.expand(len(x_ND), -1)).tolist()
    expected = dict(zip([*real.item_id, *items["item_id"].to_pylist()], like_N, strict=True))
    rows = rows_of(run(*options, "--user", user, "--top", "100"))
    assert len(rows) == 40 - 16 + 3
    for _, probability, _, item_id in rows:
        assert float(probability) == pytest.approx(expected[item_id], abs=0.0006)


def test_a_prior_without_a_selector_is_refused(world: tuple[Snapshot, list[str]]) -> None:
    prior = world[1][-1]
    save_prior(replace(load_prior(prior), selector=None), prior)
    finished = run(*world[1])
    assert (finished.returncode, finished.stderr) == (
        2,
        f"error: prior {prior}: has no selector; train it on ratings with likes\n",
    )


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
    finished = run(*world[1], "--interactions", str(rate_nothing_known(world[1][3])), "--user", USERS[0])
    assert (finished.returncode, finished.stderr.split(";")[0]) == (
        2,
        "error: interactions: none of them rates a known item",
    )
    finished = run("--catalog", "/nowhere")
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
