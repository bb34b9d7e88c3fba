"""Send the figures of a study to an experiment tracker: MLflow, Weights & Biases or trackio.

An outage costs a warning, never the study: its files are written by then.
"""

import importlib
import logging
import threading
from typing import Any

from rebeca_ray.config.evaluation import TrackingSettings
from rebeca_ray.errors import describe, redacted
from rebeca_ray.storage.objects import JsonObject

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 120.0


def track(settings: TrackingSettings, config: JsonObject, figures: dict[str, float]) -> bool:
    """Send one run with its config and its figures; return whether the tracker took it in time.

    The tracker reads its address and its key from its usual environment variables.
    """
    failure: list[str] = []

    def send() -> None:
        try:
            if settings.tracker == "mlflow":
                send_to_mlflow(settings, config, figures)
            else:
                send_as_wandb(settings, config, figures)
        except BaseException as error:  # of any kind: a tracker must not stop a study
            failure.append(describe(error))

    # A tracker that cannot be reached retries for minutes, so it gets a thread and a deadline.
    thread = threading.Thread(target=send, name="tracking", daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if thread.is_alive():
        failure.append(f"no answer within {DEADLINE_SECONDS:g} s")
    if failure:
        log.warning(redacted(f"tracking: {settings.tracker} did not take the figures ({failure[0]})"))
    return not failure


def send_to_mlflow(settings: TrackingSettings, config: JsonObject, figures: dict[str, float]) -> None:
    """Send a run to the MLflow server of MLFLOW_TRACKING_URI, in the experiment `settings.project`."""
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(settings.project)
    with mlflow.start_run(run_name=settings.run):
        mlflow.log_dict(config, "config.json")
        # MLflow's names may not hold a comma.
        mlflow.log_metrics({name.replace(",", ""): value for name, value in figures.items()})


def send_as_wandb(settings: TrackingSettings, config: JsonObject, figures: dict[str, float]) -> None:
    """Send a run to Weights & Biases, or to trackio, which has the same functions."""
    tracker: Any = importlib.import_module(settings.tracker)
    run = tracker.init(project=settings.project, name=settings.run, config=config)
    run.log(figures)
    run.finish()
