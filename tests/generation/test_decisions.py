"""Shards: many keys at once are cut as each alone is."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray import schemas
from rebeca_ray.generation.decisions import RENDER_KEY, render_keys, shards_of
from rebeca_ray.identity import hash128

keys = st.tuples(st.sampled_from([-1.5, -0.0, 0.0, 3.0]), st.integers(-3, 0), st.integers(0, 4))


@given(boundaries=st.lists(keys, max_size=6).map(sorted), key_list=st.lists(keys, max_size=20))
def test_the_shard_counts_the_boundaries_that_are_not_above_the_key(
    boundaries: list[tuple[float, int, int]], key_list: list[tuple[float, int, int]]
) -> None:
    shards = shards_of(np.array(key_list, RENDER_KEY), boundaries)
    assert shards.tolist() == [sum(key >= boundary for boundary in boundaries) for key in key_list]


@pytest.mark.parametrize("by_urgency", [True, False])
def test_keys_as_columns_are_the_keys_of_the_rows(by_urgency: bool) -> None:
    texts = ("action", "prompt", "negative_prompt", "history_digest", "settings_digest")
    rows = [
        dict.fromkeys(texts, "")
        | {"user_id": f"user-{number}", "num_images": 3, "bucket": number % 4, "histories_bucket": 0}
        | {"cold_start": False, "generation": 0, "priority": number / 7, "activity": number % 3}
        for number in range(20)
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.DECISIONS)
    expected = [
        (
            -row["priority"] if by_urgency else float(row["bucket"]),
            float(-row["activity"]) if by_urgency else 0.0,
            float(int(hash128("order", row["user_id"])[:12], 16)),
        )
        for row in table.to_pylist()
    ]
    assert render_keys(table, by_urgency).tolist() == expected
