"""The sums that the quality gate's figures are made of."""

import numpy as np
import pyarrow as pa
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.figures import quality_sums
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.generation.item_columns import without_pool


def test_the_sums_of_a_bucket_match_a_calculation_by_hand() -> None:
    """User a has two equal items and one at right angles, b a single item, c two opposite items."""
    x, y = [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]
    rows = [
        (POPULATION_USER, y, 0.9),
        ("a", x, 0.5),
        ("a", x, 0.25),
        ("a", y, 0.75),
        ("b", x, 1.0),
        ("c", y, 0.5),
        ("c", [0.0, -4.0, 0.0], None),  # not judged
    ]
    embeds = pa.FixedSizeListArray.from_arrays(
        pa.array(np.array([row[1] for row in rows], np.float32).ravel()), type=schemas.image_embeds(3)
    )
    items = pa.table(
        {
            "user_id": [row[0] for row in rows],
            "image_embeds": embeds,
            "like_probability": pa.array([row[2] for row in rows], pa.float32()),
        }
    )
    sums = quality_sums(without_pool(items))
    assert (
        sums["items"],
        sums["duplicates"],
        sums["judged"],
        sums["like"],
        sums["users_with_several"],
    ) == (6, 1, 5, 3.0, 2)
    assert sums["distance"] == pytest.approx((0 + 1 + 1) / 3 + 2)
    assert quality_sums(without_pool(items.slice(0, 1))) == {}
