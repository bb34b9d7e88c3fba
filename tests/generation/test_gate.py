"""The quality gate: a prior that samples the same for everybody stops a run before it is rendered."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray.catalog.figures import GateFigures
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Counts, Manifest, PermutationFigures, Quality
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import GateSettings
from rebeca_ray.generation.gate import MAX_ITEMS_PER_USER, check_plan, plan_test, read_sample, refusals
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.records import write_record
from tests.conftest import D, plan, prior_users, write_tiny_prior

NUM_FACTORS = 4


def write_plan(folder: Path, *, users: int, personal: bool, items: int = 3, origin: str = "new") -> Run:
    """A plan of two files. Its drawn candidates please their user, or else another user."""
    random = np.random.default_rng(0)
    factors = random.standard_normal((users, NUM_FACTORS + 1)).astype(np.float32)
    owner = np.repeat(np.arange(users), items)
    table = pa.table(
        {
            "user_id": [f"user-{number:04d}" for number in owner],
            "rank": pa.array(np.tile(np.arange(items), users), pa.int16()),
            "user_factors": pa.array(list(factors[owner]), pa.list_(pa.float32())),
            "sampled_factors": pa.array(
                list(factors[owner if personal else (owner + 7) % users]), pa.list_(pa.float32())
            ),
            "origin": [origin] * len(owner),
        }
    )
    run = Run(root=str(folder), run_date="2026-01-01", run_id="run", fencing_token=1)
    Path(run.plan).mkdir(parents=True)
    half = table.num_rows // 2
    record_plan(run, {"a.parquet": table.slice(0, half), "b.parquet": table.slice(half)})
    return run


def record_plan(run: Run, tables: dict[str, pa.Table]) -> None:
    """Write the files of a plan and their record."""
    parts = []
    for name, table in tables.items():
        pq.write_table(table, f"{run.plan}/{name}")
        part = PartRecord(
            bucket=0,
            shard=0,
            attempt=0,
            path=f"plan/{name}",
            rows=table.num_rows,
            bytes=1,
            sha256="",
            failed=0,
            busy_seconds=0.0,
        )
        parts.append(asdict(part))
    write_record({"decisions": "", "parts": parts}, run.plan_marker)


def test_a_personal_plan_passes_with_its_figures(tmp_path: Path) -> None:
    test, refusal = check_plan(write_plan(tmp_path, users=30, personal=True), GateSettings())
    assert refusal is None
    assert test is not None
    assert test.num_users == 30
    assert test.p_value == 1 / 10_001  # no permutation comes near
    assert test.effect > 0.05
    assert test.figures()["z_at_210_users"] == round(test.z * (209 / 29) ** 0.5, 2)


def test_an_impersonal_plan_stops_the_run_unless_the_bound_is_null(tmp_path: Path) -> None:
    run = write_plan(tmp_path, users=30, personal=False)
    _, refusal = check_plan(run, GateSettings())
    assert refusal is not None
    assert re.search(r"its own users no more than others.*30 users.*gate\.max_p_value is 0\.01", refusal)
    test, refusal = check_plan(run, GateSettings(max_p_value=None))
    assert refusal is None
    assert test is not None
    assert test.p_value > 0.01


def test_few_users_are_tested_but_stop_nothing(tmp_path: Path) -> None:
    test, refusal = check_plan(write_plan(tmp_path, users=19, personal=False), GateSettings())
    assert refusal is None
    assert test is not None
    assert test.num_users == 19


def test_items_of_the_population_pool_are_not_tested(tmp_path: Path) -> None:
    run = write_plan(tmp_path, users=30, personal=False, origin="population")
    assert check_plan(run, GateSettings()) == (None, None)


def test_a_large_plan_is_sampled(tmp_path: Path) -> None:
    sample = read_sample(write_plan(tmp_path, users=2500, personal=True, items=12))
    _, counts = np.unique(sample["user_id"].to_numpy(zero_copy_only=False), return_counts=True)
    assert len(counts) == 2000
    assert counts.max() == MAX_ITEMS_PER_USER


def test_a_prior_that_ignores_its_users_fails_whatever_the_selector_chose(
    config: GenerateConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    users = [f"user-{number}" for number in range(40)]
    uri = write_tiny_prior(tmp_path, users=prior_users(users), selector=Selector(D, NUM_FACTORS))
    prior = load_prior(uri)
    assert prior.user_rows is not None
    same_for_everybody = torch.zeros_like(prior.user_rows)
    save_prior(replace(prior, user_rows=same_for_everybody), uri)
    planned = plan(config.model_copy(update={"prior": uri}), pa.table({"user_id": users}))
    run = Run(root=str(tmp_path), run_date="2026-01-01", run_id="run", fencing_token=1)
    Path(run.plan).mkdir(parents=True)
    record_plan(run, {"a.parquet": planned})
    assert "pleases its own users no more than others" in str(check_plan(run, GateSettings())[1])
    chosen = [float(value) for value in planned["like_probability"].to_pylist()]
    test = plan_test(read_sample(run))
    assert test is not None
    # The chosen items please the selector, whoever they were drawn for.
    assert np.mean(chosen) > test.matched_mean + 3 * test.null_std


def manifest_of(**changes: float | None) -> Manifest:
    """A snapshot of 1,000 items, with some figures changed."""
    counts: dict[str, Any] = {
        "requested": 1000,
        "new": 600,
        "carried": 300,
        "population": 90,
        "failed": 0,
        "filtered": 10,
        "deferred": 0,
        "users": 100,
        "stale_users": 0,
    }
    figures: dict[str, Any] = {
        "failed": 0.0,
        "filtered": 0.01,
        "duplicates": 0.0,
        "like_probability": 0.5,
        "diversity": 0.4,
        "judged_items": 1000,
    }
    permutation: dict[str, Any] = {
        "matched": 0.6,
        "shuffled": 0.5,
        "effect": 0.2,
        "p_value": 0.0001,
        "users": 100,
        "z": 9.0,
        "z_at_210_users": 13.0,
    }
    for name, value in changes.items():
        next(section for section in (figures, counts, permutation) if name in section)[name] = value
    return Manifest.model_construct(
        counts=Counts.model_construct(**counts),
        figures=GateFigures(**figures),
        quality=Quality(
            permutation=None if permutation["effect"] is None else PermutationFigures(**permutation)
        ),
    )


@pytest.mark.parametrize(
    ("gate", "now", "reason"),
    [
        ({"min_items": 991}, {}, "items is 990, 1 below gate.min_items 991"),
        ({"min_users": 100}, {"users": 99}, "users is 99, 1 below gate.min_users 100"),
        ({"min_effect": 0.1}, {"effect": 0.05}, "effect is 0.05, 0.05 below gate.min_effect 0.1"),
        (
            {"min_like_probability": 0.45},
            {"like_probability": 0.4},
            "like_probability is 0.4, 0.05 below gate.min_like_probability 0.45",
        ),
        ({"min_diversity": 0.35}, {"diversity": 0.3}, "diversity is 0.3, 0.05 below gate.min_diversity 0.35"),
        ({"max_failed": 0.01}, {"failed": 0.015}, "failed is 1.50%, 0.50% above gate.max_failed 1.00%"),
        (
            {"max_filtered": 0.1},
            {"filtered": 0.25},
            "filtered is 25.00%, 15.00% above gate.max_filtered 10.00%",
        ),
        (
            {"max_duplicates": 0.0},
            {"duplicates": 0.01},
            "duplicates is 1.00%, 1.00% above gate.max_duplicates 0.00%",
        ),
    ],
)
def test_every_bound_refuses_with_the_figure_and_the_distance(
    gate: dict[str, Any], now: dict[str, Any], reason: str
) -> None:
    loose = {"max_drop": None, "max_rise": None, "max_filtered": None, "max_duplicates": None}
    bounded = GateSettings.model_validate({**loose, **gate})
    assert refusals(manifest_of(**now), manifest_of(), bounded) == [reason]
    assert refusals(manifest_of(**now), manifest_of(), GateSettings.model_validate(loose)) == []


@pytest.mark.parametrize("name", ["users", "effect", "like_probability", "diversity"])
def test_a_drop_against_the_last_snapshot_refuses(name: str) -> None:
    gate, before = GateSettings(), manifest_of()
    former = {"users": 100, "effect": 0.2, "like_probability": 0.5, "diversity": 0.4}[name]
    assert refusals(manifest_of(**{name: 0.81 * former}), before, gate) == []
    (reason,) = refusals(manifest_of(**{name: 0.79 * former}), before, gate)
    assert reason == (
        f"{name} is {0.79 * former:g}, 21.0% below the previous snapshot's {former:g} "
        "(gate.max_drop is 20.0%)"
    )


@pytest.mark.parametrize("name", ["failed", "filtered", "duplicates"])
def test_a_rise_against_the_last_snapshot_refuses(name: str) -> None:
    gate = GateSettings(max_filtered=None, max_duplicates=None)
    assert refusals(manifest_of(**{name: 0.05}), manifest_of(**{name: 0.01}), gate) == []
    (reason,) = refusals(manifest_of(**{name: 0.07}), manifest_of(**{name: 0.01}), gate)
    assert reason == f"{name} is 7.00%, 6.00% above the previous snapshot's 1.00% (gate.max_rise is 5.00%)"


def test_figures_of_few_items_stop_nothing() -> None:
    few = manifest_of(judged_items=99, like_probability=0.0, diversity=0.0, duplicates=1.0)
    assert refusals(few, manifest_of(), GateSettings()) == []
    unknown = manifest_of(like_probability=None, diversity=None, duplicates=None, effect=None)
    assert refusals(unknown, manifest_of(), GateSettings()) == []
