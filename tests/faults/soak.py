"""A soak: small nights in a row in one process with one Ray, with rotation, changes, gc and a reader.

`python -m tests.faults.soak --minutes 30` samples memory, files, processes and the object store after every
night, compares the first third of the nights with the last, and writes tests/bench/results/soak.json.
"""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from tests.conftest import NO_GATE, REPO, USERS, generate_config
from tests.faults.real.checks import Reader

RESULTS = REPO / "tests" / "bench" / "results" / "soak.json"
MONDAY = datetime.date(2026, 3, 2)
SETTLE = 2.0  # seconds between a night and its sample: Ray ends idle workers in that time
WARM_UP = 3  # nights that are left out: imports, caches, the first snapshots
MB = 2**20


def read_for_ever(root: str) -> None:
    """Poll a catalog; print one line of JSON at the end of standard input."""
    reader = Reader(root)
    reader.start()
    sys.stdin.read()
    reader.stop()
    print(json.dumps({"snapshots": len(reader.hashes), "errors": reader.errors}))


def sample(root: Path, session: Path, reader: int) -> dict[str, float]:
    """Return the sizes of everything that could grow."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address
    store = get_memory_info_reply(get_state_from_address(address)).store_stats
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory: dict[str, float] = {"driver": 0, "reader": 0, "gcs": 0, "raylet": 0, "workers": 0, "agents": 0}
    count = files = 0
    for process in processes:
        try:
            name, rss = kind(process, reader), process.memory_info().rss
            memory[name] += rss / MB
            files += process.num_fds()
            count += 1
        except psutil.NoSuchProcess:
            continue
    in_session = [path for path in session.rglob("*") if path.is_file()]
    return {
        **{f"{name}_mb": round(value, 1) for name, value in memory.items()},
        "processes": count,
        "open_files": files,
        "catalog_files": sum(path.is_file() for path in root.rglob("*")),
        "catalog_mb": round(sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / MB, 3),
        "pointer_bytes": (root / "latest.json").stat().st_size,
        "session_files": sum("logs" not in path.parts for path in in_session),
        "log_files": sum("logs" in path.parts for path in in_session),
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
        "object_store_mb": round(store.object_store_bytes_used / MB, 3),
        "spilled_mb": round(store.spilled_bytes_total / MB, 3),
    }


def kind(process: psutil.Process, reader: int) -> str:
    """Return which part of the job a process is."""
    if process.pid in (os.getpid(), reader):
        return "driver" if process.pid == os.getpid() else "reader"
    command = " ".join(process.cmdline())
    for name, mark in (("gcs", "gcs_server"), ("raylet", "raylet/raylet"), ("workers", "ray::")):
        if mark in command.split(" --")[0]:
            return name
    return "workers" if "default_worker" in command else "agents"


def trend(values: list[float]) -> dict[str, float]:
    """Return the medians of the first and the last third, and the slope per night of a straight line."""
    third = max(1, len(values) // 3)
    slope = np.polyfit(range(len(values)), values, 1)[0] if len(values) > 1 else 0.0
    return {
        "first_third": round(median(values[:third]), 3),
        "last_third": round(median(values[-third:]), 3),
        "per_night": round(float(slope), 4),
    }


def soak(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Run nights for some minutes; return the figures."""
    from rebeca_ray.catalog.read import read_catalog
    from rebeca_ray.config.jobs import NightlyConfig
    from rebeca_ray.config.sections import LayoutSettings, RefreshSettings
    from rebeca_ray.generation import render
    from rebeca_ray.log import configure
    from rebeca_ray.nightly import run_nightly
    from rebeca_ray.ray_runtime import start_ray
    from tests.generation.light_render import LightRender
    from tests.generation.test_nights import change_digest, request_for
    from tests.tiny_decoder import write_tiny_decoder

    configure()
    generator = random.Random(seed)
    (folder / "decoder").mkdir()
    config = generate_config(folder, write_tiny_decoder(folder / "decoder", 16)).model_copy(
        update={
            "gate": NO_GATE,
            "layout": LayoutSettings(num_buckets=2, images_per_file=4),
            "refresh": RefreshSettings(rotation=0.3),
        }
    )
    render.RenderImages = LightRender  # type: ignore[misc]
    root = Path(config.catalog)
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.soak", "--read", str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    start_ray()
    session = next(Path(os.environ["RAY_TMPDIR"]).glob("**/session_2*"))
    samples: list[dict[str, float]] = []
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        night = len(samples)
        change_digest(config, generator.choice(USERS))
        users = generator.sample(USERS, generator.randint(4, 7))
        tonight = request_for(config, sorted(users), night)
        settings = {"run_date": tonight.run_date, "catch_up": 0, "keep_snapshots": 2, "grace_hours": 0}
        began = time.monotonic()
        run_nightly(
            NightlyConfig.model_validate(
                {"generate": tonight.model_copy(update={"run_date": None}).model_dump(), **settings}
            )
        )
        seconds = round(time.monotonic() - began, 2)
        assert read_catalog(config.catalog).manifest.run_date == str(tonight.run_date)
        time.sleep(SETTLE)
        samples.append({"seconds": seconds, **sample(root, session, reader.pid)})
        print(night, json.dumps(samples[-1]), flush=True)
    read = json.loads(reader.communicate("")[0])
    kept = samples[WARM_UP:] or samples
    return {
        "nights": len(samples),
        "minutes": minutes,
        "warm_up_nights": WARM_UP,
        "reader": {
            "snapshots": read["snapshots"],
            "errors": len(read["errors"]),
            "texts": read["errors"][:5],
        },
        "trends": {name: trend([sample[name] for sample in kept]) for name in kept[0]},
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--read", help="poll this catalog until standard input ends")
    arguments = parser.parse_args()
    if arguments.read:
        read_for_ever(arguments.read)
        return
    with tempfile.TemporaryDirectory(prefix="soak", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        tempfile.tempdir = f"{folder}/tmp"
        os.environ["TMPDIR"] = tempfile.tempdir
        Path(tempfile.tempdir).mkdir()
        figures = soak(Path(folder), arguments.minutes, arguments.seed)
        import ray

        ray.shutdown()
    rows = ",\n  ".join(json.dumps(row) for row in figures.pop("samples"))
    text = json.dumps(figures, indent=1).removesuffix("\n}")
    arguments.out.write_text(f'{text},\n "samples": [\n  {rows}\n ]\n}}\n')
    print(json.dumps({name: figures[name] for name in ("nights", "reader", "trends")}, indent=1))


if __name__ == "__main__":
    main()
