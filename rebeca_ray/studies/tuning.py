"""Choose a training's settings on a grid: Ray Tune runs the trials, ASHA stops the worse ones early.

grid ─► trials ─► validation loss per epoch ─► trials.parquet, trials.png

A start after an interruption goes on: Ray Tune knows the finished trials, and a training resumes from its
last epoch. Losses compare settings of one objective and one noise schedule alone.
"""

import hashlib
import itertools
import logging
import math
import sys
from dataclasses import dataclass

import pyarrow as pa
from pydantic import ValidationError
from ray import tune
from ray.train import Result
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.config.tuning import Point, TuneConfig
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError, QualityGateError, describe
from rebeca_ray.identity import hash128
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.store import open_store
from rebeca_ray.storage.writable import require_writable
from rebeca_ray.studies.plots import plot_trials
from rebeca_ray.training.fitting import check_network
from rebeca_ray.training.train import run_training
from rebeca_ray.watchdog import Activity

log = logging.getLogger(__name__)

TRIALS = "trials"
VAL_LOSS = "val_loss"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A point of the grid, with its validation loss after each epoch."""

    point: Point
    losses: list[float]

    @property
    def best_loss(self) -> float:
        return min(self.losses, default=math.inf)


def tune_training(config: TuneConfig) -> pa.Table:
    """Train at every point of the grid; return and write a row per trial, the best validation loss first.

    Raises InputError for an empty grid and for a point that no training takes, and QualityGateError if every
    trial failed.
    """
    require_writable(config.out, "out")
    items = read_image_embeds(config.train.items)
    check_grid(config, items.image_embeds.shape[1])
    start_ray()
    train = in_trials(config, config.train)
    if train.catalog is not None:
        items = with_rated(items, train.catalog, train.interactions)
    # Once, for all trials. Other ratings or items are another experiment.
    histories = build_histories(train.interactions, items.item_id, train.storage, catalog=train.catalog)
    embeds = hashlib.sha256(items.image_embeds.tobytes()).hexdigest()
    name = hash128(config.identity_json(), embeds, *items.item_id, histories.digest)[:12]
    grid = tuner_of(config, name).fit()
    results = [grid[number] for number in range(len(grid))]
    for result in results:
        if result.error is not None:
            log.error(f"trial {result.config}: {describe(result.error)}")
    trials = sorted((trial_of(result) for result in results), key=lambda trial: trial.best_loss)
    if not any(trial.losses for trial in trials):
        raise QualityGateError(
            f"tune {config.out}: all {len(results)} trials failed; the log has the reasons"
        )
    points = [{**trial.point, VAL_LOSS: trial.best_loss, "epochs": len(trial.losses)} for trial in trials]
    table = pa.Table.from_pylist(points)
    write_table(table, join(config.out, "trials.parquet"), row_group_size=10_000)
    curves = {name_of(trial.point): trial.losses for trial in trials if trial.losses}
    plot_trials(curves, join(config.out, "trials.png"))
    return table


def check_grid(config: TuneConfig, embed_dim: int) -> None:
    """Raise InputError unless every point of the grid is a training."""
    points = config.points()
    if not points:
        raise InputError("tune: the grid is empty; give at least one list, such as num_layers=[2,4]")
    for values in itertools.product(*points.values()):
        point = dict(zip(points, values, strict=True))
        try:
            check_network(config.at(point), embed_dim)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise InputError(f"tune: {name_of(point)}: {problem}; change the grid") from None


def in_trials(config: TuneConfig, train: TrainConfig) -> TrainConfig:
    """Return a training that keeps its checkpoints and histories below the trials' folder."""
    return train.model_copy(update={"storage": join(config.out, "training")})


def tuner_of(config: TuneConfig, name: str) -> tune.Tuner:
    """Return a tuner over the grid, or the one of an interrupted start of the same `name`."""

    def run_trial(point: Point) -> None:
        train = in_trials(config, config.at(point))
        run_training(train, read_image_embeds(train.items), Activity(), callbacks=[TuneReportCallback()])

    store = open_store(join(config.out, TRIALS))
    trainable = tune.with_resources(run_trial, {"cpu": 0.01})  # the workers have the CPUs
    path, filesystem = f"{store.path}/{name}", store.scan_filesystem()
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        return tune.Tuner.restore(
            path, trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=filesystem
        )
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=config.train.optimization.max_epochs,
        grace_period=min(config.grace_epochs, config.train.optimization.max_epochs),
        reduction_factor=config.reduction,
    )
    return tune.Tuner(
        trainable,
        param_space={field: tune.grid_search(list(values)) for field, values in config.points().items()},
        tune_config=tune.TuneConfig(
            metric=VAL_LOSS, mode="min", scheduler=scheduler, max_concurrent_trials=config.max_concurrent
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=store.path, storage_filesystem=filesystem, verbose=0
        ),
    )


def trial_of(result: Result) -> Trial:
    """Return a trial; one that failed or diverged has no losses."""
    assert result.config is not None
    metrics = None if result.error is not None else result.metrics_dataframe
    losses = [] if metrics is None else metrics[VAL_LOSS].tolist()
    if losses and losses[-1] == sys.float_info.max:
        log.error(f"trial {name_of(result.config)}: training diverged after epoch {len(losses)}")
        losses = []
    return Trial(point=result.config, losses=losses)


def name_of(point: Point) -> str:
    """Return a point of the grid in words."""
    return ", ".join(f"{name} {value:g}" for name, value in point.items())
