"""How well the prior knows taste, read against the hidden truth of the stickers, on populations that nothing was tuned on.

For each of some seeds a fresh population is simulated and the stickers' prior is trained on it. A sample counts as its nearest
real item; its quality is the true like probability of that item for the user. Sets, each 25 samples for each of 200 users:

    (a) the 1000-step reference sampler     (f) NoUE: the prior without users
    (b) the default sampler                 (g) the mean of the user's liked embeddings
    (c) the distilled prior                 (h) a random liked training item of the user
    (d) as (b): users seen in training      (i) the item nearest to that of (h): what (h) is worth if nothing may be copied
    (e) as (b): users never seen            (j) as (b), chosen among four candidates an item, as planning does

then guidance by guidance, and by candidates per item for four items a user. MMD and Fréchet distance are to the users'
held-out liked items, pooled.

    python tests/bench/prior_quality.py [--seeds 101 102 103] [--users 4000] [--data runs/prior_quality]
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.jobs import DistillConfig, EmbedConfig, TrainConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings, SelectionSettings
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import embed_items, read_image_embeds
from rebeca_ray.evaluation.permutation import permutation_test
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.selection import choose, nearest_items
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.stickers.simulate import load_world, simulate
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training.calibrate import GUIDANCE_SCALES, factors_of
from rebeca_ray.training.distill import distill_prior
from rebeca_ray.training.train import train_prior

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NUM_USERS, SAMPLES, PERMUTED_USERS = 200, 25, 2000
CANDIDATES = (1, 2, 4, 8, 16)
ITEMS_PER_USER = 4  # where candidates are compared


@dataclass(frozen=True, kw_only=True)
class Population:
    """Some users of one seed: their histories without the hold-out, and their true like probability of every item."""

    block: UserBlock
    user_G: np.ndarray
    like_GI: np.ndarray
    x0_ID: np.ndarray

    def held_out_likes(self) -> list[np.ndarray]:
        """The item rows of each user's held-out likes."""
        liked = self.block.held_like == 1
        return [self.block.held_item_index[liked & (self.block.held_user == user)] for user in self.user_G]

    def training_likes(self) -> list[np.ndarray]:
        rows = [
            np.arange(self.block.starts_V[user], self.block.starts_V[user] + self.block.counts_V[user])
            for user in self.user_G
        ]
        return [self.block.item_index_N[own[self.block.like_N[own] == 1]] for own in rows]


def read_population(
    folder: Path, storage: str, x0_ID: np.ndarray, item_id: np.ndarray, num_users: int = NUM_USERS
) -> Population:
    """`num_users` of the users simulated in `folder`, evenly spaced."""
    interactions, truth = f"{folder}/interactions.parquet", folder / "truth.parquet"
    histories = build_histories(InteractionSettings(path=interactions), item_id, storage)
    table = read_table(histories.file(0), "histories")
    block = UserBlock(table, histories.first_user_index)
    user_G = np.linspace(0, len(block.counts_V) - 1, num_users).astype(int)
    world = load_world()
    pair_of = {pair: number for number, pair in enumerate(world.pairs)}
    names = table["user_id"].take(user_G).to_pylist()
    told = pq.read_table(truth, filters=[("user_id", "in", names)]).to_pydict()
    like_GP = np.zeros((num_users, len(world.pairs)), np.float32)
    place = {name: number for number, name in enumerate(names)}
    for user, style, subcategory, like in zip(*told.values(), strict=True):
        like_GP[place[user], pair_of[style, subcategory]] = like
    row_of = {item: row for row, item in enumerate(world.item_id)}
    return Population(
        block=block,
        user_G=user_G,
        like_GI=like_GP[:, world.pair[[row_of[item] for item in item_id]]],
        x0_ID=x0_ID,
    )


def sample(
    prior: TrainedPrior, of: Population, count: int, settings: SamplerSettings | None = None
) -> torch.Tensor:
    """[users, count, D] in the prior's space."""
    history = of.block.history(of.user_G, prior.settings.max_history).look_up(of.x0_ID)
    tokens = prior.user_tokens(
        of.block.user_index_V[of.user_G], history if prior.settings.user_encoder == "history" else None
    )
    sampler = (settings or SamplerSettings()).resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    row_N = np.repeat(np.arange(len(of.user_G)), count)
    x_ND = sample_liked(
        prior.network,
        Diffusion.build(prior.diffusion),
        tokens,
        row_N,
        range(2**41, 2**41 + len(row_N)),
        sampler,
    )
    return x_ND.view(len(of.user_G), count, -1)


def quality(x_GSD: torch.Tensor, of: Population) -> dict[str, float]:
    """Mean true like probability of the nearest items, the share of them that differ, and distances to held-out likes."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    nearest_GS = nearest_items(F.normalize(x_GSD.flatten(0, 1)), unit_ID)[0].view(x_GSD.shape[:2]).numpy()
    like = np.take_along_axis(of.like_GI, nearest_GS, axis=1).mean()
    distinct = np.mean([len(set(row)) / len(row) for row in nearest_GS])
    real = F.normalize(torch.from_numpy(of.x0_ID[np.concatenate(of.held_out_likes())]))
    drawn = F.normalize(x_GSD.flatten(0, 1))
    return {
        "like": float(like),
        "distinct": float(distinct),
        "mmd": mmd(drawn, real),
        "frechet": frechet(drawn, real),
    }


def mmd(left_ND: torch.Tensor, right_ND: torch.Tensor, sigma: float = 0.5) -> float:
    """MMD² with a Gaussian kernel, unbiased, times 1000 (CMMD, Jayasumana et al. 2024; sigma for unit vectors)."""

    def kernel(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(one, two).square() / (2 * sigma**2))

    n, m = len(left_ND), len(right_ND)
    within = (kernel(left_ND, left_ND).sum() - n) / (n * (n - 1)) + (kernel(right_ND, right_ND).sum() - m) / (
        m * (m - 1)
    )
    return 1000 * float(within - 2 * kernel(left_ND, right_ND).mean())


def frechet(left_ND: torch.Tensor, right_ND: torch.Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to the embeddings (Heusel et al. 2017)."""
    one, two = left_ND.double(), right_ND.double()
    cov_one, cov_two = torch.cov(one.T), torch.cov(two.T)
    mixed = torch.linalg.eigvals(cov_one @ cov_two).real.clamp(min=0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + cov_one.trace() + cov_two.trace() - 2 * mixed)


def permuted(prior: TrainedPrior, of: Population) -> dict[str, dict[str, float]]:
    """The permutation test of true like probabilities, ten samples a user: with all users, and with the paper's 210 of them."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    nearest_N = nearest_items(F.normalize(sample(prior, of, 10).flatten(0, 1)), unit_ID)[0].numpy()
    like_UV = of.like_GI[:, nearest_N].reshape(len(of.user_G), -1, 10).mean(2)
    some = np.linspace(0, len(like_UV) - 1, 210).astype(int)
    return {
        "all": permutation_test(like_UV).figures(),
        "210": permutation_test(like_UV[np.ix_(some, some)]).figures(),
    }


def nearest_other(unit_ID: torch.Tensor) -> np.ndarray:
    """For each item the row of the nearest other one."""
    similarity_II = unit_ID @ unit_ID.T
    return similarity_II.fill_diagonal_(-1).argmax(1).numpy()


def chosen(prior: TrainedPrior, of: Population, drawn: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of each user's drawn samples, chosen as planning does: [users, count, D]."""
    assert prior.selector is not None
    settings = SelectionSettings()
    factors = factors_of(prior.selector, of.block, of.user_G, of.x0_ID)
    kept = []
    for x_SD, factor in zip(drawn, factors, strict=True):
        like = prior.selector.like_probability(x_SD, factor.expand(len(x_SD), -1)).numpy()
        unit = F.normalize(x_SD).numpy()
        copy = (
            nearest_items(torch.from_numpy(unit), F.normalize(torch.from_numpy(of.x0_ID)))[1].numpy()
            > settings.max_item_similarity
        )
        kept.append(x_SD[choose(unit, like, copy, count, settings.diversity).copy()])
    return torch.stack(kept)


def one_seed(seed: int, data: Path, users: int, items: str) -> dict[str, Any]:
    """Simulate, train, distil and judge one population."""
    folder = data / f"seed-{seed}"
    simulate(users, seed, folder / "seen")
    simulate(users // 4, seed + 10_000, folder / "unseen")
    embedded = read_image_embeds(items)

    def train(name: str, **network: object) -> TrainedPrior:
        overrides = [
            f"interactions.path={folder}/seen/interactions.parquet",
            f"items={items}",
            f"out={folder}/{name}",
        ]
        overrides += [f"storage={folder}/train", f"optimization.seed={seed}"]
        overrides += [f"network.{key}={value}" for key, value in network.items()]
        train_prior(load_config(TrainConfig, ROOT / "jobs/configs/train_stickers.yaml", overrides))
        return load_prior(f"{folder}/{name}")

    history, nobody = train("history"), train("noue", user_encoder="none")
    distill_prior(
        DistillConfig(
            prior=f"{folder}/history",
            out=f"{folder}/distilled",
            interactions=InteractionSettings(path=f"{folder}/seen/interactions.parquet"),
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
    everybody = read_population(folder / "seen", storage, x0_ID, embedded.item_id, PERMUTED_USERS)
    random = np.random.default_rng(seed)
    likes = seen.training_likes()
    liked = np.stack([random.choice(own, SAMPLES) for own in likes])
    mean = torch.stack([torch.from_numpy(x0_ID[own]).mean(0) for own in likes])[:, None].expand(
        -1, SAMPLES, -1
    )
    unit_ID = F.normalize(torch.from_numpy(x0_ID))
    other = nearest_other(unit_ID)
    reference = SamplerSettings(name="ddpm", num_inference_steps=1000)
    drawn = sample(
        history,
        seen,
        max(SAMPLES * SelectionSettings().candidates_per_item, ITEMS_PER_USER * max(CANDIDATES)),
    )
    default = quality(sample(history, seen, SAMPLES), seen)
    return {
        "a reference, 1000 steps": quality(sample(history, seen, SAMPLES, reference), seen),
        "b default sampler": default,
        "c distilled, 4 passes": quality(sample(load_prior(f"{folder}/distilled"), seen, SAMPLES), seen),
        "d history encoder, seen users": default,
        "e history encoder, unseen users": quality(sample(history, unseen, SAMPLES), unseen),
        "f NoUE": quality(sample(nobody, seen, SAMPLES), seen),
        "g mean of liked embeddings": quality(mean, seen),
        "h random liked training item": quality(torch.from_numpy(x0_ID[liked]), seen),
        "i item nearest to that of (h)": quality(torch.from_numpy(x0_ID[other[liked]]), seen),
        "j default sampler, 4 candidates an item": quality(
            chosen(history, seen, drawn[:, : SAMPLES * SelectionSettings().candidates_per_item], SAMPLES),
            seen,
        ),
        "permutation": permuted(history, everybody),
        "guidance": history.sampling.prior_guidance_scale,
        "sweep": {
            f"{scale:g}": quality(
                sample(history, seen, SAMPLES, SamplerSettings(prior_guidance_scale=scale)), seen
            )
            for scale in GUIDANCE_SCALES
        },
        "candidates_per_item": {
            str(candidates): quality(
                chosen(history, seen, drawn[:, : ITEMS_PER_USER * candidates], ITEMS_PER_USER), seen
            )
            for candidates in CANDIDATES
        },
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """What guidance and candidates buy: like probability and distinctness, mean and deviation over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    sets = (
        ("sweep", "guidance of the prior", SAMPLES),
        ("candidates_per_item", "candidates an item", ITEMS_PER_USER),
    )
    for axis, (name, label, count) in zip(axes, sets, strict=True):
        points = list(next(iter(found.values()))[name])
        for figure_name, told in (("like", "true like probability"), ("distinct", f"distinct of {count}")):
            values = np.array([[found[seed][name][point][figure_name] for point in points] for seed in found])
            axis.errorbar(
                [float(point) for point in points],
                values.mean(0),
                values.std(0),
                marker="o",
                capsize=3,
                label=told,
            )
        copied = np.mean([found[seed]["h random liked training item"]["like"] for seed in found])
        axis.axhline(copied, color="grey", linestyle=":", label="a liked training item itself")
        axis.set(xlabel=label, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(CANDIDATES, [str(candidates) for candidates in CANDIDATES])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(found: dict[str, dict[str, Any]]) -> None:
    """Mean ± deviation over the seeds."""
    table = Table("", "true like probability", "distinct of 25", "MMD × 1000", "Fréchet")
    for name in [name for name in next(iter(found.values())) if name[1] == " "]:
        rows = [
            [found[seed][name][figure] for seed in found] for figure in ("like", "distinct", "mmd", "frechet")
        ]
        table.add_row(name, *(f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in rows))
    Console().print(table)
    for users in ("all", "210"):
        tests = [found[seed]["permutation"][users] for seed in found]
        mean = {
            name: np.mean([test[name] for test in tests])
            for name in ("users", "own", "dealt", "effect", "z", "p_value")
        }
        Console().print(
            "permutation test: " + ", ".join(f"{name} {value:.4g}" for name, value in mean.items())
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        default=[101, 102, 103],
        help="to measure; others stay as they were found",
    )
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--data", type=Path, default=Path("runs/prior_quality"))
    arguments = parser.parse_args()
    results, data = RESULTS / "prior_quality.json", arguments.data.absolute()
    found: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    items = str(data / "items")
    if arguments.seeds and not (data / "items" / "embedding.json").exists():
        embed_items(load_config(EmbedConfig, ROOT / "jobs/configs/embed_stickers.yaml", [f"out={items}"]))
    for seed in arguments.seeds:
        found[str(seed)] = one_seed(seed, data, arguments.users, items)
        results.write_text(json.dumps(found, indent=2) + "\n")
    report(found)
    plot(found, RESULTS / "prior_quality.png")


if __name__ == "__main__":
    main()
