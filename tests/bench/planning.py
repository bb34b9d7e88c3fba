"""Rows planned per second with a stand-in network, so that the Python around the network is measured.

    PYTHONPATH=. python tests/bench/planning.py [--rounds 5] [--against PATH]

Each measurement runs in a process of its own with one thread. `--against` names a checkout of another commit: both run in turn.
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
import torch
from rich.console import Console
from rich.table import Table

REPO = Path(__file__).parents[2]
NUM_USERS, NUM_IMAGES, CANDIDATES, NUM_REAL_ITEMS, NUM_SHARDS = 2_000, 10, 4, 100, 200
EMBED_DIMS = (256, 1024)


class StandIn(SimpleNamespace):
    """A network that predicts its own input."""

    def condition(self, *_: torch.Tensor) -> "StandIn":
        return self

    def expand(self, _: torch.Tensor) -> "StandIn":
        return self

    def __call__(self, x_BD: torch.Tensor, *_: Any) -> torch.Tensor:
        return x_BD


def embeds(rows: int, embed_dim: int) -> pa.Array:
    from rebeca_ray import schemas

    values = np.random.default_rng(rows).standard_normal(rows * embed_dim, np.float32)
    values = values.astype(np.float16).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=schemas.image_embeds(embed_dim))


def decisions_table(users: list[str], decision: str) -> pa.Table:
    from rebeca_ray import schemas

    constant = {
        "num_images": NUM_IMAGES,
        "prompt": "",
        "negative_prompt": "",
        "bucket": 0,
        "histories_bucket": 0,
    }
    constant |= {"stranger": False, "history_digest": "digest", "generation": 0, "made_with": "settings"}
    constant |= {"decision": decision, "priority": 0.0}
    rows = [{**constant, "user_id": user, "activity": index % 500} for index, user in enumerate(users)]
    return pa.Table.from_pylist(rows, schema=schemas.DECISIONS)


def measure(embed_dim: int, folder: Path) -> dict[str, float]:
    """Rows per second of drawn users, and of rescored ones, with `rebeca_ray` as Python finds it."""
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.config.sections import DiffusionSettings, SamplerSettings
    from rebeca_ray.generation.decide import Decisions
    from rebeca_ray.generation.plan import PlanUsers, users_per_batch
    from rebeca_ray.prior.checkpoint import load_prior, save_prior
    from rebeca_ray.prior.selector import Selector
    from tests.conftest import prior_users, untrained_prior, write_tiny_prior

    torch.set_num_threads(1)
    users = [f"user-{number:08d}" for number in range(NUM_USERS)]
    prior = write_tiny_prior(
        folder, users=prior_users(users), embed_dim=embed_dim, selector=Selector(embed_dim)
    )
    save_prior(replace(load_prior(prior), diffusion=DiffusionSettings(prediction_type="sample")), prior)
    item_id = pa.array([f"real-{number}" for number in range(NUM_REAL_ITEMS)])
    real = pa.table({"item_id": item_id, "image_embeds": embeds(NUM_REAL_ITEMS, embed_dim)})
    pq.write_table(real, folder / "items.parquet")
    config = GenerateConfig.model_validate(
        {
            "prior": prior,
            "decoder": {"model": "any"},
            "request": "any",
            "catalog": "any",
            "num_images": NUM_IMAGES,
        }
        | {"items": str(folder / "items.parquet"), "selection": {"candidates_per_item": CANDIDATES}}
        | {"sampler": SamplerSettings(name="ddim", num_inference_steps=1, prior_guidance_scale=1.0)}
    )
    rows = NUM_USERS * NUM_IMAGES
    last = {"item_id": [f"{row:032x}" for row in range(rows)], "user_id": np.repeat(users, NUM_IMAGES)}
    last |= {"image_embeds": embeds(rows, embed_dim), "nearest_item_id": item_id.take(np.arange(rows) % 100)}
    items = pa.table(last | {"nearest_similarity": np.full(rows, 0.5, np.float32)})
    boundaries = [(0.0, -500 + 500 * shard // NUM_SHARDS, 0) for shard in range(1, NUM_SHARDS)]
    decisions = Decisions(
        pool=None, by_urgency=True, boundaries=boundaries, planned_users=0, planned_items=0, units=0
    )
    versions = {"prior": load_prior(prior).fingerprint, "decoder": "any"}
    stage = PlanUsers(config, versions, None, SimpleNamespace(bucket=lambda *_: items), decisions)
    network = StandIn(embed_dim=embed_dim, null_user_UH=stage.prior.network.null_user_UH)
    stage.prior = replace(stage.prior, network=network)
    rates = {}
    for decision, name in (("plan", "drawn"), ("rescore", "rescored")):
        table = decisions_table(users, decision)
        size = users_per_batch(config)
        stage(table.slice(0, size))  # warm
        started = time.perf_counter()
        planned = sum(stage(table.slice(start, size)).num_rows for start in range(0, NUM_USERS, size))
        assert planned == rows
        rates[f"{name}, D = {embed_dim}"] = rows / (time.perf_counter() - started)
    return rates
