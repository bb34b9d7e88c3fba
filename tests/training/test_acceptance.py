"""Acceptance: in a world like the one that the paper's authors simulated, the defaults find the taste.

Each of four users likes one of four kinds of items (0.95), two others a little (0.10), and the last not
(0.01). A prior is trained for less than a minute. A sample stands for the real item nearest to it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.config.jobs import SampleConfig, TrainConfig
from rebeca_ray.halves.sample import sample_embeddings
from rebeca_ray.training.train import train_prior
from tests.training.in_process import loop_in_process as loop_in_process  # a fixture

D, NUM_ITEMS, NUM_RATED = 16, 40_000, 2000
PROFILES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
LIKE_BY_COMMON_ATTRIBUTES = np.array([0.01, 0.10, 0.95])
SET = 25  # samples that should be distinct


class World:
    """Items of two binary attributes and four smooth ones, and four users' true like probabilities."""

    def __init__(self, folder: Path, *, with_dislikes: bool) -> None:
        self.items, self.ratings = str(folder / "items.parquet"), str(folder / "ratings.parquet")
        random = np.random.default_rng(0)
        attributes = random.integers(0, 2, (NUM_ITEMS, 2))
        factors = np.concatenate([2.0 * attributes - 1, 3 * (random.random((NUM_ITEMS, 4)) - 0.5)], axis=1)
        hidden = np.tanh(factors @ (0.7 * random.standard_normal((6, 64))))
        embeds_ID = hidden @ random.standard_normal((64, D)) + 0.2 * random.standard_normal((NUM_ITEMS, D))
        self.unit_ID = (embeds_ID / np.linalg.norm(embeds_ID, axis=1, keepdims=True)).astype(np.float32)
        self.like_UI = LIKE_BY_COMMON_ATTRIBUTES[(attributes == PROFILES[:, None]).sum(2)]
        names = np.array([f"i{number:05d}" for number in range(NUM_ITEMS)])
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(embeds_ID.astype(np.float32).ravel()), type=schemas.image_embeds(D)
        )
        pq.write_table(pa.table({"item_id": names, "image_embeds": column}), self.items)
        tables, liked = [], []
        for user, like_I in enumerate(self.like_UI):
            is_liked = random.random(NUM_ITEMS) < like_I
            rows = random.permutation(NUM_ITEMS if with_dislikes else np.flatnonzero(is_liked))[:NUM_RATED]
            rating = np.where(is_liked[rows], 5.0, 1.0).astype(np.float32)
            tables.append(
                pa.table({"user_id": [f"u{user}"] * NUM_RATED, "item_id": names[rows], "rating": rating})
            )
            liked.append(like_I[rows[is_liked[rows]]].mean())
        pq.write_table(pa.concat_tables(tables), self.ratings)
        self.like_of_liked_items = float(np.mean(liked))

    def judge(self, sampled: str) -> tuple[float, float]:
        """Return the mean true like probability, and the share of distinct items in a set of samples."""
        table = pq.read_table(sampled)
        user_N = np.array([int(user[1:]) for user in table["user_id"].to_pylist()])
        embeds_ND = table["image_embeds"].combine_chunks().flatten().to_numpy().reshape(-1, D)
        nearest_N = (embeds_ND.astype(np.float32) @ self.unit_ID.T).argmax(1)
        distinct = np.mean([len(set(rows)) / SET for rows in nearest_N.reshape(-1, SET)])
        return float(self.like_UI[user_N, nearest_N].mean()), float(distinct)


@pytest.mark.usefixtures("loop_in_process")
@pytest.mark.parametrize(("user_encoder", "with_dislikes"), [("history", True), ("id", False)])
def test_the_default_settings_find_the_taste(tmp_path: Path, user_encoder: str, with_dislikes: bool) -> None:
    world = World(tmp_path, with_dislikes=with_dislikes)
    inputs = {"interactions": {"path": world.ratings}, "items": world.items, "storage": f"{tmp_path}/storage"}
    training = {
        "preset": "stickers",
        "network": {"user_encoder": user_encoder},
        "optimization": {"samples_per_user": 4800, "max_epochs": 3},
    }
    prior = f"{tmp_path}/prior"
    train_prior(TrainConfig.model_validate({**inputs, **training, "out": prior}))

    def judged(num_images: int, seed: int = 0, **settings: object) -> tuple[float, float]:
        out = f"{tmp_path}/{len(list(tmp_path.iterdir()))}.parquet"
        config = {**inputs, **settings, "prior": prior, "num_images": num_images, "seed": seed, "out": out}
        sample_embeddings(SampleConfig.model_validate(config))
        return world.judge(out)

    # Among so many items in so few dimensions, each sample is near one: none counts as a copy.
    no_copies = {"max_item_similarity": 1.0}
    plain = {"candidates_per_item": 1, **no_copies}
    like, distinct = judged(20 * SET, sampler={"selector_guidance_scale": 0.0}, selection=plain)
    assert like > world.like_of_liked_items - 0.02
    assert distinct >= 0.97
    # Sixteen candidates, the default, are more than such a world needs: the best of them are alike.
    for candidates, least_distinct in (({"candidates_per_item": 4}, 0.97), ({}, 0.94)):
        selection = {**candidates, **no_copies}
        like, distinct = np.mean([judged(SET, seed, selection=selection) for seed in range(4)], axis=0)
        assert like >= 0.93
        assert distinct >= least_distinct
