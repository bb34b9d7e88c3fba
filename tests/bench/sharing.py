"""Shared images: images saved against like probability lost, for several bounds of `selection.share_within`.

Users of the demo's world are planned as on a night, and nothing is decoded. Each bound is applied to the
same plan. `lost` is the relative loss of the mean like probability of all items. By the selector it is that
of the embedding that is drawn. By the truth it is the true like probability of the nearest real item, and no
model knows it. `without the rule` shares by distance alone, whatever the selector says. The time of a full
bucket is that of random embeddings.

    rebeca demo
    python -m tests.bench.sharing [--demo ~/rebeca-stickers] [--users 2000]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.generation.sharing.planned import lenders_of
from rebeca_ray.prior import sharing
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.sharing import LARGEST_LOSS, Tastes, find_lenders
from rebeca_ray.stickers.simulate import load_world
from tests.bench.prior_quality import RESULTS
from tests.conftest import context_of, planned_items, write_plan

BOUNDS = (0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3)
TILE = 256


def plan_users(demo: Path, num_users: int) -> tuple[pa.Table, TrainedPrior]:
    """Plan the first users of the demo's ratings; return the plan and the demo's prior."""
    rated = pq.read_table(demo / "interactions.parquet", columns=["user_id"])["user_id"]
    with tempfile.TemporaryDirectory() as folder:
        request = f"{folder}/request.parquet"
        pq.write_table(pa.table({"user_id": rated.unique().sort()[:num_users]}), request)
        overrides = [f"request={request}", f"catalog={folder}/catalog"]
        context = context_of(load_config(GenerateConfig, str(demo / "generate.yaml"), overrides))
        write_plan(context)
        return planned_items(context.run), load_prior(context.config.prior)


def true_likes(demo: Path, plan: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the true likes [N, pairs] of the users of planned items, and the pair [N] nearest to each."""
    world = load_world()
    truth = pq.read_table(demo / "truth.parquet")
    num_pairs = len(world.pairs)
    names = zip(*(truth[name][:num_pairs].to_pylist() for name in ("style", "subcategory")), strict=True)
    assert [*names] == world.pairs
    row = {user: index for index, user in enumerate(truth["user_id"].to_pylist()[::num_pairs])}
    like_UP = truth["like_probability"].to_numpy().reshape(-1, num_pairs)
    pair = dict(zip(world.item_id.tolist(), world.pair.tolist(), strict=True))
    return (
        like_UP[[row[user] for user in plan["user_id"].to_pylist()]],
        np.array([pair[item] for item in plan["nearest_item_id"].to_pylist()]),
    )


def curve(
    plan: pa.Table, prior: TrainedPrior, true_NP: np.ndarray, pair_N: np.ndarray
) -> list[dict[str, float]]:
    """Return a row per bound: images saved, and like probability lost."""
    every = np.arange(plan.num_rows)
    embeds_ND = np.stack(plan["image_embeds"].to_numpy(zero_copy_only=False))
    tastes = Tastes.of(prior, np.stack(plan["user_factors"].to_numpy(zero_copy_only=False)), embeds_ND, TILE)
    assert tastes is not None
    like_before, true_before = tastes.like_of(every), true_NP[every, pair_N]
    rows = []
    for bound in BOUNDS:
        started = time.perf_counter()
        lender_N, _ = lenders_of(plan, every, prior, bound, TILE)
        like, true = tastes.like_of(lender_N), true_NP[every, pair_N[lender_N]]
        rows.append(
            {
                "share_within": bound,
                "saved": float((lender_N != every).mean()),
                "lost": 1 - float(like.mean() / like_before.mean()),
                "truly_lost": 1 - float(true.mean() / true_before.mean()),
                "most_users": int(np.bincount(lender_N).max()),
                "diversity_lost": 1 - diversity(plan, embeds_ND[lender_N]) / diversity(plan, embeds_ND),
                "seconds": time.perf_counter() - started,
            }
        )
    return rows


def diversity(plan: pa.Table, embeds_ND: np.ndarray) -> float:
    """Return the mean cosine distance between the items of a user."""
    unit_ND = embeds_ND / np.linalg.norm(embeds_ND, axis=1, keepdims=True)
    user_N = np.unique(plan["user_id"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    count_U = np.bincount(user_N)
    sum_UD = np.zeros((len(count_U), unit_ND.shape[1]))
    np.add.at(sum_UD, user_N, unit_ND)
    return float((1 - (np.square(sum_UD).sum(1) - count_U) / (count_U * (count_U - 1))).mean())


def full_bucket() -> dict[str, float]:
    """Return the seconds in which the items of 10,000 users of a large catalog are compared."""
    random = np.random.default_rng(0)
    user_N = np.repeat(np.arange(10_000), 4)
    unit_ND = random.standard_normal((len(user_N), 1024))
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    user_NF, item_NF = random.standard_normal((2, len(user_N), 129))
    started = time.perf_counter()
    find_lenders(unit_ND, user_N, 0.2, Tastes(user_NF=user_NF, item_NF=item_NF))
    return {"items": len(user_N), "embed_dim": 1024, "seconds": time.perf_counter() - started}


def report(title: str, rows: list[dict[str, float]]) -> None:
    table = Table("share_within", "saved", "lost", "truly lost", "diversity lost", "most users", title=title)
    for row in rows:
        names = ("saved", "lost", "truly_lost", "diversity_lost")
        shares = [f"{row[name]:.2%}" for name in names]
        table.add_row(f"{row['share_within']:g}", *shares, f"{row['most_users']}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("~/rebeca-stickers"))
    parser.add_argument("--users", type=int, default=2000)
    arguments = parser.parse_args()
    demo = arguments.demo.expanduser()
    results: dict[str, Any] = {"largest_loss": LARGEST_LOSS, "nights": {}}
    plan, prior = plan_users(demo, arguments.users)
    user_ids = plan["user_id"].unique().sort()
    for num_users in (len(user_ids) // 20, len(user_ids)):
        part = plan.filter(pc.is_in(plan["user_id"], value_set=user_ids[:num_users]))
        part = part.combine_chunks()
        truth = true_likes(demo, part)
        night: dict[str, Any] = {"items": part.num_rows, "curve": curve(part, prior, *truth)}
        sharing.LARGEST_LOSS = 1.0
        night["without_the_rule"] = curve(part, prior, *truth)
        sharing.LARGEST_LOSS = LARGEST_LOSS
        results["nights"][f"{num_users}"] = night
        report(f"{num_users:,} users, {part.num_rows:,} items", night["curve"])
        report("without the rule", night["without_the_rule"])
    results["full_bucket"] = full_bucket()
    Console().print("a bucket of {items:,} items: {seconds:.0f} s".format(**results["full_bucket"]))
    (RESULTS / "sharing.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
