"""Figures reach a tracker: MLflow's files, Weights & Biases offline; an outage costs a warning alone."""

import logging
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rebeca_ray.config.evaluation import TrackingSettings
from rebeca_ray.studies import tracking
from rebeca_ray.studies.tracking import track

FIGURES = {"catalog/clip/vendi/mean": 3.5, "catalog/clip/permutation/by user, mean/z": 12.0}
CONFIG = {"catalog": "s3://bucket/catalog", "num_users": 100}


def test_mlflow_keeps_the_figures_and_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/runs")
    settings = TrackingSettings(tracker="mlflow", project="rebeca", run="monday")
    assert track(settings, CONFIG, FIGURES)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rebeca").experiment_id])
    assert run.info.run_name == "monday"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {name.replace(",", ""): value for name, value in FIGURES.items()}
    assert mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/config.json") == CONFIG


def test_weights_and_biases_writes_a_run_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert track(TrackingSettings(tracker="wandb", project="rebeca", run="monday"), CONFIG, FIGURES)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    texts = [text.encode() for text in ("monday", "catalog/clip/vendi/mean", "s3://bucket/catalog")]
    deadline = time.monotonic() + 60  # its process writes the file, and may lag behind
    while not all(text in record.read_bytes() for text in texts):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stand_in(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> None:
    """Put a module in the place of trackio."""
    module = types.ModuleType("trackio")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)


@pytest.mark.parametrize("failure", ["raises", "exits", "hangs", "absent"])
def test_an_outage_is_a_warning(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()

    def init(**_: Any) -> None:
        if failure == "raises":
            raise ConnectionError("the server is down: http://user:secret@host")
        if failure == "exits":
            raise SystemExit(1)
        never.wait()

    stand_in(monkeypatch, init)
    if failure == "absent":
        monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(tracking, "DEADLINE_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING, logger=tracking.log.name):
        assert not track(TrackingSettings(tracker="trackio"), CONFIG, FIGURES)
    never.set()
    (record,) = caplog.records
    assert "trackio did not take the figures" in record.message
    assert "secret" not in record.message
    assert ("no answer within 0.5 s" in record.message) == (failure == "hangs")
