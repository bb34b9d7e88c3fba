"""A step of training by its parts: one worker, two that share nothing, and two that exchange gradients.

    python tests/bench/training_step.py

Each worker is a process with one thread, and trains the stickers' network on random ratings. Two workers that
share nothing are the ceiling for two that exchange gradients through gloo. Backward includes that exchange.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

RESULT = Path(__file__).parent / "results" / "training_step.json"
CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "train_stickers.yaml"
USERS, RATINGS_PER_USER, ITEMS, D = 2000, 30, 7096, 256
STEPS_OF_SAMPLES = {1024: 24, 4096: 6}
KINDS = {"one": (1, False), "two, nothing shared": (2, False), "two, gradients exchanged": (2, True)}


def random_histories() -> pa.Table:
    """Return a table of random ratings, with the columns that training reads."""
    random, rows = np.random.default_rng(0), USERS * RATINGS_PER_USER
    starts = pa.array(np.arange(0, rows + 1, RATINGS_PER_USER), pa.int32())
    columns = {
        "item_index": (random.integers(0, ITEMS, rows), pa.int32()),
        "like": (random.integers(0, 2, rows), pa.int8()),
        "timestamp": (np.arange(rows) * 86_400_000_000, pa.int64()),
        "split": (np.zeros(rows), pa.int8()),  # TRAINING
    }
    lists = {
        name: pa.ListArray.from_arrays(starts, pa.array(values, kind))
        for name, (values, kind) in columns.items()
    }
    return pa.table({"bucket": np.zeros(USERS, np.int32), "row": np.arange(USERS, dtype=np.int32), **lists})


def train_steps(rank: int, samples: int, exchange: int) -> dict[str, float]:
    """Return samples/s and the ms per step of each part. `exchange` is the port of the workers, or 0."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from rebeca_ray.config.jobs import TrainConfig
    from rebeca_ray.config.load import load_config
    from rebeca_ray.prior.diffusion import Diffusion
    from rebeca_ray.prior.user_blocks import Batch, UserBlock
    from rebeca_ray.training import loop
    from rebeca_ray.training.state import DenoisingLoss, TrainState

    torch.set_num_threads(1)
    if exchange:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{exchange}", rank=rank, world_size=2)
    config = load_config(TrainConfig, CONFIG, [f"{key}=x" for key in ("interactions.path", "items", "out")])
    state = TrainState(config, D, USERS, torch.device("cpu"))
    block = UserBlock(random_histories(), np.array([0]))
    x0_ID = np.random.default_rng(1).standard_normal((ITEMS, D)).astype(np.float32) * 0.2
    loss: torch.nn.Module = DenoisingLoss(state.prior, Diffusion.build(config.diffusion), config)
    loss = DistributedDataParallel(loss) if exchange else loss
    seconds: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[part] += time.perf_counter() - started

        return call

    def batches(steps: int) -> Iterator[Batch]:
        made = block.batches(
            samples_per_user=config.optimization.samples_per_user * 2,
            with_replacement=True,
            like_share=config.optimization.like_share,
            batch_size=samples,
            targets=loop.targets_per_draw(config),
            max_history=config.network.max_history,
            seed=(0,),
        )
        take = timed("batches", lambda: next(made))
        for _ in range(steps):
            batch = take()
            seconds["samples"] += len(batch.item_index_B)
            yield batch

    loss.forward = timed("forward", loss.forward)  # type: ignore[method-assign]
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    state.optimizer.step = timed("optimizer", state.optimizer.step)  # type: ignore[method-assign]
    state.update_average = timed("average", state.update_average)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(rank)
    loop.train_epoch(loss, state, batches(1), x0_ID, generator, config)
    if exchange:
        dist.barrier()
    seconds.clear()
    steps, started = STEPS_OF_SAMPLES[samples], time.perf_counter()
    loop.train_epoch(loss, state, batches(steps), x0_ID, generator, config)
    seconds["step"] = time.perf_counter() - started
    rate = seconds.pop("samples") / seconds["step"]
    gradients = torch.zeros(sum(parameter.numel() for parameter in state.prior.parameters()))
    figures = {part: 1000 * value / steps for part, value in seconds.items()}
    if exchange:
        started = time.perf_counter()
        for _ in range(20):
            dist.all_reduce(gradients)
        figures["exchange alone"] = 1000 * (time.perf_counter() - started) / 20
    return {"samples_per_second": rate, "gradients_mib": gradients.nbytes / 2**20, **figures}


def measure(count: int, exchange: bool, samples: int) -> dict[str, float]:
    """Return the samples/s of `count` workers together, and their mean ms per step by part."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1] if exchange else 0
    command = [sys.executable, __file__, "--samples", str(samples), "--exchange", str(port), "--rank"]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(count)
    ]
    outputs = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    figures = {name: statistics.mean(output[name] for output in outputs) for name in outputs[0]}
    return {**figures, "samples_per_second": sum(output["samples_per_second"] for output in outputs)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, nargs="*", default=list(STEPS_OF_SAMPLES))
    parser.add_argument("--rounds", type=int, default=5, help="in turn; the figures are their medians")
    parser.add_argument("--rank", type=int, help="be this worker, in this process")
    parser.add_argument("--exchange", type=int, default=0, help="port of the exchange; 0: none")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(train_steps(arguments.rank, arguments.samples[0], arguments.exchange)))
        return
    result = {}
    for samples in arguments.samples:
        rounds = [
            {name: measure(*kind, samples) for name, kind in KINDS.items()} for _ in range(arguments.rounds)
        ]
        figures = {
            name: {
                part: statistics.median(figures[name][part] for figures in rounds) for part in rounds[0][name]
            }
            for name in KINDS
        }
        result[samples] = figures
        table = Table(f"{samples:,} samples per worker", *figures)
        for part in figures["two, gradients exchanged"]:
            table.add_row(part, *(f"{kind.get(part, 0):.1f}" for kind in figures.values()))
        Console().print(table)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
