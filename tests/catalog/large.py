"""Write a snapshot of items alone, larger than a night of the tiny decoder."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import FileList
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from tests.conftest import publish, synthetic_manifest

BUCKETS, NUM_USERS, ITEMS_PER_USER = 3, 500, 4
D = 64
MANY_USERS = [f"üser-{number:03d}" for number in range(NUM_USERS)]


def write_snapshot(
    root: Path,
    *,
    rows_per_group: int,
    version: int = schemas.SCHEMA_VERSION,
    users: list[str] = MANY_USERS,
    D: int = D,
) -> str:
    """Publish a snapshot of items alone, in three files of several row groups; return its root."""
    run = Run(root=str(root), run_date="2026-03-02", run_id="large", fencing_token=1)
    random = np.random.default_rng(0)
    files = []
    for bucket in range(BUCKETS):
        users_of_bucket = sorted(user for user in users if bucket_of(user, BUCKETS) == bucket)
        if not users_of_bucket:
            continue
        count = len(users_of_bucket) * ITEMS_PER_USER
        embeds = random.standard_normal((count, D), np.float32)
        columns = {
            "item_id": [f"{bucket}-{number:04d}" for number in range(count)],
            "user_id": np.repeat(users_of_bucket, ITEMS_PER_USER),
            "rank": np.tile(np.arange(ITEMS_PER_USER), len(users_of_bucket)),
            "image_embeds": pa.FixedSizeListArray.from_arrays(
                pa.array(embeds.ravel()), type=schemas.image_embeds(D)
            ),
            "like_probability": random.random(count),
            "nearest_item_id": pa.nulls(count, pa.string()),
            "nearest_similarity": pa.nulls(count, pa.float32()),
            "safety_flag": np.zeros(count, bool),
            "origin": ["new"] * count,
            "generated_at": pa.repeat(pa.scalar(0, pa.timestamp("us", "UTC")), count),
            "image_file": np.zeros(count),
            "image_row": np.zeros(count),
        }
        schema = schemas.items(D)
        table = pa.table(
            [pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema
        )
        path = run.table("items", bucket)
        written = write_table(
            table, f"{root}/{path}", row_group_size=rows_per_group, embed_column="image_embeds"
        )
        ends = {"min_user_id": users_of_bucket[0], "max_user_id": users_of_bucket[-1]}
        files.append({"table": "items", "bucket": bucket, "file": bucket, "path": path, **written, **ends})
    listing = f"{run.snapshot}/files.parquet"
    written = write_table(
        pa.Table.from_pylist(files, schema=schemas.FILES), f"{root}/{listing}", row_group_size=100
    )
    manifest = synthetic_manifest(
        run,
        FileList(path=listing, **written),
        schema_version=version,
        embed_dim=D,
        num_buckets=BUCKETS,
    )
    write_json(manifest.model_dump(), run.manifest)
    publish(str(root), run)
    return str(root)
