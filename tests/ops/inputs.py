"""The inputs of three nights on S3: users come, rate more and go, and new stickers appear."""

import datetime
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.stickers import ITEMS
from rebeca_ray.stickers.simulate import user_name
from tests.ops.cluster import BIN

DATES = [datetime.date(2026, 3, day) for day in (2, 3, 4)]
USERS = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 7, 8, 10, 11]]
RATES_MORE = [[], [2], [3, 4, 5, 6]]  # these users rate for the first time since the night before
NUM_IMAGES = 2
EARLY, ALL = 20, 30  # ratings of a user who rates more later, and of one who has


def names(night: int) -> list[str]:
    """Return the ids of the users whom a night serves."""
    return [user_name(0, number) for number in USERS[night]]


def unchanged(night: int) -> list[str]:
    """Return the users of a night whose items stay: served the night before, with the same ratings."""
    more = {user_name(0, number) for number in RATES_MORE[night]}
    return [user for user in names(night) if user in names(night - 1) and user not in more]


def ratings_of(all_ratings: pa.Table, night: int) -> pa.Table:
    """Return the ratings until a night."""
    later = {user_name(0, number) for numbers in RATES_MORE[night + 1 :] for number in numbers}
    users = sorted({user for past in range(night + 1) for user in names(past)})
    parts = []
    for user in users:
        rows = all_ratings.filter(pc.field("user_id") == user)
        parts.append(rows.slice(0, EARLY if user in later else ALL))
    return pa.concat_tables(parts)


def write_inputs(folder: Path, store: Any) -> None:
    """Write the interactions, the request and the items of each night below `s3://rebeca/in/<date>/`."""
    command = [BIN / "rebeca", "stickers", "simulate", "--users", "12", "--out", folder]
    subprocess.run(command, check=True, capture_output=True)
    ratings = pq.read_table(folder / "interactions.parquet")
    items = pq.read_table(ITEMS)
    for night, date in enumerate(DATES):
        rated = ratings_of(ratings, night)
        tables = {
            "interactions": rated,
            "request": pa.table({"user_id": names(night)}),
            "items": items.filter(pc.is_in(items["item_id"], rated["item_id"].unique())),
        }
        for name, table in tables.items():
            with store.open(f"rebeca/in/{date}/{name}.parquet", "wb") as file:
                pq.write_table(table, file)


def overrides(triton_url: str) -> list[str]:
    """Return the overrides of `jobs/configs/nightly_stickers.yaml` for this store and two cores."""
    root, inputs = "s3://rebeca", "s3://rebeca/in/{run_date}"
    return [
        f"embed.items={inputs}/items.parquet",
        f"embed.out={root}/items",
        "embed.num_actors=1",
        f"train.interactions.path={inputs}/interactions.parquet",
        f"train.items={root}/items",
        f"train.out={root}/prior",
        f"train.storage={root}/train",
        "train.optimization.max_epochs=1",
        f"generate.prior={root}/prior",
        f"generate.request={inputs}/request.parquet",
        f"generate.interactions.path={inputs}/interactions.parquet",
        f"generate.items={root}/items",
        f"generate.catalog={root}/catalog",
        f"generate.num_images={NUM_IMAGES}",
        "generate.sampler.num_actors=1",
        "generate.decoder.num_actors=1",
        "generate.decoder.num_inference_steps=10",  # so that a fault strikes in the midst of rendering
        "generate.decoder.batch_size=2",
        "generate.decoder.backend=triton",
        "generate.decoder.device=cpu",
        "generate.decoder.dtype=float32",
        f"generate.decoder.triton.url={triton_url}",
        "generate.layout.images_per_file=2",
        "generate.layout.num_buckets=1",
        "generate.limits.lease_seconds=8",
        "generate.limits.stall_minutes=3",
        # After one epoch on 8 users the prior ignores them, and the gate would refuse the night.
        "generate.gate.max_p_value=null",
    ]
