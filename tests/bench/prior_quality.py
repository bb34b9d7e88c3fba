"""Quality of the prior against the hidden truth of the stickers, on populations without any tuning.

The script simulates a new population per seed, and trains the stickers' prior on it. It replaces each
sample by the nearest real item. The quality is the true like probability of that item for the user. The
sets, of 25 samples per user for 200 users, are:

    (a) the 1000-step reference sampler     (f) NoUE: the prior without users
    (b) the default sampler                 (g) the mean of the user's liked embeddings
    (c) the distilled prior                 (h) a random liked training item of the user
    (d) as (b): users seen in training      (i) the item nearest to that of (h), to exclude copies
    (e) as (b): users never seen            (j) as (b), chosen among several candidates, as by planning
    (k) retrieval: the selector's best real items that the user has not rated
    (l) as (k), with maximal marginal relevance (MMR) at the diversity of planning
    (m) as (b), with a selector guidance of 44, which was chosen on another population
    (n), (o), (p) as (j), for users with 1, 2 and 5 known ratings, the latest ones

Two sweeps follow: over the selector's guidance, and over the candidates per item for four items per user. The
latter also has the like probability that the selector predicts: the more candidates, the more it overrates.
MMD and Fréchet distance are to the users' pooled likes of the test set, which nothing else has seen.

    python tests/bench/prior_quality.py [--seeds 101 102 103] [--users 4000] [--data runs/prior_quality]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.jobs import DistillConfig
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings, SelectionSettings
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.evaluation.permutation import permutation_test, permutation_test_by_image
from rebeca_ray.evaluation.retrieval import retrieve
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.selection import choose, nearest_items
from rebeca_ray.training.calibrate import SELECTOR_SCALES, factors_of, user_vectors
from rebeca_ray.training.distill import distill_prior
from tests.bench.population import (
    SPLIT,
    Population,
    embed_stickers,
    quality,
    read_population,
    simulate_populations,
    train_stickers,
)

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[2] / "infra" / "docs" / "figures"
SAMPLES, PERMUTED_USERS = 25, 2000
CANDIDATES = (1, 2, 4, 8, 16)
# Names of permutation figures in the results file.
PERMUTATION_KEYS = {"matched": "own", "shuffled": "dealt"}
ITEMS_PER_USER = 4  # in the comparison of candidates
SWEPT = (*SELECTOR_SCALES, 48.0, 64.0)
GUIDANCE_OF_ONE_CANDIDATE = 44.0
FEW_RATINGS = {"n": 1, "o": 2, "p": 5}


def sample(
    prior: TrainedPrior, of: Population, count: int, settings: SamplerSettings | None = None
) -> torch.Tensor:
    """Return `count` samples per user, [users, count, D], in the prior's space."""
    users = user_vectors(prior, of.block, of.user_G, of.x0_ID)
    sampler = (settings or SamplerSettings()).resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    row_N = np.repeat(np.arange(len(of.user_G)), count)
    x_ND = sample_liked(
        prior,
        Diffusion.build(prior.diffusion),
        users,
        row_N,
        range(2**41, 2**41 + len(row_N)),
        sampler,
    )
    return x_ND.view(len(of.user_G), count, -1)


def permuted(prior: TrainedPrior, of: Population) -> dict[str, dict[str, float]]:
    """Run the permutation test with ten samples per user: on all users, on the paper's 210, and their way."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    nearest_N = nearest_items(F.normalize(sample(prior, of, 10).flatten(0, 1)), unit_ID)[0].numpy()
    like_UVS = of.like_GI[:, nearest_N].reshape(len(of.user_G), -1, 10)
    like_UV, some = like_UVS.mean(2), np.linspace(0, len(of.user_G) - 1, 210).astype(int)
    tests = {
        "all": permutation_test(like_UV),
        "210": permutation_test(like_UV[np.ix_(some, some)]),
        "210, the authors' variant": permutation_test_by_image(
            like_UVS[np.ix_(some, some)].reshape(210, -1), np.repeat(np.arange(210), 10)
        ),
    }
    return {
        users: {PERMUTATION_KEYS.get(name, name): value for name, value in test.figures().items()}
        for users, test in tests.items()
    }


def nearest_other(unit_ID: torch.Tensor) -> np.ndarray:
    """Return the row of the nearest other item, for each item."""
    similarity_II = unit_ID @ unit_ID.T
    return similarity_II.fill_diagonal_(-1).argmax(1).numpy()


def chosen(
    prior: TrainedPrior, of: Population, drawn: torch.Tensor, count: int
) -> tuple[torch.Tensor, float]:
    """Return `count` of each user's samples, [users, count, D], chosen as planning does.

    The second value is the mean like probability that the selector predicts for them.
    """
    assert prior.selector is not None
    settings = SelectionSettings()
    factors = factors_of(prior.selector, of.block, of.user_G, of.x0_ID)
    kept, predicted = [], []
    for x_SD, factor in zip(drawn, factors, strict=True):
        like = prior.selector.like_probability(x_SD, factor.expand(len(x_SD), -1)).numpy()
        unit = F.normalize(x_SD).numpy()
        copy = (
            nearest_items(torch.from_numpy(unit), F.normalize(torch.from_numpy(of.x0_ID)))[1].numpy()
            > settings.max_item_similarity
        )
        rows = choose(unit, like, copy, count, settings.diversity)
        kept.append(x_SD[rows.copy()])
        predicted.append(like[rows].mean())
    return torch.stack(kept), float(np.mean(predicted))


def by_default(prior: TrainedPrior, of: Population) -> dict[str, float]:
    """Return the quality of 25 items per user at the default settings."""
    drawn = sample(prior, of, SAMPLES * SelectionSettings().candidates_per_item)
    return quality(chosen(prior, of, drawn, SAMPLES)[0], of)


def by_candidates(prior: TrainedPrior, of: Population, drawn: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the quality of ITEMS_PER_USER items, and its prediction by the selector, by candidates."""
    figures = {}
    for candidates in CANDIDATES:
        x_GSD, predicted = chosen(prior, of, drawn[:, : ITEMS_PER_USER * candidates], ITEMS_PER_USER)
        figures[str(candidates)] = {**quality(x_GSD, of), "predicted": predicted}
    return figures


def retrieved(prior: TrainedPrior, of: Population, diversity: float = 0.0) -> torch.Tensor:
    """Return the embeddings of real items retrieved for each user, [users, SAMPLES, D]."""
    assert prior.selector is not None
    factors = factors_of(prior.selector, of.block, of.user_G, of.x0_ID)
    rated = of.block.rated_items(of.user_G)
    rows = retrieve(prior.selector, factors, of.x0_ID, rated, SAMPLES, diversity)
    return torch.from_numpy(of.x0_ID[np.stack(rows)])


def one_seed(seed: int, data: Path, users: int, items: str) -> dict[str, Any]:
    """Simulate one population, train and distil its prior, and return the figures of all sets."""
    folder = simulate_populations(data, seed, users)
    embedded = read_image_embeds(items)
    history = train_stickers(folder, "history", items, seed)
    without_users = train_stickers(folder, "noue", items, seed, user_encoder="none")
    distill_prior(
        DistillConfig(
            prior=f"{folder}/history",
            out=f"{folder}/distilled",
            interactions=InteractionSettings(path=f"{folder}/seen/interactions.parquet", **SPLIT),
            items=items,
            storage=f"{folder}/train",
            learning_rate=1e-3,
            min_quality=0,
            min_diversity=0,
        )
    )
    x0_ID = history.scaler.scale(torch.from_numpy(embedded.image_embeds)).numpy()
    storage = f"{folder}/train"
    seen, unseen = (
        read_population(folder / name, storage, x0_ID, embedded.item_id) for name in ("seen", "unseen")
    )
    permuted_users = read_population(folder / "seen", storage, x0_ID, embedded.item_id, PERMUTED_USERS)
    random = np.random.default_rng(seed)
    likes = seen.training_likes()
    liked = np.stack([random.choice(rows, SAMPLES) for rows in likes])
    means = torch.stack([torch.from_numpy(x0_ID[rows]).mean(0) for rows in likes])
    mean = means[:, None].expand(-1, SAMPLES, -1)
    unit_ID = F.normalize(torch.from_numpy(x0_ID))
    other = nearest_other(unit_ID)
    reference = SamplerSettings(name="ddpm", num_inference_steps=1000)
    cold_start = replace(seen, user_G=seen.user_G[::2], like_GI=seen.like_GI[::2])
    default = quality(sample(history, seen, SAMPLES), seen)
    return {
        "a reference, 1000 steps": quality(sample(history, seen, SAMPLES, reference), seen),
        "b default sampler": default,
        "c distilled, 4 passes": quality(sample(load_prior(f"{folder}/distilled"), seen, SAMPLES), seen),
        "d history encoder, seen users": default,
        "e history encoder, unseen users": quality(sample(history, unseen, SAMPLES), unseen),
        "f NoUE": quality(sample(without_users, seen, SAMPLES), seen),
        "g mean of liked embeddings": quality(mean, seen),
        "h random liked training item": quality(torch.from_numpy(x0_ID[liked]), seen),
        "i item nearest to that of (h)": quality(torch.from_numpy(x0_ID[other[liked]]), seen),
        "k retrieval by the selector": quality(retrieved(history, seen), seen),
        "l retrieval with MMR": quality(retrieved(history, seen, SelectionSettings().diversity), seen),
        "j default settings, candidates chosen": by_default(history, seen),
        f"m selector guidance {GUIDANCE_OF_ONE_CANDIDATE:g}, one candidate": quality(
            sample(
                history,
                seen,
                SAMPLES,
                SamplerSettings(selector_guidance_scale=GUIDANCE_OF_ONE_CANDIDATE),
            ),
            seen,
        ),
        **{
            f"{letter} default settings, latest ratings: {count}": by_default(
                history, cold_start.with_latest(count)
            )
            for letter, count in FEW_RATINGS.items()
        },
        "permutation": permuted(history, permuted_users),
        "guidance": history.sampling.selector_guidance_scale,
        "sweep": {
            f"{scale:g}": quality(
                sample(history, seen, SAMPLES, SamplerSettings(selector_guidance_scale=scale)), seen
            )
            for scale in SWEPT
        },
        "candidates_per_item": by_candidates(
            history, seen, sample(history, seen, ITEMS_PER_USER * max(CANDIDATES))
        ),
    }


def plot(seeds: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot like probability and distinct items by guidance and candidates, over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    sets = (
        ("sweep", "selector guidance", SAMPLES),
        ("candidates_per_item", "candidates per item", ITEMS_PER_USER),
    )
    for axis, (name, label, count) in zip(axes, sets, strict=True):
        points = list(next(iter(seeds.values()))[name])
        for figure_name, label_of_figure in (
            ("like", "true like probability"),
            ("distinct", f"distinct of {count}"),
        ):
            values = np.array(
                [[figures[name][point][figure_name] for point in points] for figures in seeds.values()]
            )
            axis.errorbar(
                [float(point) for point in points],
                values.mean(0),
                values.std(0),
                marker="o",
                capsize=3,
                label=label_of_figure,
            )
        copied = np.mean([figures["h random liked training item"]["like"] for figures in seeds.values()])
        axis.axhline(copied, color="grey", linestyle=":", label="a liked training item itself")
        axis.set(xlabel=label, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(CANDIDATES, [str(candidates) for candidates in CANDIDATES])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(seeds: dict[str, dict[str, Any]]) -> None:
    """Print mean ± deviation over the seeds."""
    table = Table("", "true like probability", "distinct of 25", "MMD × 1000", "Fréchet")
    for name in [name for name in next(iter(seeds.values())) if name[1] == " "]:
        rows = [
            [figures[name][figure] for figures in seeds.values()]
            for figure in ("like", "distinct", "mmd", "frechet")
        ]
        table.add_row(name, *(f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in rows))
    Console().print(table)
    for users in next(iter(seeds.values()))["permutation"]:
        tests = [figures["permutation"][users] for figures in seeds.values()]
        mean = {
            name: np.mean([test[name] for test in tests])
            for name in ("users", "own", "dealt", "effect", "z", "p_value")
        }
        Console().print(
            f"permutation test, {users}: " + ", ".join(f"{name} {value:.4g}" for name, value in mean.items())
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        default=[101, 102, 103],
        help="seeds to measure; the results of others are kept",
    )
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--data", type=Path, default=Path("runs/prior_quality"))
    arguments = parser.parse_args()
    results, data = RESULTS / "prior_quality.json", arguments.data.absolute()
    seeds: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    items = embed_stickers(data) if arguments.seeds else ""
    for seed in arguments.seeds:
        seeds[str(seed)] = one_seed(seed, data, arguments.users, items)
        results.write_text(json.dumps(seeds, indent=2) + "\n")
    report(seeds)
    plot(seeds, FIGURES / "prior_quality.png")


if __name__ == "__main__":
    main()
