"""Training at scale: step time and memory by number of users and ratings, and two workers against one.

    python tests/bench/training_scale.py steps      an `id` table of 10,000 and 1,000,000 users: ms per step
    python tests/bench/training_scale.py memory     grouping 1 and 20 million interactions: peak MiB in use
    python tests/bench/training_scale.py workers    two workers with one thread each against one: samples/s
    python tests/bench/training_scale.py processes  two trainings that share nothing against one: samples/s

Every measurement runs in its own process, in turn. The table gives medians of the rounds. Two workers cannot
gain more than two trainings that share nothing.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
D, BATCH, STEPS = 256, 256, 60
ITEMS, RATINGS_PER_USER, ROWS_PER_CHUNK = 7096, 20, 1_000_000
SAMPLES_PER_WORKER = 1024  # with 256, half of a step is overhead


def used_memory() -> int:
    """Return the bytes in use by this process and all below it, Ray's included.

    Shared memory, and so the object store, counts once. Files that the kernel caches do not count.
    """
    total, this = 0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(OSError):  # it has ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = dict(line.split(":") for line in lines)
            total += sum(1024 * int(sizes[kind].split()[0]) for kind in ("Pss_Anon", "Pss_Shmem"))
    return total


def time_steps(num_users: int) -> dict[str, float]:
    """Run optimizer steps of two layers of the default network on random samples of `num_users` users."""
    import torch

    from rebeca_ray.config.jobs import TrainConfig
    from rebeca_ray.prior.diffusion import Diffusion
    from rebeca_ray.prior.user_blocks import Batch, Rated
    from rebeca_ray.training.loop import train_epoch
    from rebeca_ray.training.state import DenoisingLoss, TrainState

    torch.set_num_threads(1)
    settings = {
        "network": {"num_layers": 2, "user_encoder": "id"},
        "interactions": {"path": "i"},
        "items": "i",
        "out": "o",
    }
    config = TrainConfig.model_validate(settings)
    device = torch.device("cpu")
    state = TrainState(config, D, num_users, device)
    loss = DenoisingLoss(state.prior, Diffusion.build(config.diffusion), config)
    random = np.random.default_rng(0)
    x0_ID = random.standard_normal((ITEMS, D)).astype(np.float32) * 0.2
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(STEPS):
        batch = Batch(
            user_index_G=random.integers(0, num_users, BATCH),
            item_index_B=random.integers(0, ITEMS, BATCH),
            like_B=random.integers(0, 2, BATCH).astype(np.int8),
            row_B=np.arange(BATCH),
            history=Rated.nothing(BATCH, 1),
        )
        started = time.perf_counter()
        train_epoch(loss, state, iter([batch]), x0_ID, generator, config)
        seconds.append(time.perf_counter() - started)
    assert state.table is not None
    table = state.table.rows_VUH.nbytes / 2**20
    return {
        "ms_per_step": 1000 * statistics.median(seconds[10:]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "table_mib": table,
    }


def write_ratings(folder: Path, rows: int) -> None:
    """Write `rows` ratings by rows / 20 users, in random order, a million per file."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, rows, ROWS_PER_CHUNK):
        path = folder / f"part-{start // ROWS_PER_CHUNK:05d}.parquet"
        if path.exists():
            continue
        number = np.random.default_rng(1).permutation(ROWS_PER_CHUNK) + start
        user, position = number // RATINGS_PER_USER, number % RATINGS_PER_USER
        table = pa.table(
            {
                "user_id": pa.array([f"user-{value:08d}" for value in user]),
                "item_id": pa.array([f"item-{value:05d}" for value in (user * 31 + position * 353) % ITEMS]),
                "rating": pa.array((1 + number % 5).astype(np.float32)),
                "timestamp": pa.array(number * 1_000_000, pa.timestamp("us")),
            }
        )
        pq.write_table(table, path)


def measure_memory(rows: int, data: Path) -> dict[str, float]:
    """Group `rows` interactions by user. Return the rise of this process tree's memory, at its peak."""
    from rebeca_ray.config.sections import InteractionSettings
    from rebeca_ray.data.histories import build_histories

    write_ratings(data / f"ratings-{rows}", rows)
    subprocess.run(["rm", "-rf", str(data / f"histories-{rows}")], check=True)
    peak = [0.0]
    done = threading.Event()

    def watch() -> None:
        before = used_memory()
        while not done.wait(0.25):
            peak[0] = max(peak[0], (used_memory() - before) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    item_id = np.array([f"item-{number:05d}" for number in range(ITEMS)])
    histories = build_histories(
        InteractionSettings(path=str(data / f"ratings-{rows}")), item_id, str(data / f"histories-{rows}")
    )
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "peak_mib": peak[0],
        "seconds": seconds,
        "users": histories.num_users,
        "buckets": len(histories.users_of_bucket),
    }


def measure_workers(num_workers: int, data: Path) -> dict[str, float]:
    """Return samples per second of some epochs on the stickers, one thread and 1,024 samples per worker."""
    from rebeca_ray.config.jobs import EmbedConfig, TrainConfig
    from rebeca_ray.config.load import load_config
    from rebeca_ray.data.embedding import embed_items
    from rebeca_ray.stickers.simulate import simulate
    from rebeca_ray.training.train import train_prior

    configs = Path(__file__).parents[2] / "jobs" / "configs"
    if not (data / "items" / "items.json").exists():
        embed_items(load_config(EmbedConfig, configs / "embed_stickers.yaml", [f"out={data}/items"]))
    simulate(2000, 0, data)
    overrides = [
        f"interactions.path={data}/interactions.parquet",
        f"items={data}/items",
        f"out={data}/prior",
        f"storage={data}/train",
    ]
    overrides += [
        f"run_name=workers-{num_workers}-{os.getpid()}",
        "optimization.max_epochs=3",
        f"workers.num_workers={num_workers}",
    ]
    overrides += ["workers.cpus_per_worker=1", "workers.threads_per_worker=1"]
    overrides += [f"optimization.batch_size={SAMPLES_PER_WORKER * num_workers}"]
    metrics = train_prior(load_config(TrainConfig, configs / "train_stickers.yaml", overrides))
    return {"samples_per_second": metrics["samples_per_second"]}


def measure_processes(count: int) -> dict[str, float]:
    """Return samples per second of `count` trainings at once, with one thread each and nothing in common."""
    command = [sys.executable, __file__, "steps", "--one", "10000"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    outputs = [process.communicate()[0].splitlines()[-1] for process in processes]
    return {"samples_per_second": sum(1000 * BATCH / json.loads(line)["ms_per_step"] for line in outputs)}


def in_turn(name: str, sizes: list[int], rounds: int, data: Path) -> dict[int, dict[str, float]]:
    """Measure each size in its own process, round after round. Return the medians."""
    rounds_of: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            command = [sys.executable, __file__, name, "--one", str(size), "--data", str(data)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rounds_of[size].append(json.loads(out.splitlines()[-1]))
    return {
        size: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for size, rows in rounds_of.items()
    }


SIZES = {
    "steps": [10_000, 1_000_000],
    "memory": [1_000_000, 20_000_000],
    "workers": [1, 2],
    "processes": [1, 2],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "parts",
        nargs="*",
        default=list(SIZES),
        help="steps, memory, workers, processes; default: all of them",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("runs/training_scale"))
    parser.add_argument("--one", type=int, help="measure this size alone, in this process")
    arguments = parser.parse_args()
    data = arguments.data.absolute()
    if arguments.one is not None:
        measured: dict[str, Any] = {
            "steps": lambda: time_steps(arguments.one),
            "memory": lambda: measure_memory(arguments.one, data),
            "workers": lambda: measure_workers(arguments.one, data),
            "processes": lambda: measure_processes(arguments.one),
        }[arguments.parts[0]]()
        print(json.dumps(measured))
        return
    for part in arguments.parts:
        first, last = SIZES[part]
        figures = in_turn(part, [first, last], arguments.rounds, data)
        table = Table(part, f"{first:,}", f"{last:,}", "ratio")
        for key in figures[first]:
            table.add_row(
                key,
                f"{figures[first][key]:.1f}",
                f"{figures[last][key]:.1f}",
                f"{figures[last][key] / figures[first][key]:.2f}",
            )
        Console().print(table)
        (RESULTS / f"training_scale-{part}.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
