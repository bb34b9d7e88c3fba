"""Train the prior with Ray Train: from interactions and embedded items to a prior directory."""

import csv
import datetime
import hashlib
import io
import logging
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from rebeca_ray import identity
from rebeca_ray.catalog.versions import replace_version, versions_in
from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.config.sections import PriorSampling
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.histories import Histories, build_histories, user_table
from rebeca_ray.data.items import EmbeddedItems, read_image_embeds
from rebeca_ray.errors import InputError, UserError
from rebeca_ray.log import current_settings, set_run_id
from rebeca_ray.prior.checkpoint import MARKERS, TrainedPrior, publish_prior
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.user_blocks import Batch
from rebeca_ray.ray_runtime import require_room, start_ray
from rebeca_ray.storage.filesystem import arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.objects import JsonObject, read_json
from rebeca_ray.storage.store import open_store
from rebeca_ray.storage.writable import require_own, require_writable
from rebeca_ray.telemetry import metrics
from rebeca_ray.telemetry.attempt import training_attempt
from rebeca_ray.telemetry.reporting import reported
from rebeca_ray.training.calibrate import calibrate_prior, training_blocks
from rebeca_ray.training.fitting import check_network
from rebeca_ray.training.loop import ENDED, STATE, is_streamed, num_steps, train_loop_per_worker
from rebeca_ray.watchdog import Activity, Pulse, watchdog

log = logging.getLogger(__name__)

VALIDATION_SAMPLES = 8192
SECONDS_TO_ABORT = 20


@metrics.running(metrics.Command.TRAIN)
def train_prior(config: TrainConfig, *, run_date: datetime.date | None = None) -> dict[str, float]:
    """Train a prior by `config` and publish it in `config.out`; return the metrics of the best epoch.

    The pointer records `run_date`, by default today in UTC. Raises LeaseHeldError if another process writes
    `config.out`. Any error leaves the published prior as it was.
    """
    with reported(training_attempt(config, run_date)):
        return train(config, run_date)


def train(config: TrainConfig, run_date: datetime.date | None) -> dict[str, float]:
    """Train and publish a prior, as `train_prior` says, without a report."""
    items = read_image_embeds(config.items)
    check_network(config, items.image_embeds.shape[1])
    if not versions_in(config.out):  # a lost pointer does not make them somebody else's
        require_own(config.out, "out", MARKERS)
    require_writable(config.out, "out")
    require_writable(config.storage, "storage")
    activity = Activity(partial(metrics.note_progress, metrics.Command.TRAIN))
    with (
        replace_version(config.out, "prior", "train") as version,
        watchdog(activity, config.stall_minutes, on_stall=version.lease.release),
    ):
        prior = calibrated_prior(config, items, activity)
        publish_prior(prior, version, run_date)
    return prior.metrics


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that ended: its inputs, the scaled embeddings of all items [I, D], and its result."""

    config: TrainConfig
    scaler: EmbedScaler
    items: EmbeddedItems
    histories: Histories
    x0_ID: np.ndarray
    result: Result


def run_training(
    config: TrainConfig, items: EmbeddedItems, activity: Activity, callbacks: Sequence[UserCallback] = ()
) -> Training:
    """Train by `config`. Progress is noted in `activity`, and reported to Ray Train's `callbacks`.

    Interactions stream to the workers through Ray Data, one row per user. Item embeddings are in Ray's object
    store, once per node. A killed run resumes from its last epoch if it is started again with the same
    storage and run name. A run that has ended is read again, without Ray.
    """
    scaler = EmbedScaler.fit(torch.from_numpy(items.image_embeds), config.scaling)
    activity.enter("histories")
    if config.catalog is not None:
        items = with_rated(items, config.catalog, config.interactions)
    histories = build_histories(
        config.interactions, items.item_id, config.storage, activity=activity, catalog=config.catalog
    )
    config = config.model_copy(update={"run_name": run_name(config, histories, items)})
    x0_ID = scaler.scale(torch.from_numpy(items.image_embeds)).numpy()
    result = earlier_run(config)
    last = (result and result.metrics) or {}
    if result and last.get(ENDED):
        log.info(
            f"training run {config.run_name} in {config.storage} has ended: its best epoch is read again"
        )
    else:
        result = start_run(config, histories, x0_ID, activity, callbacks, epochs_done=last.get("epoch", 0))
    return Training(
        config=config, scaler=scaler, items=items, histories=histories, x0_ID=x0_ID, result=result
    )


def earlier_run(config: TrainConfig) -> Result | None:
    """Return the result of an earlier attempt, with the figures of its last epoch, else None."""
    run = join(config.storage, config.run_name)
    record = join(run, "checkpoint_manager_snapshot.json")
    drop_torn_record(record)
    if read_json(record) is None:
        return None
    store = open_store(run)
    return Result.from_path(store.path, store.scan_filesystem())


def start_run(
    config: TrainConfig,
    histories: Histories,
    x0_ID: np.ndarray,
    activity: Activity,
    callbacks: Sequence[UserCallback],
    *,
    epochs_done: int,
) -> Result:
    """Start the workers of a run, or resume it after its last checkpoint; return its result.

    The progress is that of the epochs to come.
    """
    start_ray()
    workers = config.workers
    require_room(
        "workers",
        workers=workers.num_workers,
        cpus=workers.cpus_per_worker,
        device=workers.device,
        spare_cpus=int(is_streamed(histories)),
    )
    fewest = config.interactions.min_likes
    log.info(
        f"training on {histories.num_users:,} users "
        f"(any with fewer than interactions.min_likes = {fewest} likes is left out)"
    )
    set_run_id(config.run_name)
    activity.enter("training")
    most = max(0, config.optimization.max_epochs - epochs_done)
    total = most * num_steps(histories, config) * workers.num_workers
    pulse = activity.listen()
    with activity.counting(f"train (at most {most} epochs)", total):
        result = build_trainer(config, histories, x0_ID, pulse, callbacks).fit()
    set_run_id(None)
    return result


def calibrated_prior(config: TrainConfig, items: EmbeddedItems, activity: Activity) -> TrainedPrior:
    """Return the prior of the best epoch, calibrated. Progress is noted in `activity`.

    Raises InputError if the loss diverges; the best epoch's checkpoint stays in the storage.
    """
    training = run_training(config, items, activity)
    activity.enter("calibration")
    state, last = read_best(training.result)
    prior = trained_prior(training, state=state, last=last)
    return calibrate_prior(prior, training.histories, training.x0_ID, seed=config.optimization.seed)


class InterruptibleTrainer(TorchTrainer):  # type: ignore[misc]  # not followed by the checker
    """A trainer that an interrupt leaves as an exception.

    Ray Train's own handler of SIGINT ends the process from inside `ray.get`, with code 1: no lease is freed.
    """

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def fit(self) -> Result:
        """Train. After an interrupt, the workers end first."""
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self.controller is not None:
                with suppress(Exception):  # the controller ends, so its answer is an error
                    ray.get(self.controller.abort.remote(), timeout=SECONDS_TO_ABORT)
            raise


def build_trainer(
    config: TrainConfig,
    histories: Histories,
    x0_ID: np.ndarray,
    pulse: Pulse,
    callbacks: Sequence[UserCallback],
) -> TorchTrainer:
    """Return the trainer of a run: its workers, its data, its checkpoints and what it does after failures.

    `x0_ID` are the scaled embeddings of all items. The workers beat `pulse` at every step.
    """
    workers = config.workers
    on_gpu = workers.device == "cuda"
    storage = open_store(config.storage)
    return InterruptibleTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.model_dump(),
            "x0_ID": ray.put(x0_ID),
            "histories": histories,
            "validation": ray.put(validation_batch(histories, config)),
            "log": current_settings(),
            "pulse": pulse,
        },
        datasets={"users": stream_of(histories, config)} if is_streamed(histories) else {},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": 1} if on_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=storage.path,
            storage_filesystem=storage.scan_filesystem(),  # Ray would decode the path as a URI
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"
            ),
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
    )


def read_best(result: Result) -> tuple[JsonObject, JsonObject]:
    """Return the states of the best epoch and of the last one. Raises InputError if the loss diverged."""
    best = result.get_best_checkpoint("val_loss", "min")
    with best.as_directory() as folder, result.checkpoint.as_directory() as last_folder:
        state = torch.load(Path(folder) / STATE, weights_only=True)
        last = torch.load(Path(last_folder) / STATE, weights_only=True)
    if last["diverged"]:
        best_loss = f"validation loss {state['best_loss']:.4f}"
        kept = f"The best epoch ({state['epoch']}, {best_loss}) is kept in {best.path}"
        if state["diverged"]:
            kept = "No epoch before it ended well, so nothing is kept"
        raise InputError(
            f"training diverged: {last['diverged']}; "
            f"lower optimization.learning_rate or user_learning_rate. {kept}"
        )
    return state, last


def trained_prior(training: Training, *, state: JsonObject, last: JsonObject) -> TrainedPrior:
    """Return the prior of the best epoch's averaged weights, not yet calibrated.

    `state` is the best epoch's, `last` is that of the last epoch, which holds the whole loss curve.
    """
    config, items = training.config, training.items
    key = identity.read_user_key(config.user_key)
    network = Prior(config.network, items.image_embeds.shape[1])
    network.load_state_dict(state["average"])
    return TrainedPrior(
        network=network.eval(),
        settings=config.network,
        diffusion=config.diffusion,
        scaler=training.scaler,
        sampling=PriorSampling(prior_guidance_scale=1.0),
        condition_dropout=config.optimization.condition_dropout,
        clip=items.clip,
        user_key=key.fingerprint if key else None,
        user_rows=state["table"]["rows"] if state["table"] else None,
        users=user_table(training.histories) if state["table"] else None,
        metrics={
            "val_loss": state["best_loss"],
            "best_epoch": float(state["epoch"]),
            "epochs": float(last["epoch"]),
            "samples_per_second": statistics.median(row[-1] for row in last["curve"]),
        },
        curve=curve_csv(last["curve"]),
    )


def drop_torn_record(uri: str) -> None:
    """Remove Ray Train's record of its checkpoints if a kill left it half-written.

    Ray Train would refuse to start with it. The run then starts over; the checkpoints themselves stay.
    """
    try:
        read_json(uri)
    except UserError:
        log.warning(f"{uri} is half-written, as a kill may leave it; training starts over")
        delete(uri)


def stream_of(histories: Histories, config: TrainConfig) -> ray.data.Dataset:
    """Return the users of all buckets, with their files in another order each epoch."""
    filesystem, _ = open_filesystem(histories.uri)
    files = [
        open_filesystem(histories.file(bucket))[1]
        for bucket, users in enumerate(histories.users_of_bucket)
        if users
    ]
    shuffle = ray.data.FileShuffleConfig(seed=config.optimization.seed)
    users = ray.data.read_parquet(
        files, filesystem=arrow_filesystem(filesystem), shuffle=shuffle, partitioning=None
    )
    users.context.enable_progress_bars = False
    return users


def run_name(config: TrainConfig, histories: Histories, items: EmbeddedItems) -> str:
    """Return a name that follows from settings, ratings and embeddings, so that a rerun resumes."""
    settings = config.identity_json()
    embeds = hashlib.sha256(items.image_embeds.tobytes()).hexdigest()
    return f"{config.run_name}-{identity.hash128(settings, embeds, *items.item_id, histories.digest)[:12]}"


def validation_batch(histories: Histories, config: TrainConfig) -> Batch:
    """Return held-out interactions of the first bucket's users, a random sample by hash.

    Without a hold-out, training interactions stand in.
    """
    block = next(training_blocks(histories))
    max_history = config.network.max_history
    like_share = config.optimization.like_share
    if batch := block.held_out(max_history, VALIDATION_SAMPLES, likes_only=like_share == 1):
        return batch
    log.warning(
        "nothing is held out (too few ratings per user for interactions.hold_out?): "
        "validation uses training interactions"
    )
    draws = block.batches(
        samples_per_user=4,
        with_replacement=True,
        like_share=like_share,
        batch_size=VALIDATION_SAMPLES,
        targets=1,
        max_history=max_history,
        seed=(0,),
    )
    return next(draws)


def curve_csv(curve: list[list[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["epoch", "train_loss", "val_loss", "learning_rate", "samples_per_second"], *curve])
    return text.getvalue()
