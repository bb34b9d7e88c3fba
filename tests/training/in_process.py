"""Ray Train's loop in this process, for the tests that are about its result and not about Ray."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import Checkpoint, Result
from ray.train.torch import TorchTrainer

from rebeca_ray.training import loop
from rebeca_ray.watchdog import Activity


@pytest.fixture
def loop_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: str) -> None:
    """Let this process be the only worker of each training. A rerun gets the last checkpoint, as in Ray."""
    monkeypatch.setattr(Activity, "listen", lambda _: SimpleNamespace(beat=lambda rows=0: None))
    reports: dict[str, list[tuple[Checkpoint, dict[str, Any]]]] = {}

    def fit(trainer: TorchTrainer) -> Result:
        name = trainer.run_config.name
        kept = reports.setdefault(name, [])

        def report(metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            json.dumps(metrics, allow_nan=False)  # Ray Train's record of its checkpoints keeps no infinity
            folder = shutil.copytree(checkpoint.path, tmp_path / "checkpoints" / name / str(len(kept)))
            kept.append((Checkpoint.from_directory(folder), metrics))

        worker = SimpleNamespace(
            get_context=lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1),
            get_checkpoint=lambda: kept[-1][0] if kept else None,
            torch=SimpleNamespace(get_device=lambda: torch.device("cpu")),
            report=report,
        )
        with monkeypatch.context() as context:
            context.setattr(loop, "train", worker)
            context.setattr(loop, "use", lambda _: None)  # a worker sets up its log, this process has one
            loop.train_loop_per_worker(trainer.train_loop_config)
        last, metrics = kept[-1]
        return Result(metrics=metrics, checkpoint=last, error=None, path=str(tmp_path), best_checkpoints=kept)

    monkeypatch.setattr(TorchTrainer, "fit", fit)
