"""Plan: planning on Ray with one actor, and a bare loop that only samples the same candidates.

    python -m tests.bench.waste.plan pass|loop DATA IMAGES_PER_USER

DATA is the folder of an earlier `rebeca demo`. Both have one thread on one core.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.data.histories import Histories
from rebeca_ray.generation import pipeline
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.planning import planner
from rebeca_ray.generation.planning.keys import plan_keys, users_per_batch
from rebeca_ray.generation.progress import Progress
from rebeca_ray.prior.candidates import sample_candidates
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import read_table
from tests.bench.waste.machine import leave_the_work_core, processor_time, report, take_the_work_core
from tests.bench.waste.render import TIMES


class Planned(BaseException):
    """Ends a run that has its plan."""


class TimedPlan(planner.PlanUsers):
    """A planning actor on one core that notes each of its calls, with its items."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.set_num_threads(1)
        take_the_work_core()

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.time()
        planned = super().__call__(batch)
        with Path(os.environ[TIMES]).open("a") as lines:
            lines.write(f"{started} {time.time()} {planned.num_rows}\n")
        return planned


def sample_only(context: RunContext, histories: Histories | None, decisions: Decisions, _: Progress) -> None:
    """Sample the candidates of all users, batch by batch, and do nothing with them."""
    work: Any = planner.PlanUsers(context.config, context.versions, histories, None, decisions)
    torch.set_num_threads(1)
    take_the_work_core()
    users = pa.concat_tables(
        [read_table(join(context.run.work, file.path), "users") for file in decisions.to_plan]
    )
    size, per_item = users_per_batch(context.config), context.config.selection.candidates_per_item
    batches = []
    for start in range(0, users.num_rows, size):
        batch = users.slice(start, size).combine_chunks()
        keys = plan_keys(batch, context.versions["prior"], work.settings, work.sampler.variant)
        count_G = batch["num_images"].to_numpy().astype(np.int64)
        batches.append((work.users.load(batch), keys, count_G))
    ended, items = [], []
    for vectors, keys, count_G in batches:
        with torch.inference_mode():
            sample_candidates(work.prior, work.diffusion, work.sampler, vectors, keys, per_item * count_G)
        ended.append(time.time())
        items.append(int(count_G.sum()))
    report({"items_per_second": sum(items[1:]) / (ended[-1] - ended[0])})
    raise Planned


def main(arm: str, data: str, images_per_user: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"catalog={folder}/catalog", f"num_images={images_per_user}", "sampler.num_actors=1"]
        config = load_config(GenerateConfig, Path(data) / "generate.yaml", changes)
        os.environ[TIMES] = f"{folder}/times"
        if arm == "loop":
            pipeline.plan_items = sample_only
            run(config, in_process=True)
            return
        leave_the_work_core()
        planner.PlanUsers = TimedPlan  # type: ignore[misc]

        def stop(*_: object) -> None:
            raise Planned

        pipeline.check_plan = stop  # type: ignore[assignment]
        with processor_time() as measured:
            started = time.time()
            run(config, in_process=False)
            ended = time.time()
        calls = np.loadtxt(os.environ[TIMES])
    calls = calls[np.argsort(calls[:, 0])]
    busy, start, count = (calls[:, 1] - calls[:, 0]).sum(), calls[0, 0], calls[:, 2].sum()
    processor = {
        kind: round(1000 * seconds / count, 2) for kind, seconds in measured.between(start, ended).items()
    }
    report(
        {
            "items_per_second": calls[1:, 2].sum() / (ended - calls[0, 1]),
            "busy_share": float(busy / (calls[-1, 1] - start)),
            "seconds_to_first_call": round(start - started, 2),
            "seconds_after_last_call": round(ended - calls[-1, 1], 2),
            "cpu_seconds_per_1000_images": processor,
        }
    )


def run(config: GenerateConfig, *, in_process: bool) -> None:
    try:
        pipeline.generate_catalog(config, in_process=in_process)
    except Planned:
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
