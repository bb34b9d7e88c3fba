"""Training with Ray Train: balanced users, two workers, a kill and a resume, and a prior that learned something."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.config import TrainConfig
from rebeca_ray.errors import UserError
from rebeca_ray.training import BalancedUserSampler, train_prior
from tests.conftest import D


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """Two kinds of items far apart; users a and b like one kind each."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2, D)) * 3
    embeds = (np.repeat(centres, 20, axis=0) + 0.3 * random.standard_normal((40, D))).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(pa.table({"item_id": [f"i{number:02d}" for number in range(40)], "image_embeds": column}), tmp_path / "items.parquet")
    rows = [(user, f"i{item:02d}", 5.0 if (item < 20) == (user == "a") else 1.0) for user in "ab" for item in range(40)]
    user_id, item_id, rating = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"user_id": user_id, "item_id": item_id, "rating": pa.array(rating, pa.float32())}), tmp_path / "interactions.parquet"
    )
    np.save(tmp_path / "centres.npy", centres)
    return {"interactions": str(tmp_path / "interactions.parquet"), "items": str(tmp_path / "items.parquet"), "folder": str(tmp_path)}


def configure(world: dict[str, str], **optimization: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "interactions": {"path": world["interactions"]},
            "items": world["items"],
            "out": f"{world['folder']}/prior",
            "storage": f"{world['folder']}/storage",
            "network": {"num_layers": 2, "num_heads": 2, "width": 32, "num_tokens": 2},
            "diffusion": {"num_train_timesteps": 100},
            "optimization": {
                "learning_rate": 5e-3,
                "batch_size": 64,
                "samples_per_user": 256,
                "max_epochs": 12,
                "ema_decay": 0.9,
                **optimization,
            },
            "workers": {"cpus_per_worker": 1},
        }
    )


def test_every_user_is_drawn_equally_often_and_never_from_the_hold_out() -> None:
    user_index = np.array([0] * 50 + [1] * 3 + [2] * 10)
    held_out = np.zeros(63, bool)
    held_out[[0, 52, 60]] = True
    sampler = BalancedUserSampler(user_index, held_out, 3, samples_per_user=200, seed=1)
    rows = sampler.epoch(4)
    assert np.bincount(user_index[rows]).tolist() == [200, 200, 200]
    assert not held_out[rows].any()
    assert set(rows[user_index[rows] == 1]) == {50, 51}
    assert np.array_equal(rows, sampler.epoch(4))
    assert not np.array_equal(rows, sampler.epoch(5))


def test_rated_items_without_an_embedding_are_named(world: dict[str, str]) -> None:
    pq.write_table(pq.read_table(world["items"]).slice(1), world["items"])
    with pytest.raises(UserError, match=r"2 of 80 interactions rate an item that has no embedding there \(i00\)"):
        train_prior(configure(world))


def test_items_without_embeddings_are_refused(world: dict[str, str]) -> None:
    pq.write_table(pa.table({"item_id": ["i00"], "image": [b""]}), world["items"])
    with pytest.raises(UserError, match="column 'image_embeds' is missing; run `rebeca embed` on them first"):
        train_prior(configure(world))
