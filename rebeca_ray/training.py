"""Training the prior with Ray Train: the loop every worker runs, what it keeps to go on after a kill, early stopping."""

import csv
import hashlib
import io
import logging
import math
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from rebeca_ray import identity
from rebeca_ray.checkpoint import build_network, save_prior
from rebeca_ray.cluster import require_room, start_ray
from rebeca_ray.config import TrainConfig
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.embeds import EmbedScaler
from rebeca_ray.errors import UserError
from rebeca_ray.interactions import read_interactions, user_table
from rebeca_ray.items import EmbeddedItems, read_image_embeds
from rebeca_ray.prior import Prior
from rebeca_ray.storage import require_own, require_writable
from rebeca_ray.training_set import BalancedUserSampler, TrainingSet, build_training_set

STATE = "state.pt"


def train_prior(config: TrainConfig) -> dict[str, float]:
    """Fit a prior as `config` says and write its directory; returns the metrics of the best epoch.

    A run that was killed goes on from its last epoch when started again with the same storage and run name.
    """
    interactions = read_interactions(config.interactions)
    items = read_image_embeds(config.items)
    image_embeds = torch.from_numpy(items.image_embeds)
    scaler = EmbedScaler.fit(image_embeds)
    data = build_training_set(interactions, items.item_id, scaler.scale(image_embeds).numpy(), config.items)
    require_own(config.out, "out", "config.json", "format")
    require_writable(config.out, "out")
    require_writable(config.storage, "storage")
    start_ray()
    workers = config.workers
    require_room("workers", workers=workers.num_workers, cpus=workers.cpus_per_worker, device=workers.device)

    users = user_table(interactions)
    config = config.model_copy(update={"run_name": run_name(config, users, items)})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config.model_dump(), "data": ray.put(data), "live": sys.stderr.isatty()},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.device == "cuda",
            resources_per_worker={"CPU": workers.cpus_per_worker, **({"GPU": 1} if workers.device == "cuda" else {})},
        ),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=config.storage,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.device == "cuda" else "gloo"),
    )
    result = trainer.fit()
    best = result.get_best_checkpoint("val_loss", "min")
    with best.as_directory() as folder, result.checkpoint.as_directory() as last_folder:
        state = torch.load(Path(folder) / STATE, weights_only=True)
        last = torch.load(Path(last_folder) / STATE, weights_only=True)
    metrics = {"val_loss": state["best_loss"], "best_epoch": float(state["epoch"]), "epochs": float(last["epoch"])}
    save_prior(
        config.out,
        weights=state["average"],
        network=config.network,
        diffusion=config.diffusion,
        condition_dropout=min(config.optimization.user_dropout, config.optimization.rating_dropout),
        scaler=scaler,
        users=users,
        clip=items.clip,
        curve=curve_csv(last["curve"]),
        metrics=metrics,
    )
    return metrics


def run_name(config: TrainConfig, users: pa.Table, items: EmbeddedItems) -> str:
    """The same for the same settings, ratings and embeddings, so that a rerun resumes; another for anything new."""
    told = config.model_dump_json(exclude={"interactions": {"path"}, "items": True, "out": True, "storage": True, "workers": True})
    embeds = hashlib.sha256(items.image_embeds.tobytes()).hexdigest()
    histories = [*users["user_id"].to_pylist(), *users["history_digest"].to_pylist()]
    return f"{config.run_name}-{identity.hash128(told, embeds, *items.item_id, *histories)[:12]}"


def curve_csv(curve: list[list[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["epoch", "train_loss", "val_loss", "learning_rate"], *curve])
    return text.getvalue()


class Fit:
    """All that a killed run needs to go on: network, running average, optimizer, learning-rate schedule, curve so far."""

    def __init__(self, config: TrainConfig, data: TrainingSet, device: torch.device) -> None:
        optimization = config.optimization
        torch.manual_seed(optimization.seed)
        self.network = build_network(config.network, embed_dim=data.x0_ID.shape[1], num_users=data.num_users).to(device)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema_decay))
        users = self.network.user.weight
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self.network.parameters() if parameter is not users]},
            {"params": [users], "lr": optimization.user_learning_rate or optimization.learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optimization.learning_rate, weight_decay=optimization.weight_decay, fused=True)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=optimization.plateau_factor, patience=optimization.plateau_patience
        )
        self.epoch, self.best_loss, self.stale_epochs = 0, math.inf, 0
        self.curve: list[list[float]] = []

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def end_epoch(self, train_loss: float, val_loss: float) -> None:
        self.epoch += 1
        self.plateau.step(val_loss)
        self.stale_epochs = 0 if val_loss < self.best_loss else self.stale_epochs + 1
        self.best_loss = min(self.best_loss, val_loss)
        self.curve.append([self.epoch, round(train_loss, 6), round(val_loss, 6), self.learning_rate])

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.module.state_dict(),
            "num_averaged": int(self.average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "stale_epochs": self.stale_epochs,
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.module.load_state_dict(state["average"])
        self.average.n_averaged.fill_(state["num_averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.epoch, self.best_loss, self.stale_epochs = state["epoch"], state["best_loss"], state["stale_epochs"]
        self.curve = state["curve"]


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Ray Train's loop: one epoch, one validation, one report with a checkpoint, until it stops improving."""
    logging.getLogger().setLevel(logging.WARNING)  # else Ray Train prints every report in full
    config = TrainConfig.model_validate(settings["config"])
    data: TrainingSet = ray.get(settings["data"])
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = train.torch.get_device()
    torch.set_num_threads(config.workers.cpus_per_worker)
    optimization = config.optimization

    fit = Fit(config, data, device)
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            fit.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True, map_location=device))
        if rank == 0:
            print(f"run {config.run_name} in {config.storage} goes on after epoch {fit.epoch}/{optimization.max_epochs}", flush=True)
    model: nn.Module = DistributedDataParallel(fit.network) if world_size > 1 else fit.network
    diffusion = Diffusion.build(config.diffusion, device)
    sampler = BalancedUserSampler(data.user_index, data.held_out, data.num_users, optimization.samples_per_user, optimization.seed)
    batch_size = max(1, optimization.batch_size // world_size)
    steps = max(1, len(sampler.users) * optimization.samples_per_user // (batch_size * world_size))
    writer = SummaryWriter(f"{config.storage}/{config.run_name}/tensorboard") if rank == 0 else None
    while fit.epoch < optimization.max_epochs and fit.stale_epochs < optimization.early_stopping_patience:
        started, epoch = time.perf_counter(), fit.epoch + 1
        rows = sampler.epoch(epoch)[rank::world_size][: steps * batch_size]
        generator = torch.Generator(device).manual_seed(hash((optimization.seed, epoch, rank)) % 2**63)
        with progress_bar(steps, f"epoch {epoch}", settings["live"] and rank == 0) as bar:
            train_loss = train_epoch(model, fit, diffusion, data, np.array_split(rows, steps), generator, config, bar)
        val_loss = validation_loss(cast(Prior, fit.average.module), diffusion, data, rank, world_size, device)
        if not math.isfinite(train_loss):
            raise UserError(
                f"training diverged in epoch {epoch} at learning rate {fit.learning_rate:.3g}; "
                "lower optimization.learning_rate and user_learning_rate"
            )
        fit.end_epoch(train_loss, val_loss)
        metrics = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "learning_rate": fit.learning_rate}
        if writer is None:
            train.report(metrics)
            continue
        for name in ("train_loss", "val_loss", "learning_rate"):
            writer.add_scalar(name, metrics[name], epoch)
        writer.flush()
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch}/{optimization.max_epochs}  train {train_loss:.4f}  val {val_loss:.4f}  best {fit.best_loss:.4f}  "
            f"lr {fit.learning_rate:.1e}  {steps * batch_size * world_size / seconds:,.0f} samples/s",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            torch.save(fit.state_dict(), Path(folder) / STATE)
            train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def train_epoch(
    model: nn.Module,
    fit: Fit,
    diffusion: Diffusion,
    data: TrainingSet,
    batches: list[np.ndarray],
    generator: torch.Generator,
    config: TrainConfig,
    bar: Any,
) -> float:
    """One optimizer step a batch; returns the mean loss over all workers. Raises RuntimeError if the workers drift apart."""
    model.train()
    total = torch.zeros((), device=generator.device)
    for rows in batches:
        loss = batch_loss(model, fit.network, diffusion, data, rows, generator, config)
        fit.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(fit.network.parameters(), config.optimization.gradient_clip)
        fit.optimizer.step()
        fit.average.update_parameters(fit.network)
        total += loss.detach()
        if bar is not None:
            bar.update(1)
    weight = torch.stack([parameter.detach().double().sum() for parameter in fit.network.parameters()]).sum()
    if abs(mean_over_workers(weight.clone()) - float(weight)) > 1e-9 * (1 + abs(float(weight))):
        raise RuntimeError("the workers' weights differ: gradients are not shared")  # rank 0 would save a part of the training
    return mean_over_workers(total / len(batches))


def batch_loss(
    model: nn.Module,
    network: Prior,
    diffusion: Diffusion,
    data: TrainingSet,
    rows: np.ndarray,
    generator: torch.Generator,
    config: TrainConfig,
) -> torch.Tensor:
    """The denoising loss of one batch, user and rating dropped independently (Ho & Salimans 2022, algorithm 1)."""
    device = generator.device
    x0 = torch.from_numpy(data.x0_ID[data.item_index[rows]]).to(device)
    user = torch.from_numpy(data.user_index[rows]).long().to(device)
    rating = torch.from_numpy(data.like[rows]).long().to(device)
    drop = torch.rand(2, len(rows), device=device, generator=generator)
    user = torch.where(drop[0] < config.optimization.user_dropout, network.null_user_index, user)
    rating = torch.where(drop[1] < config.optimization.rating_dropout, network.null_rating_index, rating)
    timestep = torch.randint(0, config.diffusion.num_train_timesteps, (len(rows),), device=device, generator=generator)
    noise = torch.randn(x0.shape, device=device, generator=generator)
    prediction = model(diffusion.add_noise(x0, noise, timestep), timestep, user, rating)
    return diffusion.loss(prediction, diffusion.target(x0, noise, timestep))


@torch.no_grad()
def validation_loss(
    network: Prior, diffusion: Diffusion, data: TrainingSet, rank: int, world_size: int, device: torch.device, limit: int = 8192
) -> float:
    """The loss on held-out interactions, with the same noise and timesteps every epoch, over all workers.

    Without a hold-out the training rows stand in. At most `limit` rows, evenly spaced.
    """
    rows = np.flatnonzero(data.held_out) if data.held_out.any() else np.arange(len(data.like))
    rows = rows[:: max(1, math.ceil(len(rows) / limit))]
    generator = torch.Generator().manual_seed(0)
    timestep = torch.randint(0, diffusion.settings.num_train_timesteps, (len(rows),), generator=generator)
    noise = torch.randn(len(rows), data.x0_ID.shape[1], generator=generator)
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for chunk in np.array_split(np.arange(len(rows))[rank::world_size], max(1, len(rows) // (world_size * 1024))):
        if len(chunk) == 0:
            continue
        picked = rows[chunk]
        x0 = torch.from_numpy(data.x0_ID[data.item_index[picked]]).to(device)
        user = torch.from_numpy(data.user_index[picked]).long().to(device)
        rating = torch.from_numpy(data.like[picked]).long().to(device)
        t, eps = timestep[chunk].to(device), noise[chunk].to(device)
        prediction = network(diffusion.add_noise(x0, eps, t), t, user, rating)
        total += diffusion.loss(prediction, diffusion.target(x0, eps, t)) * len(chunk)
        count += len(chunk)
    if world_size > 1:
        dist.all_reduce(total)
        dist.all_reduce(count)
    return float(total / count)


def mean_over_workers(value: torch.Tensor) -> float:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        value = value / dist.get_world_size()
    return float(value)


def progress_bar(total: int, what: str, live: bool) -> AbstractContextManager[Any]:
    """A bar on the driver's terminal through Ray, or nothing where nobody watches."""
    if not live:
        return nullcontext()
    from contextlib import closing

    from ray.experimental import tqdm_ray

    return closing(tqdm_ray.tqdm(total=total, desc=what))
