"""Run every stage at growing numbers of users, each in a process of its own, and print one table.

    python -m tests.bench.scale [--part night] [--sizes 10000 100000 1000000] [--stages check decide]

`night` runs every stage of a night, and the work that follows it. `driver` does the driver's part alone, and
`tables` verifies, exports and collects a snapshot without pixels: both for 10 million users too.

The smallest size holds the start-up of each stage. The cost per user at a larger size is the CPU time beyond
it, per user beyond it. The figures of a size join those of earlier calls in `results/scale.json`.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rebeca_ray.ray_runtime import for_each, start_ray
from tests.bench.scale.measure import measured
from tests.bench.scale.night import Night, count_files
from tests.bench.scale.tables import INPUTS_OF, STAGES_OF

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"
WITH_RAY = ("histories", "decide", "plan", "render", "assemble", "export")
COLUMNS = ("driver_cpu", "workers_cpu", "driver_mb", "worker_mb", "object_store_mb")


def one(stage: str, users: int, folder: Path, ray_folder: str) -> dict[str, Any]:
    """Measure one stage in this process, with a Ray of its own."""
    import ray

    os.environ |= {"RAY_TMPDIR": ray_folder, "RAY_ADDRESS": "local"}
    part, _, name = stage.rpartition(".")
    if name == "inputs":
        INPUTS_OF[part](folder, users)
        return {}
    night = Night(folder, users)
    if name == "files":
        return count_files(night)
    if name in WITH_RAY:
        start_ray()
    try:
        work = STAGES_OF[part][name](night)
        if name in WITH_RAY:
            for_each(warm, range(4))
        return measured(work)
    finally:
        ray.shutdown()


def warm(_: int) -> None:
    """Load the code of all stages in a worker."""
    importlib.import_module("tests.bench.scale.tables")
    time.sleep(1)


def in_own_process(stage: str, users: int, folder: Path) -> dict[str, Any]:
    """Measure one stage in a process that is forked: it has the code, and nothing of the stages before."""
    with (
        tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as ray_folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process,
    ):
        return process.submit(one, stage, users, folder, ray_folder).result()


def cost_per_user(sizes: dict[int, dict[str, Any]], users: int) -> float | None:
    """Return the CPU microseconds per user beyond the smallest size; None at that size."""
    least = min(sizes)
    if users == least:
        return None
    cpu = [sizes[size]["driver_cpu"] + sizes[size]["workers_cpu"] for size in (least, users)]
    return 1e6 * (cpu[1] - cpu[0]) / (users - least)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table("stage", "users", "seconds", "CPU µs per user", *COLUMNS)
    for stage, by_size in results.items():
        if stage.endswith("files"):
            continue
        sizes = {int(size): figures for size, figures in by_size.items()}
        for users in sorted(sizes):
            cost = cost_per_user(sizes, users)
            figures = [f"{sizes[users][name]:,.1f}" for name in COLUMNS]
            text = "start-up" if cost is None else f"{cost:.1f}"
            table.add_row(stage, f"{users:,}", f"{sizes[users]['seconds']:,.1f}", text, *figures)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["night", "driver", "tables"], default="night")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", help="all by default; each needs those before it")
    parser.add_argument("--folder", type=Path, help="keep the data below this folder")
    arguments = parser.parse_args()
    part = arguments.part
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="scale"))
    for users in arguments.sizes:
        folder = base / f"{part}-{users}"
        if not folder.exists():
            in_own_process(f"{part}.inputs", users, folder)
        for name in arguments.stages or [*STAGES_OF[part], "files"]:
            stage = f"{part}.{name}"
            figures = in_own_process(stage, users, folder)
            print(stage, users, figures, flush=True)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results.setdefault(stage, {})[str(users)] = figures
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        if arguments.folder is None:
            shutil.rmtree(folder)
    print_table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
