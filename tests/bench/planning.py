"""Rows planned per second with a stand-in network, to measure the code around the network.

`PYTHONPATH=. python tests/bench/planning.py [--rounds 5] [--against PATH]` writes results/planning.json.
Each measurement is a process with one thread, by CPU time. PATH is another checkout with the same names. Its
measurements alternate with those of this one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rebeca_ray import schemas
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import DiffusionSettings
from rebeca_ray.generation.decisions import Action, Decision, Decisions, decisions_table
from rebeca_ray.generation.planning.keys import users_per_batch
from rebeca_ray.generation.planning.planner import PlanUsers
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.selector import Selector
from tests.conftest import prior_users, write_tiny_prior

REPO = Path(__file__).parents[2]
NUM_USERS, NUM_IMAGES, CANDIDATES, NUM_REAL_ITEMS, NUM_SHARDS = 2_000, 10, 4, 100, 200


class StandIn(SimpleNamespace):
    """A network that predicts its own input."""

    def condition(self, *_: Any) -> "StandIn":
        return self

    expand = condition

    def __call__(self, x_BD: Any, *_: Any) -> Any:
        return x_BD


def measure(embed_dim: int, folder: Path) -> float:
    """Return the rows planned per second, with `rebeca_ray` as Python finds it."""
    # Write a prior and some real items. The stand-in replaces the network later.
    users = [f"user-{number:08d}" for number in range(NUM_USERS)]
    known, selector = prior_users(users), Selector(embed_dim)
    prior = write_tiny_prior(folder, users=known, embed_dim=embed_dim, selector=selector)
    save_prior(replace(load_prior(prior), diffusion=DiffusionSettings(prediction_type="sample")), prior)
    embeds = np.random.default_rng(0).standard_normal(NUM_REAL_ITEMS * embed_dim, np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds), type=schemas.image_embeds(embed_dim))
    items = pa.table({"item_id": [f"item-{row}" for row in range(NUM_REAL_ITEMS)], "image_embeds": column})
    pq.write_table(items, folder / "items.parquet")
    sampler = {"name": "ddim", "num_inference_steps": 1, "prior_guidance_scale": 1.0}
    settings: dict[str, Any] = {
        "prior": prior,
        "decoder": {"model": "any"},
        "request": "any",
        "catalog": "any",
    }
    settings |= {"items": str(folder / "items.parquet"), "num_images": NUM_IMAGES, "sampler": sampler}
    settings |= {"selection": {"candidates_per_item": CANDIDATES}}
    config = GenerateConfig.model_validate(settings)

    boundaries = [(0.0, -500 + 500 * shard // NUM_SHARDS, 0) for shard in range(1, NUM_SHARDS)]
    counts = {"planned_users": 0, "planned_items": 0, "shards": 0}
    decisions = Decisions(pool=None, by_urgency=True, boundaries=boundaries, **counts)
    versions = {"prior": load_prior(prior).fingerprint, "decoder": "any"}
    stage: Any = PlanUsers(config, versions, None, None, decisions)
    network = StandIn(embed_dim=embed_dim, null_user_UH=stage.prior.network.null_user_UH)
    stage.prior = replace(stage.prior, network=network)
    rows = [
        Decision(
            user_id=user,
            action=Action.PLAN,
            num_images=NUM_IMAGES,
            prompt="",
            negative_prompt="",
            bucket=0,
            histories_bucket=0,
            cold_start=False,
            history_digest="",
            generation=0,
            settings_digest="",
            priority=0.0,
            activity=number % 500,
        )
        for number, user in enumerate(users)
    ]
    table, size = decisions_table(rows), users_per_batch(config)
    stage(table.slice(0, size))  # warm
    started = time.process_time()
    planned = sum(stage(table.slice(start, size)).num_rows for start in range(0, NUM_USERS, size))
    return planned / (time.process_time() - started)


def measure_in_process(checkout: Path, embed_dim: int) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(embed_dim)]
    return float(subprocess.check_output(command, env=environment, cwd=checkout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--measure", type=int, metavar="D", help="print one measurement")
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(arguments.measure, Path(folder)))
        return
    checkouts = {"after": REPO} | ({"before": arguments.against} if arguments.against else {})
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    result: dict[str, Any] = {"processor": cpu, "threads": 1, "rounds": arguments.rounds}
    table = Table("rows per second", *checkouts, "after / before")
    for embed_dim in (256, 1024):
        rates: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(arguments.rounds):
            for name in checkouts:
                rates[name].append(measure_in_process(checkouts[name], embed_dim))
        median = {name: round(statistics.median(values)) for name, values in rates.items()}
        ratio = f"{median['after'] / median['before']:.2f}" if arguments.against else ""
        result[f"rows_per_second at D = {embed_dim}"] = median
        table.add_row(f"D = {embed_dim}", *(f"{rate:,}" for rate in median.values()), ratio)
    Console().print(table)
    (REPO / "tests/bench/results/planning.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
