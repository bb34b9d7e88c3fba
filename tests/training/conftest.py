"""A world of two users who like one of two kinds of items each."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from tests.conftest import D


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """Two kinds of items far apart; users a and b like one kind each."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2, D)) * 3
    embeds = (np.repeat(centres, 20, axis=0) + 0.3 * random.standard_normal((40, D))).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(
        pa.table({"item_id": [f"i{number:02d}" for number in range(40)], "image_embeds": column}),
        tmp_path / "items.parquet",
    )
    rows = [
        (user, f"i{item:02d}", 5.0 if (item < 20) == (user == "a") else 1.0)
        for user in "ab"
        for item in range(40)
    ]
    user_id, item_id, rating = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"user_id": user_id, "item_id": item_id, "rating": pa.array(rating, pa.float32())}),
        tmp_path / "interactions.parquet",
    )
    np.save(tmp_path / "centres.npy", centres)
    return {
        "interactions": str(tmp_path / "interactions.parquet"),
        "items": str(tmp_path / "items.parquet"),
        "folder": str(tmp_path),
    }
