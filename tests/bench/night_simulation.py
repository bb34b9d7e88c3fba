"""A simulated night: render shards on a GPU cluster with failures, from measured and published rates.

    python -m tests.bench.night_simulation [--users 100_000_000] [--gpus 1000] [--refresh 0.05] ...

Nothing is drawn. The simulation follows every call of every render actor: the driver hands out calls, one
after the other; an actor draws one call and has the next at hand; a node of 8 GPUs is lost at random and
comes back; the driver is lost at given times and the next attempt resumes. It writes
`tests/bench/results/night_simulation.json` for the sizes of `infra/docs/scale.md`.
"""

import argparse
import heapq
import json
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.generation.render import rows_per_call

RESULTS = Path(__file__).parent / "results" / "night_simulation.json"
HOUR = 3600.0
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Night:
    """The request, the cluster, and its rates. Sources: infra/docs/scale.md."""

    users: int = 100_000_000
    images_per_user: int = 10
    refresh: float = 0.05  # share of the users with new items
    gpus: int = 1000
    images_per_second: float = 13.5  # of one GPU
    images_per_batch: int = 16
    images_per_shard: int = 2_000_000
    start_seconds: float = 60.0  # of an actor: imports, weights
    dispatch_seconds: float = 0.02  # of the driver, per call
    node_hours_between_failures: float = 6300.0  # 50,000 GPU hours, as published for a large training
    node_back_after: float = 300.0  # seconds
    driver_lost_at: tuple[float, ...] = (0.9,)  # shares of the images
    driver_back_after: float = 180.0  # seconds: another attempt, its lease, its checks
    images_per_file: int = 256
    seed: int = 0

    def images_per_call(self, images: int) -> int:
        """Return the images that an actor draws per call, as the pipeline chooses them."""
        batch = {"batch_size": self.images_per_batch, "num_actors": self.gpus, "device": "cuda"}
        return rows_per_call(DecoderSettings(model="any", dtype="float16", **batch), images)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of a simulated night of rendering."""

    images: int
    hours: float
    gpu_hours: float
    busy_share: float  # of the GPUs, with images that were kept
    redone_images: int
    nodes_lost: int
    waiting_for_driver: float  # share of the GPUs' time


class Cluster:
    """GPUs that draw calls, and a driver that hands them out."""

    def __init__(self, night: Night) -> None:
        self.night, self.random = night, np.random.default_rng(night.seed)
        self.now = self.driver_free = self.useful = self.waited = 0.0
        self.redone = self.lost = self.done = self.per_call = 0
        self.nodes = ceil(night.gpus / GPUS_PER_NODE)
        mean = HOUR * night.node_hours_between_failures
        self.failures = [(float(self.random.exponential(mean)), node) for node in range(self.nodes)]
        heapq.heapify(self.failures)
        self.kills = list(night.driver_lost_at)

    def render(self) -> Outcome:
        night, images = self.night, round(self.night.users * self.night.refresh) * self.night.images_per_user
        left = images
        while left:
            shard = min(left, night.images_per_shard)
            self.render_shard(shard, images)
            left -= shard
        gpu_seconds = night.gpus * self.now
        return Outcome(
            images=images,
            hours=round(self.now / HOUR, 3),
            gpu_hours=round(gpu_seconds / HOUR, 1),
            busy_share=round(images / night.images_per_second / gpu_seconds, 4),
            redone_images=self.redone,
            nodes_lost=self.lost,
            waiting_for_driver=round(self.waited / gpu_seconds, 4),
        )

    def render_shard(self, images: int, of_all: int) -> None:
        """Render one shard: actors start, calls are handed out, and the last call ends it."""
        night = self.night
        self.per_call = night.images_per_call(images)
        seconds_per_call = self.per_call / night.images_per_second
        calls = ceil(images / self.per_call)
        # Events: (time, GPU, number of its start); a call of an earlier start was lost with its node.
        started = self.now + night.start_seconds
        events = [(started, gpu, 0) for gpu in range(night.gpus)]
        current, at_work = [0] * night.gpus, set[int]()
        ended = self.now
        pending = calls
        while pending or at_work:
            time, gpu, start = heapq.heappop(events)
            if self.failures and self.failures[0][0] <= time:
                heapq.heappush(events, (time, gpu, start))
                pending += self.lose_node(events, current, at_work)
                continue
            if start != current[gpu]:
                continue
            if gpu in at_work:
                at_work.discard(gpu)
                self.done += self.per_call
                ended = time
                if self.kills and self.done >= self.kills[0] * of_all:
                    pending += self.lose_driver(time, events, current, at_work)
                    continue
            if not pending:
                continue
            pending -= 1
            at_work.add(gpu)
            # A call is ordered while the one before it is drawn.
            self.driver_free = max(self.driver_free, time - seconds_per_call) + night.dispatch_seconds
            begins = max(time, self.driver_free)
            self.waited += begins - time
            heapq.heappush(events, (begins + seconds_per_call, gpu, start))
        self.now = ended

    def lose_node(self, events: list[tuple[float, int, int]], current: list[int], at_work: set[int]) -> int:
        """Lose the next node that fails; return the number of its calls that must be drawn again."""
        night = self.night
        time, node = heapq.heappop(self.failures)
        back = time + night.node_back_after
        wait = float(self.random.exponential(HOUR * night.node_hours_between_failures))
        heapq.heappush(self.failures, (back + wait, node))
        self.lost += 1
        redone = 0
        for gpu in range(node * GPUS_PER_NODE, min((node + 1) * GPUS_PER_NODE, night.gpus)):
            current[gpu] += 1
            redone += gpu in at_work
            at_work.discard(gpu)
            heapq.heappush(events, (back + night.start_seconds, gpu, current[gpu]))
        self.redone += redone * self.per_call
        return redone

    def lose_driver(
        self, time: float, events: list[tuple[float, int, int]], current: list[int], at_work: set[int]
    ) -> int:
        """Lose the driver: all calls at work, and rows that wait for their file, are drawn again."""
        night = self.night
        self.kills.pop(0)
        redone = len(at_work) + night.images_per_file // self.per_call
        at_work.clear()
        events.clear()
        for gpu in range(night.gpus):
            current[gpu] += 1
            heapq.heappush(events, (time + night.driver_back_after + night.start_seconds, gpu, current[gpu]))
        self.done -= redone * self.per_call
        self.redone += redone * self.per_call
        self.driver_free = time + night.driver_back_after
        return redone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    base = Night()
    for name, value in asdict(base).items():
        if name != "driver_lost_at":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    night = replace(base, **vars(parser.parse_args()))
    large = replace(night, images_per_shard=20_000_000)
    nights: dict[str, Night] = {
        "1 M users, 10 GPUs": replace(night, users=1_000_000, gpus=10),
        "10 M users, 100 GPUs": replace(night, users=10_000_000, gpus=100),
        "100 M users, 1,000 GPUs": night,
        "the same, shards of 20 M": large,
        "the same, spot machines": replace(large, node_hours_between_failures=20.0),
        "the same, everybody anew": replace(large, refresh=1.0),
    }
    table, results = Table("night", *Outcome.__dataclass_fields__), dict[str, Any]()
    for name, variant in nights.items():
        outcome = asdict(Cluster(variant).render())
        results[name] = {"night": asdict(variant), **outcome}
        table.add_row(name, *(f"{value:,}" for value in outcome.values()))
    Console().print(table)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
