"""Variants of given items: how alike they stay, and how much their users like them, by method and strength.

The script simulates a small population and trains the stickers' prior on it. Each user gets one random item.
Both methods make variants of it, for the same users and items, chosen among candidates as by planning.
Likeness is the cosine to the item. Liking is the true like probability of the nearest real item. `kept` is
the fraction of variants with the given item as their nearest. `nearest` is the cosine to the nearest item:
a low one means that the variant lies between real images.

The last table compares the methods user by user at equal likeness: for each strength of `noise`, that
strength of `slerp` with the nearest likeness that is not lower.

    python -m tests.bench.variants [--users 600] [--epochs 4] [--data runs/variants]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.jobs import EmbedConfig, TrainConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import SamplerSettings, SelectionSettings
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.items import EmbeddedItems, read_image_embeds
from rebeca_ray.evaluation.paired import compare_users
from rebeca_ray.prior.candidates import choose_candidates, judge_candidates, sample_candidates
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.prior.variants import Variants
from rebeca_ray.stickers.simulate import simulate
from rebeca_ray.training.calibrate import user_vectors
from rebeca_ray.training.train import train_prior
from tests.bench.population import ROOT, SPLIT, Population, read_population
from tests.bench.prior_quality import FIGURES, RESULTS

SEED, NUM_USERS = 201, 200
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
METHODS = ("noise", "slerp")
SELECTION = SelectionSettings(candidates_per_item=4)


def train(data: Path, users: int, epochs: int) -> tuple[TrainedPrior, Population, EmbeddedItems]:
    """Simulate a population and train its prior, unless an earlier call did; return both with the items."""
    items, out, storage = str(data / "items"), data / "prior", f"{data}/train"
    if not (data / "items" / "items.json").exists():
        embed_items(load_config(EmbedConfig, ROOT / "jobs/configs/embed_stickers.yaml", [f"out={items}"]))
    if not (out / "prior.json").exists():
        simulate(users, SEED, data / "seen")
        overrides = [f"interactions.path={data}/seen/interactions.parquet", f"items={items}", f"out={out}"]
        overrides += [f"storage={storage}", f"optimization.seed={SEED}", f"optimization.max_epochs={epochs}"]
        overrides += [f"interactions.{key}={value}" for key, value in SPLIT.items()]
        overrides += ["workers.threads_per_worker=1"]
        train_prior(load_config(TrainConfig, ROOT / "jobs/configs/train_stickers.yaml", overrides))
    prior, embedded = load_prior(str(out)), read_image_embeds(items)
    x0_ID = prior.scaler.scale(torch.from_numpy(embedded.image_embeds)).numpy()
    return prior, read_population(data / "seen", storage, x0_ID, embedded.item_id, NUM_USERS), embedded


@torch.inference_mode()
def variants_of(
    prior: TrainedPrior,
    users: UserVectors,
    row_G: np.ndarray,
    of: Population,
    sampler: SamplerSettings,
    strength: float,
) -> dict[str, np.ndarray]:
    """Return the figures of one variant per user, each [users]."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    variants = Variants(
        row_G=row_G,
        item_GD=torch.from_numpy(of.x0_ID[row_G]),
        strength_G=np.full(len(row_G), strength, np.float32),
    )
    count_G, keys = np.ones(len(row_G), int), [f"user-{user}" for user in of.user_G]
    sampled_G = count_G * SELECTION.candidates_per_item
    diffusion = Diffusion.build(prior.diffusion)
    x_ND, user_N = sample_candidates(prior, diffusion, sampler, users, keys, sampled_G, variants)
    candidates = judge_candidates(prior, users.factor_GF, x_ND, user_N)
    chosen = choose_candidates(candidates, count_G, SELECTION, unit_ID, variants)
    assert chosen.nearest_K is not None
    assert chosen.similarity_K is not None
    unit_GD = F.normalize(prior.scaler.scale(torch.from_numpy(chosen.embeds_KD)))
    return {
        "likeness": (unit_GD * unit_ID[torch.from_numpy(row_G)]).sum(1).numpy(),
        "like": np.take_along_axis(of.like_GI, chosen.nearest_K[:, None], axis=1)[:, 0],
        "kept": (chosen.nearest_K == row_G).astype(np.float32),
        "nearest": chosen.similarity_K,
    }


def at_equal_likeness(figures: dict[str, dict[float, dict[str, np.ndarray]]]) -> list[dict[str, float]]:
    """Compare liking user by user: each strength of `noise` with `slerp` of the nearest likeness above it."""
    rows = []
    for strength, noise in figures["noise"].items():
        alike = {
            other: float(slerp["likeness"].mean() - noise["likeness"].mean())
            for other, slerp in figures["slerp"].items()
        }
        not_below = {other: excess for other, excess in alike.items() if excess >= 0}
        if strength == 1 or not not_below:
            continue
        other = min(not_below, key=lambda key: not_below[key])
        test = compare_users(figures["slerp"][other]["like"], noise["like"])
        rows.append(
            {
                "noise_strength": strength,
                "slerp_strength": other,
                "noise_likeness": float(noise["likeness"].mean()),
                "slerp_likeness": float(figures["slerp"][other]["likeness"].mean()),
                "noise_like": test.right_mean,
                "slerp_like": test.left_mean,
                "low": test.difference_interval.low,
                "high": test.difference_interval.high,
                "p": test.wilcoxon_p,
            }
        )
    return rows


def plot(methods: dict[str, dict[str, dict[str, float]]], item_like: float, path: Path) -> None:
    """Draw liking against likeness, a line per method, and both against strength."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for method, by_strength in methods.items():
        strength = [float(name) for name in by_strength]
        likeness = [values["likeness"] for values in by_strength.values()]
        like = [values["like"] for values in by_strength.values()]
        axes[0].plot(likeness, like, marker="o", label=method)
        axes[1].plot(strength, likeness, marker="o", label=f"{method}: likeness")
        axes[1].plot(strength, like, marker="o", linestyle="--", label=f"{method}: like probability")
    axes[0].axhline(item_like, color="grey", linestyle=":", label="the given items")
    axes[0].set(xlabel="likeness to the item (cosine)", ylabel="true like probability")
    axes[1].set(xlabel="strength", ylim=(0, 1.02))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(results: dict[str, Any]) -> None:
    table = Table("strength", *(f"{method} {name}" for method in METHODS for name in ("likeness", "like")))
    for strength in results["methods"]["noise"]:
        values = [results["methods"][method][strength] for method in METHODS]
        cells = [f"{value[name]:.3f}" for value in values for name in ("likeness", "like")]
        table.add_row(strength, *cells)
    Console().print(table)
    table = Table("noise", "slerp", "likeness", "like", "difference, 95%", "p")
    for row in results["at_equal_likeness"]:
        table.add_row(
            f"{row['noise_strength']:g}",
            f"{row['slerp_strength']:g}",
            f"{row['noise_likeness']:.3f} / {row['slerp_likeness']:.3f}",
            f"{row['noise_like']:.3f} / {row['slerp_like']:.3f}",
            f"{row['low']:+.3f} to {row['high']:+.3f}",
            f"{row['p']:.2g}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data", type=Path, default=Path("runs/variants"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prior, population, embedded = train(arguments.data.absolute(), arguments.users, arguments.epochs)
    users = user_vectors(prior, population.block, population.user_G, population.x0_ID)
    row_G = np.random.default_rng(SEED).integers(0, len(embedded.item_id), NUM_USERS)
    figures: dict[str, dict[float, dict[str, np.ndarray]]] = {}
    for method in METHODS:
        settings = SamplerSettings.model_validate({"variant": method})
        sampler = settings.resolve(prior.sampling, prior.diffusion.num_train_timesteps)
        figures[method] = {
            strength: variants_of(prior, users, row_G, population, sampler, strength)
            for strength in STRENGTHS
        }
    results: dict[str, Any] = {
        "seed": SEED,
        "trained_users": arguments.users,
        "epochs": arguments.epochs,
        "users": NUM_USERS,
        "candidates_per_item": SELECTION.candidates_per_item,
        "item_like": float(population.like_GI[np.arange(NUM_USERS), row_G].mean()),
        "methods": {
            method: {
                f"{strength:g}": {name: float(values.mean()) for name, values in of_strength.items()}
                for strength, of_strength in by_strength.items()
            }
            for method, by_strength in figures.items()
        },
        "at_equal_likeness": at_equal_likeness(figures),
    }
    (RESULTS / "variants.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results)
    plot(results["methods"], results["item_like"], FIGURES / "variants.png")


if __name__ == "__main__":
    main()
