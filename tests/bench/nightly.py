"""What a refresh costs against a full run, and how near the estimates come, on the bundled world.

`python -m tests.bench.nightly --data ~/rebeca-stickers [--users 400]` after `rebeca demo` (its interactions, items and prior are read)
writes `tests/bench/results/nightly.json`. Three nights of one new catalog: a quarter of the users, which measures the rates; all of
them drawn anew, under another setting; and a refresh after 5% of them rated something.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.generation.pipeline import generate_catalog

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "generate_stickers.yaml"
CHANGED = 0.05


def rate_something(source: Path, users: list[str], out: Path) -> None:
    """The interactions with one more rating of each of some users, of an item new to them, a day after all others."""
    table = pq.read_table(source)
    owner, item = (table[name].to_numpy(zero_copy_only=False) for name in ("user_id", "item_id"))
    everything = np.unique(item)
    rated = [str(np.setdiff1d(everything, item[owner == user])[0]) for user in users]
    latest = np.max(table["timestamp"].to_numpy()) + np.timedelta64(1, "D")
    columns = {
        "user_id": users,
        "item_id": rated,
        "rating": [5.0] * len(users),
        "timestamp": [latest.astype(object)] * len(users),
    }
    more = pa.table({name: columns[name] for name in table.column_names}, schema=table.schema)
    pq.write_table(pa.concat_tables([table, more]), out)


def night(config: GenerateConfig, number: int) -> dict[str, Any]:
    started = time.perf_counter()
    manifest = generate_catalog(
        config.model_copy(update={"run_date": np.datetime64("2026-03-01").astype(object).replace(day=number)})
    )
    seconds = time.perf_counter() - started
    assert verify(read_catalog(config.catalog), "sample") == []
    spent, foreseen = manifest.spent, manifest.foreseen
    hours = {"seconds_in_all": round(seconds, 1), "seconds_spent": round(3600 * spent["hours"], 1)}
    told = (
        {"seconds_foreseen": round(3600 * foreseen["hours"], 1), "images_foreseen": foreseen["images"]}
        if foreseen
        else {}
    )
    return {
        "images": spent["images"],
        **hours,
        **told,
        "counts": manifest.counts,
        "stages": manifest.measured["stages"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("~/rebeca-stickers").expanduser())
    parser.add_argument("--users", type=int, default=400)
    told = parser.parse_args()
    users = sorted(
        set(pq.read_table(told.data / "interactions.parquet", columns=["user_id"])["user_id"].to_pylist())
    )[: told.users]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = load_config(
            GenerateConfig,
            CONFIG,
            [
                f"prior={told.data}/prior",
                f"items={told.data}/items",
                f"request={work}/request.parquet",
                f"interactions.path={work}/interactions.parquet",
                f"catalog={work}/catalog",
            ],
        )
        pq.write_table(pq.read_table(told.data / "interactions.parquet"), work / "interactions.parquet")
        pq.write_table(pa.table({"user_id": users[: told.users // 4]}), work / "request.parquet")
        nights = {"calibration": night(base, 1)}
        pq.write_table(pa.table({"user_id": users}), work / "request.parquet")
        anew = base.model_copy(update={"selection": base.selection.model_copy(update={"diversity": 0.31})})
        nights["full"] = night(anew, 2)
        rate_something(
            told.data / "interactions.parquet", users[:: round(1 / CHANGED)], work / "interactions.parquet"
        )
        nights["refresh"] = night(anew, 3)
    full, refresh = nights["full"], nights["refresh"]
    ratios = {
        "images": round(refresh["images"] / full["images"], 4),
        "seconds": round(refresh["seconds_in_all"] / full["seconds_in_all"], 4),
        "full_foreseen": round(full["seconds_foreseen"] / full["seconds_spent"], 4),
        "refresh_foreseen": round(refresh["seconds_foreseen"] / refresh["seconds_spent"], 4),
    }
    path = Path(__file__).parent / "results" / "nightly.json"
    path.write_text(json.dumps({"users": len(users), "ratios": ratios, **nights}, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
