"""How well the prior knows taste, read against the hidden truth of the stickers, on populations that nothing was tuned on.

For each of some seeds a fresh population is simulated and priors are trained on four fifths of it. A sample counts as its nearest
real item; its quality is the true like probability of that item for the user. Sets, each 25 samples for each of 100 users:

    (a) the 1000-step reference sampler     (e) as (b), users never seen in training
    (b) the default sampler                 (f) NoUE: the prior without users
    (c) the distilled prior                 (g) the mean of the user's liked embeddings, with the prior's noise
    (d) as (b): the history encoder, seen users; and (i) the `id` table instead
                                            (h) a random liked training item of the user

and for the candidates per item, the gain of choosing before decoding. Distances are to the user's held-out liked items, pooled.

    python tests/bench/prior_quality.py [--seeds 101 102 103] [--users 2000] [--epochs 10] [--data runs/prior_quality]
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

from rebeca_ray.checkpoint import TrainedPrior, load_prior
from rebeca_ray.config import DistillConfig, EmbedConfig, InteractionSettings, SamplerSettings, TrainConfig, load_config
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.distillation import distill_prior
from rebeca_ray.finishing import GUIDANCE_SCALES, factors_of
from rebeca_ray.histories import build_histories
from rebeca_ray.items import embed_items, read_image_embeds
from rebeca_ray.sampling import sample_liked
from rebeca_ray.selection import choose, nearest_items
from rebeca_ray.stickers.simulate import load_world, simulate
from rebeca_ray.storage import read_table
from rebeca_ray.training import train_prior
from rebeca_ray.training_set import UserBlock

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NUM_USERS, SAMPLES = 100, 25
CANDIDATES = (1, 2, 4, 8)


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
        rows = [np.arange(self.block.starts_V[user], self.block.starts_V[user] + self.block.counts_V[user]) for user in self.user_G]
        return [self.block.item_index_N[own[self.block.like_N[own] == 1]] for own in rows]


def read_population(interactions: str, truth: Path, items: str, storage: str, x0_ID: np.ndarray, item_id: np.ndarray) -> Population:
    histories = build_histories(InteractionSettings(path=interactions), item_id, storage)
    table = read_table(histories.file(0), "histories")
    block = UserBlock(table, histories.first_user_index)
    user_G = np.linspace(0, len(block.counts_V) - 1, NUM_USERS).astype(int)
    world = load_world()
    pair_of = {pair: number for number, pair in enumerate(world.pairs)}
    names = table["user_id"].take(user_G).to_pylist()
    told = pq.read_table(truth, filters=[("user_id", "in", names)]).to_pydict()
    like_GP = np.zeros((NUM_USERS, len(world.pairs)), np.float32)
    place = {name: number for number, name in enumerate(names)}
    for user, style, subcategory, like in zip(*told.values(), strict=True):
        like_GP[place[user], pair_of[style, subcategory]] = like
    row_of = {item: row for row, item in enumerate(world.item_id)}
    return Population(block=block, user_G=user_G, like_GI=like_GP[:, world.pair[[row_of[item] for item in item_id]]], x0_ID=x0_ID)


def sample(prior: TrainedPrior, of: Population, count: int, settings: SamplerSettings | None = None) -> torch.Tensor:
    """[users, count, D] in the prior's space."""
    history = of.block.history(of.user_G, prior.settings.max_history).look_up(of.x0_ID)
    tokens = prior.user_tokens(of.block.user_index_V[of.user_G], history if prior.settings.user_encoder == "history" else None)
    sampler = (settings or SamplerSettings()).resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    row_N = np.repeat(np.arange(NUM_USERS), count)
    x_ND = sample_liked(prior.network, Diffusion.build(prior.diffusion), tokens, row_N, range(2**41, 2**41 + len(row_N)), sampler)
    return x_ND.view(NUM_USERS, count, -1)


def quality(x_GSD: torch.Tensor, of: Population) -> dict[str, float]:
    """Mean true like probability of the nearest items, the share of them that differ, and distances to held-out likes."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    nearest_GS = nearest_items(F.normalize(x_GSD.flatten(0, 1)), unit_ID)[0].view(x_GSD.shape[:2]).numpy()
    like = np.take_along_axis(of.like_GI, nearest_GS, axis=1).mean()
    distinct = np.mean([len(set(row)) / len(row) for row in nearest_GS])
    real = F.normalize(torch.from_numpy(of.x0_ID[np.concatenate(of.held_out_likes())]))
    drawn = F.normalize(x_GSD.flatten(0, 1))
    return {"like": float(like), "distinct": float(distinct), "mmd": mmd(drawn, real), "frechet": frechet(drawn, real)}


def mmd(left_ND: torch.Tensor, right_ND: torch.Tensor, sigma: float = 0.5) -> float:
    """MMD² with a Gaussian kernel, unbiased, times 1000 (CMMD, Jayasumana et al. 2024; sigma for unit vectors)."""

    def kernel(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(one, two).square() / (2 * sigma**2))

    n, m = len(left_ND), len(right_ND)
    within = (kernel(left_ND, left_ND).sum() - n) / (n * (n - 1)) + (kernel(right_ND, right_ND).sum() - m) / (m * (m - 1))
    return 1000 * float(within - 2 * kernel(left_ND, right_ND).mean())


def frechet(left_ND: torch.Tensor, right_ND: torch.Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to the embeddings (Heusel et al. 2017)."""
    one, two = left_ND.double(), right_ND.double()
    cov_one, cov_two = torch.cov(one.T), torch.cov(two.T)
    mixed = torch.linalg.eigvals(cov_one @ cov_two).real.clamp(min=0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + cov_one.trace() + cov_two.trace() - 2 * mixed)


def choosing(prior: TrainedPrior, of: Population) -> dict[int, dict[str, float]]:
    """Quality of 4 items a user against the candidates drawn for each, chosen as planning does."""
    assert prior.selector is not None
    drawn = sample(prior, of, 4 * max(CANDIDATES))
    factors = factors_of(prior.selector, of.block, of.user_G, of.x0_ID)
    found = {}
    for candidates in CANDIDATES:
        kept = []
        for x_SD, factor in zip(drawn[:, : 4 * candidates], factors, strict=True):
            like = prior.selector.like_probability(x_SD, factor.expand(len(x_SD), -1)).numpy()
            unit = F.normalize(x_SD).numpy()
            kept.append(x_SD[choose(unit, like, np.zeros(len(like), bool), 4, diversity=0.3).copy()])
        found[candidates] = quality(torch.stack(kept), of)
    return found


def one_seed(seed: int, data: Path, users: int, epochs: int, items: str) -> dict[str, Any]:
    """Simulate, train, distil and judge one population."""
    folder = data / f"seed-{seed}"
    simulate(users, seed, folder / "seen")
    simulate(users // 4, seed + 10_000, folder / "unseen")
    embedded = read_image_embeds(items)

    def train(name: str, **network: object) -> TrainedPrior:
        overrides = [f"interactions.path={folder}/seen/interactions.parquet", f"items={items}", f"out={folder}/{name}"]
        overrides += [f"storage={folder}/train", f"optimization.seed={seed}", f"optimization.max_epochs={epochs}"]
        overrides += [f"network.{key}={value}" for key, value in network.items()]
        train_prior(load_config(TrainConfig, ROOT / "jobs/configs/train_stickers.yaml", overrides))
        return load_prior(f"{folder}/{name}")

    history, table, nobody = train("history"), train("id", user_encoder="id"), train("noue", user_encoder="none")
    distill_prior(
        DistillConfig(
            prior=f"{folder}/history",
            out=f"{folder}/distilled",
            interactions=InteractionSettings(path=f"{folder}/seen/interactions.parquet"),
            items=items,
            storage=f"{folder}/train",
            learning_rate=1e-3,
            min_quality=0,
        )
    )
    x0_ID = history.scaler.scale(torch.from_numpy(embedded.image_embeds)).numpy()
    seen, unseen = (
        read_population(
            f"{folder}/{name}/interactions.parquet", folder / name / "truth.parquet", items, f"{folder}/train", x0_ID, embedded.item_id
        )
        for name in ("seen", "unseen")
    )
    random = np.random.default_rng(seed)
    likes = seen.training_likes()
    liked = np.stack([random.choice(own, SAMPLES) for own in likes])
    mean = torch.stack([torch.from_numpy(x0_ID[own]).mean(0) for own in likes])[:, None].expand(-1, SAMPLES, -1)
    reference = SamplerSettings(name="ddpm", num_inference_steps=1000)
    return {
        "a reference, 1000 steps": quality(sample(history, seen, SAMPLES, reference), seen),
        "b default sampler": quality(sample(history, seen, SAMPLES), seen),
        "c distilled, 4 passes": quality(sample(load_prior(f"{folder}/distilled"), seen, SAMPLES), seen),
        "d history encoder, seen users": quality(sample(history, seen, SAMPLES), seen),
        "e history encoder, unseen users": quality(sample(history, unseen, SAMPLES), unseen),
        "f NoUE": quality(sample(nobody, seen, SAMPLES), seen),
        "g mean of liked embeddings": quality(mean, seen),
        "h random liked training item": quality(torch.from_numpy(x0_ID[liked]), seen),
        "i id table, seen users": quality(sample(table, seen, SAMPLES), seen),
        "guidance": history.sampling.prior_guidance_scale,
        "sweep": {
            f"{scale:g}": quality(sample(history, seen, SAMPLES, SamplerSettings(prior_guidance_scale=scale)), seen)
            for scale in GUIDANCE_SCALES
        },
        "candidates_per_item": choosing(history, seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("runs/prior_quality"))
    arguments = parser.parse_args()
    data = arguments.data.absolute()
    items = str(data / "items")
    if not (data / "items" / "embedding.json").exists():
        embed_items(load_config(EmbedConfig, ROOT / "jobs/configs/embed_stickers.yaml", [f"out={items}"]))
    found = {}
    for seed in arguments.seeds:
        found[seed] = one_seed(seed, data, arguments.users, arguments.epochs, items)
        (RESULTS / "prior_quality.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table("", "true like probability", "distinct of 25", "MMD × 1000", "Fréchet")
    for name in [name for name in found[arguments.seeds[0]] if name[1] == " "]:
        rows = [[found[seed][name][figure] for seed in found] for figure in ("like", "distinct", "mmd", "frechet")]
        table.add_row(name, *(f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
