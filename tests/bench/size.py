"""What grows with the catalog: one bucket of 10,000 users, the file list of 10 million, the order of all of them.

`python -m tests.bench.size` writes `tests/bench/results/size.json`. Each part runs in a process of its own, whose peak memory is told.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.generation.assembly import Assembly
from rebeca_ray.generation.bucket import Bucket
from rebeca_ray.generation.decide import cut, write_decisions
from rebeca_ray.storage.parquet import read_table, write_table

USERS, ITEMS_PER_USER, D = 10_000, 10, 1024
IMAGES_A_FILE, FILES = 2_500, 44_000
ALL_USERS, ITEMS_A_UNIT = 10_000_000, 2_000_000


def bucket(folder: Path) -> dict[str, float]:
    """Seconds to assemble one bucket in which everybody is new."""
    run = Run(root=str(folder), run_date="2026-01-01", run_id="size", fencing_token=1)
    users = [f"user-{number:08d}" for number in range(USERS)]
    row = {
        "num_images": ITEMS_PER_USER,
        "prompt": "",
        "negative_prompt": "",
        "bucket": 0,
        "histories_bucket": 0,
        "stranger": False,
    }
    row |= {
        "history_digest": "digest",
        "generation": 0,
        "made_with": "settings",
        "priority": 0.0,
        "activity": 1,
        "decision": "plan",
    }
    write_decisions([{**row, "user_id": user} for user in users], run.decisions(0))
    random = np.random.default_rng(0)
    parts, files, count = [], [], USERS * ITEMS_PER_USER
    for number, start in enumerate(range(0, count, 20_000)):
        places = np.arange(start, start + 20_000)
        embeds = random.standard_normal((len(places), D), np.float32).astype(np.float16).astype(np.float32)
        columns = {
            "item_id": [f"{place:032x}" for place in places],
            "user_id": [users[place // ITEMS_PER_USER] for place in places],
            "rank": pa.array(places % ITEMS_PER_USER, pa.int16()),
            "image_embeds": pa.FixedSizeListArray.from_arrays(
                pa.array(embeds.ravel()), type=schemas.image_embeds(D)
            ),
            "like_probability": random.random(len(places), np.float32),
            "nearest_item_id": [f"real-{place}" for place in places],
            "nearest_similarity": random.random(len(places), np.float32),
            "origin": ["new"] * len(places),
        }
        write_table(
            pa.table(columns),
            f"{run.plan}/{number}.parquet",
            row_group_size=20_000,
            embed_column="image_embeds",
        )
        parts.append({"bucket": 0, "path": f"plan/{number}.parquet"})
    image = {
        "image": {"bytes": b"", "path": "x.webp"},
        "thumbnail": b"",
        "width": 512,
        "height": 512,
        "seed": 0,
    }
    for number, start in enumerate(range(0, count, IMAGES_A_FILE)):
        rows = [{**image, "item_id": f"{place:032x}"} for place in range(start, start + IMAGES_A_FILE)]
        path = f"{run.images}/bucket=0/{number}.parquet"
        written = write_table(
            pa.Table.from_pylist(rows, schema=schemas.IMAGES), f"{folder}/{path}", row_group_size=100
        )
        files.append({"bucket": 0, "path": path, "file": number, "attempt": 0, **written})
    work = Assembly(
        run=run, previous=None, num_buckets=1, embed_dim=D, prior="prior", parts=parts, files=files, late=False,
        max_safety_probability=0.5, now=datetime.now(UTC), metadata={}, first_compacted=len(files), pool=None,
    )  # fmt: skip
    started = time.perf_counter()
    found = Bucket.read(work, 0).assemble()
    assert found.counts["new"] == count
    items = next(row for row in found.files if row["table"] == "items")
    return {"seconds": time.perf_counter() - started, "items_mb": items["bytes"] / 1e6}


def file_list(folder: Path) -> dict[str, float]:
    """Size of the file list of a snapshot of 10 million users, and seconds to read it."""
    random = np.random.default_rng(0)
    rows = [
        {
            "table": "images", "bucket": number % 1024, "file": number, "rows": IMAGES_A_FILE, "bytes": int(random.integers(1e8, 1.5e8)),
            "path": f"images/run_id=20260101T010000-abcdef/bucket={number % 1024}/part-000001-{random.bytes(8).hex()}.parquet",
            "sha256": random.bytes(32).hex(), "min_user_id": "a", "max_user_id": "z", "live_rows": IMAGES_A_FILE,
        }
        for number in range(FILES)
    ]  # fmt: skip
    uri = str(folder / "files.parquet")
    size = write_table(pa.Table.from_pylist(rows, schema=schemas.FILES), uri, row_group_size=10_000)["bytes"]
    started = time.perf_counter()
    assert read_table(uri, "files").num_rows == FILES
    return {"seconds": time.perf_counter() - started, "megabytes": size / 1e6}


def order(_: Path) -> dict[str, float]:
    """Seconds to put 10 million users in the order in which they are drawn."""
    random = np.random.default_rng(0)
    keys = np.stack(
        [
            np.zeros(ALL_USERS),
            -random.integers(0, 500, ALL_USERS),
            random.random(ALL_USERS),
            np.full(ALL_USERS, 10.0),
        ],
        axis=1,
    )
    started = time.perf_counter()
    boundaries = cut(keys, ITEMS_A_UNIT)
    return {"seconds": time.perf_counter() - started, "units": len(boundaries) + 1}


PARTS = {"bucket": bucket, "file_list": file_list, "order": order}


def main() -> None:
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[sys.argv[1]](Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps(
                {**{name: round(value, 2) for name, value in found.items()}, "peak_gib": round(peak, 2)}
            )
        )
        return
    result = {}
    for name in PARTS:
        command = [sys.executable, "-m", "tests.bench.size", name]
        result[name] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        print(name, result[name], flush=True)
    path = Path(__file__).parent / "results" / "size.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
