"""The simulated world: its like rate and AUC, and any size and seed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from rebeca_ray import schemas
from rebeca_ray.stickers import ITEMS
from rebeca_ray.stickers.simulate import simulate


def joined(folder: Path) -> pd.DataFrame:
    interactions, truth = (
        pq.read_table(folder / f"{name}.parquet").to_pandas() for name in ("interactions", "truth")
    )
    items = pq.read_table(ITEMS, columns=["item_id", "style", "subcategory"]).to_pandas()
    rows = interactions.merge(items).merge(truth)
    assert len(rows) == len(interactions)
    return rows


@pytest.mark.parametrize(("users", "seed"), [(2000, 0), (400, 1), (400, 77)])
def test_like_rate_and_auc_fix_the_world(tmp_path: Path, users: int, seed: int) -> None:
    assert simulate(users, seed, tmp_path) > 20 * users
    rows = joined(tmp_path)
    like = rows["rating"] >= 4
    assert 0.20 <= like.mean() <= 0.30
    assert roc_auc_score(like, rows["like_probability"]) == pytest.approx(0.85, abs=0.02)
    # P(rating >= 4) equals the true probability. It is not just monotone in it.
    assert rows["like_probability"].mean() == pytest.approx(like.mean(), abs=0.01)


def test_files_have_the_contracts_shape(tmp_path: Path) -> None:
    simulate(300, 5, tmp_path)
    interactions = pq.read_table(tmp_path / "interactions.parquet")
    assert list(interactions.schema) == [field for field in schemas.INTERACTIONS if field.name != "event"]
    frame = interactions.to_pandas()
    assert not frame.duplicated(["user_id", "item_id"]).any()
    assert set(frame["rating"]) == {1, 2, 3, 4, 5}
    counts = frame.groupby("user_id").size()
    assert len(counts) == 300
    assert counts.between(20, 400).all()
    assert counts.mean() > 1.15 * counts.median()  # a long tail
    popularity = frame["item_id"].value_counts().to_numpy()
    # The top 5% of items get well over 5% of the ratings.
    assert popularity[:355].sum() > 0.12 * popularity.sum()
    truth = pq.read_table(tmp_path / "truth.parquet").to_pandas()
    pairs = pq.read_table(ITEMS, columns=["style", "subcategory"]).to_pandas().drop_duplicates()
    assert len(truth) == 300 * len(pairs)
    assert truth["like_probability"].between(0, 1).all()
    assert pq.read_table(tmp_path / "request.parquet").num_rows == 100


def test_a_user_is_the_same_at_every_size(tmp_path: Path) -> None:
    simulate(1, 3, tmp_path / "one")
    simulate(3, 3, tmp_path / "three")
    one, three = (pq.read_table(tmp_path / name / "interactions.parquet") for name in ("one", "three"))
    assert three.slice(0, one.num_rows).equals(one)
    simulate(1, 4, tmp_path / "other")
    other = pq.read_table(tmp_path / "other" / "interactions.parquet")
    assert not np.array_equal(other["item_id"].to_pylist()[:20], one["item_id"].to_pylist()[:20])
