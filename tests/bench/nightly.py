"""The cost of a refresh against a full run, and the error of the forecasts, on the bundled world.

`python -m tests.bench.nightly --data ~/rebeca-stickers [--users 400]` writes
`tests/bench/results/nightly.json`. It reads the interactions, items and prior of an earlier `rebeca demo`.
It runs three nights of one new catalog:

    calibration  a quarter of the users, to measure the rates
    full         all users planned again, under another setting
    refresh      5% of the users have a new rating
"""

import argparse
import json
import tempfile
import time
from datetime import date
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
    """Write the interactions with one more rating per user, of an unrated item, a day after all others."""
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
    """Run one night, verify its snapshot, and return its figures."""
    started = time.perf_counter()
    manifest = generate_catalog(config.model_copy(update={"run_date": date(2026, 3, number)})).manifest
    seconds = time.perf_counter() - started
    assert verify(read_catalog(config.catalog), "sample") == []
    actual, forecast = manifest.actual, manifest.forecast
    assert actual is not None
    figures: dict[str, Any] = {
        "images": actual.images,
        "seconds_in_all": round(seconds, 1),
        "seconds_actual": round(3600 * actual.hours, 1),
    }
    if forecast:
        figures |= {
            "seconds_forecast": round(3600 * forecast.hours, 1),
            "images_forecast": forecast.images,
        }
    return figures | {
        "counts": manifest.counts.model_dump(),
        "stages": manifest.measured.model_dump(exclude_none=True)["stages"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("~/rebeca-stickers").expanduser())
    parser.add_argument("--users", type=int, default=400)
    arguments = parser.parse_args()
    interactions = arguments.data / "interactions.parquet"
    users = sorted(set(pq.read_table(interactions, columns=["user_id"])["user_id"].to_pylist()))
    users = users[: arguments.users]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = load_config(
            GenerateConfig,
            CONFIG,
            [
                f"prior={arguments.data}/prior",
                f"items={arguments.data}/items",
                f"request={work}/request.parquet",
                f"interactions.path={work}/interactions.parquet",
                f"catalog={work}/catalog",
            ],
        )
        pq.write_table(pq.read_table(interactions), work / "interactions.parquet")
        pq.write_table(pa.table({"user_id": users[: arguments.users // 4]}), work / "request.parquet")
        nights = {"calibration": night(base, 1)}
        pq.write_table(pa.table({"user_id": users}), work / "request.parquet")
        changed = base.model_copy(update={"selection": base.selection.model_copy(update={"diversity": 0.31})})
        nights["full"] = night(changed, 2)
        rate_something(interactions, users[:: round(1 / CHANGED)], work / "interactions.parquet")
        nights["refresh"] = night(changed, 3)
    full, refresh = nights["full"], nights["refresh"]
    ratios = {
        "images": round(refresh["images"] / full["images"], 4),
        "seconds": round(refresh["seconds_in_all"] / full["seconds_in_all"], 4),
        "full_forecast": round(full["seconds_forecast"] / full["seconds_actual"], 4),
        "refresh_forecast": round(refresh["seconds_forecast"] / refresh["seconds_actual"], 4),
    }
    path = Path(__file__).parent / "results" / "nightly.json"
    path.write_text(json.dumps({"users": len(users), "ratios": ratios, **nights}, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
