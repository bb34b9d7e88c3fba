"""Time and memory to assemble one bucket: 10,000 users with ten items each, of 1,024 numbers.

`python -m tests.bench.bucket [--scale 1.0]` writes `tests/bench/results/bucket.json`.
"""

import argparse
import json
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.generation.assembly import Assembly, BucketInput, ImageFile
from rebeca_ray.generation.bucket import Bucket
from rebeca_ray.generation.context import Models, RunContext
from rebeca_ray.generation.decide import write_decisions
from rebeca_ray.generation.decisions import Action, Decision
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.storage.parquet import WrittenTable, write_table

USERS, ITEMS_PER_USER, D = 10_000, 10, 1024
IMAGES_PER_FILE = 2_500


def bucket(folder: Path, scale: float) -> dict[str, float]:
    """Return the seconds to assemble one bucket without an earlier snapshot."""
    run = Run(root=str(folder), run_date="2026-01-01", run_id="size", fencing_token=1)
    users = [f"user-{number:08d}" for number in range(round(USERS * scale))]
    decisions = [
        Decision(
            user_id=user,
            action=Action.PLAN,
            num_images=ITEMS_PER_USER,
            prompt="",
            negative_prompt="",
            bucket=0,
            histories_bucket=0,
            cold_start=False,
            history_digest="digest",
            generation=0,
            settings_digest="settings",
            priority=0.0,
            activity=1,
        )
        for user in users
    ]
    bucket = BucketInput(
        bucket=0,
        decided=write_decisions(decisions, run, 0, to_plan=False),
        parts=write_plan(run, users),
        files=write_images(run, len(users) * ITEMS_PER_USER),
    )
    count = len(users) * ITEMS_PER_USER
    work = Assembly(
        context=context_of(run, requested=count),
        timed_out=False,
        now=datetime.now(UTC),
        metadata={},
        first_file=0,
        first_compacted=-(-count // IMAGES_PER_FILE),
        pool_decision=None,
    )
    started = time.perf_counter()
    result = Bucket.read(work, bucket).assemble()
    assert result.counts["new"] == count
    items = next(row for row in result.files if row["table"] == "items")
    return {"seconds": time.perf_counter() - started, "items_mb": items["bytes"] / 1e6}


def context_of(run: Run, requested: int) -> RunContext:
    """Return the context of a run without models."""
    decoder = DecoderSettings(model="any", safety=SafetySettings(max_probability=0.5))
    return RunContext(
        config=GenerateConfig(
            prior="any",
            decoder=decoder,
            request="any",
            catalog=run.root,
            layout=LayoutSettings(num_buckets=1),
        ),
        run=run,
        models=Models(
            versions={"prior": "prior", "decoder": "decoder", "code": "0"},
            decoder_weights={},
            safety_checker="none",
            embed_dim=D,
            clip_fingerprint=None,
            can_rescore=True,
            user_encoder="none",
        ),
        previous=None,
        requested=requested,
        began_at=datetime.now(UTC),
        in_process=True,
    )


def record_of(path: str, written: WrittenTable) -> PartRecord:
    """Return the record of one part of bucket 0."""
    return PartRecord(bucket=0, shard=0, attempt=0, path=path, **written, failed=0, busy_seconds=0.0)


def write_plan(run: Run, users: list[str]) -> list[PartRecord]:
    """Write the planned items of the users, 20,000 per file."""
    random = np.random.default_rng(0)
    parts, count = [], len(users) * ITEMS_PER_USER
    for number, start in enumerate(range(0, count, 20_000)):
        indices = np.arange(start, min(start + 20_000, count))
        embeds = random.standard_normal((len(indices), D), np.float32).astype(np.float16).astype(np.float32)
        columns = {
            "item_id": [f"{index:032x}" for index in indices],
            "user_id": [users[index // ITEMS_PER_USER] for index in indices],
            "rank": pa.array(indices % ITEMS_PER_USER, pa.int16()),
            "image_embeds": pa.FixedSizeListArray.from_arrays(
                pa.array(embeds.ravel()), type=schemas.image_embeds(D)
            ),
            "like_probability": random.random(len(indices), np.float32),
            "nearest_item_id": [f"real-{index}" for index in indices],
            "nearest_similarity": random.random(len(indices), np.float32),
            "origin": ["new"] * len(indices),
        }
        written = write_table(
            pa.table(columns),
            f"{run.plan}/{number}.parquet",
            row_group_size=20_000,
            embed_column="image_embeds",
        )
        parts.append(record_of(f"plan/{number}.parquet", written))
    return parts


def write_images(run: Run, count: int) -> list[ImageFile]:
    """Write the image files of `count` items, without pixels."""
    image = {
        "image": {"bytes": b"", "path": "x.webp"},
        "thumbnail": b"",
        "width": 512,
        "height": 512,
        "seed": 0,
    }
    files = []
    for number, start in enumerate(range(0, count, IMAGES_PER_FILE)):
        indices = range(start, min(start + IMAGES_PER_FILE, count))
        rows = [{**image, "item_id": f"{index:032x}"} for index in indices]
        path = f"{run.images}/bucket=0/{number}.parquet"
        written = write_table(
            pa.Table.from_pylist(rows, schema=schemas.IMAGES), f"{run.root}/{path}", row_group_size=100
        )
        files.append(ImageFile(number=number, record=record_of(path, written)))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the sizes above")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = bucket(Path(folder), arguments.scale)
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {name: round(value, 2) for name, value in figures.items()}
    print(json.dumps(result))
    (Path(__file__).parent / "results" / "bucket.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
