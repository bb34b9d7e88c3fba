"""A simulated population with its hidden truth, its prior, and the quality of embeddings for it.

Shapes: V users of a block, G of them, S samples of a user, I items, D embed dim."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from rebeca_ray.config.jobs import EmbedConfig, TrainConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.histories import build_histories
from rebeca_ray.evaluation.distances import frechet, mmd
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.selection import nearest_items
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.schemas import TEST
from rebeca_ray.stickers.simulate import load_world, simulate
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training.train import train_prior

ROOT = Path(__file__).parents[2]
NUM_USERS = 200


SPLIT = {"hold_out": 0.05, "test": 0.1}


MMD_SIGMA = 0.5  # of unit vectors


@dataclass(frozen=True, kw_only=True)
class Population:
    """Some users of one seed: their training histories, test likes, and true like probabilities of items."""

    block: UserBlock
    user_G: np.ndarray
    like_GI: np.ndarray
    x0_ID: np.ndarray
    test_likes: np.ndarray  # item rows, of all users

    def with_latest(self, num_ratings: int) -> "Population":
        """Return the same users with their latest ratings alone."""
        counts_V = self.block.counts_V
        from_end_N = (
            np.repeat(self.block.starts_V + counts_V, counts_V) - 1 - np.arange(len(self.block.like_N))
        )
        return replace(self, block=self.block.part(from_end_N < num_ratings))

    def training_likes(self) -> list[np.ndarray]:
        """Return the item rows of each user's training likes."""
        rows = [
            np.arange(self.block.starts_V[user], self.block.starts_V[user] + self.block.counts_V[user])
            for user in self.user_G
        ]
        return [self.block.item_index_N[row_N[self.block.like_N[row_N] == 1]] for row_N in rows]


def embed_stickers(data: Path) -> str:
    """Embed the stickers into `data`, unless an earlier start did; return their folder."""
    items = data / "items"
    if not (items / "items.json").exists():
        embed_items(load_config(EmbedConfig, ROOT / "jobs/configs/embed_stickers.yaml", [f"out={items}"]))
    return str(items)


def simulate_populations(data: Path, seed: int, users: int) -> Path:
    """Simulate the users of one seed, and a fourth as many that training never sees; return their folder."""
    folder = data / f"seed-{seed}"
    simulate(users, seed, folder / "seen")
    simulate(users // 4, seed + 10_000, folder / "unseen")
    return folder


def train_stickers(
    folder: Path, name: str, items: str, seed: int, user_encoder: str = "history"
) -> TrainedPrior:
    """Train the stickers' prior on the users in `folder`."""
    overrides = [
        f"interactions.path={folder}/seen/interactions.parquet",
        f"items={items}",
        f"out={folder}/{name}",
        f"storage={folder}/train",
        f"optimization.seed={seed}",
        f"network.user_encoder={user_encoder}",
        *(f"interactions.{key}={value}" for key, value in SPLIT.items()),
    ]
    train_prior(load_config(TrainConfig, ROOT / "jobs/configs/train_stickers.yaml", overrides))
    return load_prior(f"{folder}/{name}")


def read_population(
    folder: Path, storage: str, x0_ID: np.ndarray, item_id: np.ndarray, num_users: int = NUM_USERS
) -> Population:
    """Return `num_users` of the users simulated in `folder`, evenly spaced."""
    interactions, truth = f"{folder}/interactions.parquet", folder / "truth.parquet"
    histories = build_histories(InteractionSettings(path=interactions, **SPLIT), item_id, storage)
    table = read_table(histories.file(0), "histories")
    block = UserBlock(table, histories.first_user_index)
    user_G = np.linspace(0, len(block.counts_V) - 1, num_users).astype(int)
    world = load_world()
    pair_of = {pair: number for number, pair in enumerate(world.pairs)}
    names = table["user_id"].take(user_G).to_pylist()
    tastes = pq.read_table(truth, filters=[("user_id", "in", names)]).to_pydict()
    like_GP = np.zeros((num_users, len(world.pairs)), np.float32)
    index_of = {name: index for index, name in enumerate(names)}
    for user, style, subcategory, like in zip(*tastes.values(), strict=True):
        like_GP[index_of[user], pair_of[style, subcategory]] = like
    row_of = {item: row for row, item in enumerate(world.item_id)}
    splits, liked, items = (
        np.concatenate(table[name].take(user_G).to_pylist()) for name in ("split", "like", "item_index")
    )
    return Population(
        block=block,
        test_likes=items[(splits == TEST) & (liked == 1)],
        user_G=user_G,
        like_GI=like_GP[:, world.pair[[row_of[item] for item in item_id]]],
        x0_ID=x0_ID,
    )


def quality(x_GSD: torch.Tensor, of: Population) -> dict[str, float]:
    """Return true like probability and share of distinct nearest items, and distances to test likes."""
    unit_ID = F.normalize(torch.from_numpy(of.x0_ID))
    nearest_GS = nearest_items(F.normalize(x_GSD.flatten(0, 1)), unit_ID)[0].view(x_GSD.shape[:2]).numpy()
    like = np.take_along_axis(of.like_GI, nearest_GS, axis=1).mean()
    distinct = np.mean([len(set(row)) / len(row) for row in nearest_GS])
    real = F.normalize(torch.from_numpy(of.x0_ID[of.test_likes]))
    drawn = F.normalize(x_GSD.flatten(0, 1))
    return {
        "like": float(like),
        "distinct": float(distinct),
        "mmd": 1000 * mmd(drawn, real, MMD_SIGMA, equal_counts=False),
        "frechet": frechet(drawn, real, equal_counts=False),
    }
