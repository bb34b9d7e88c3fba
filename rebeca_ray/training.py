"""Training the prior with Ray Train: the loop every worker runs, the balanced user sampler, early stopping."""

import csv
import hashlib
import io
import logging
import math
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from rebeca_ray.cluster import start_ray
from rebeca_ray.config import TrainConfig
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.embeds import EmbedScaler
from rebeca_ray.errors import UserError
from rebeca_ray.interactions import Interactions, read_interactions, user_table
from rebeca_ray.items import EmbeddedItems, read_image_embeds
from rebeca_ray.prior import Prior
from rebeca_ray.storage import require_writable

STATE = "state.pt"


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """N interactions joined with I scaled item embeddings; shared by all workers through Ray's object store."""

    x0_ID: np.ndarray  # float32, the prior's space
    item_index: np.ndarray  # [N]
    user_index: np.ndarray  # [N], sorted
    like: np.ndarray  # [N]
    held_out: np.ndarray  # [N] bool
    num_users: int


class BalancedUserSampler:
    """Draws the same number of training interactions from every user each epoch (paper, appendix A.1).

    Users with fewer rows than that repeat them. A pure function of seed and epoch, so that a resumed run sees the same
    epochs, and every worker takes its own share of one common draw.
    """

    def __init__(self, user_index: np.ndarray, held_out: np.ndarray, num_users: int, samples_per_user: int, seed: int) -> None:
        self.rows = np.flatnonzero(~held_out)
        self.counts = np.bincount(user_index[self.rows], minlength=num_users)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.users = np.flatnonzero(self.counts)
        self.samples_per_user, self.seed = samples_per_user, seed

    def epoch(self, number: int) -> np.ndarray:
        """Shuffled row numbers of epoch `number`, `samples_per_user` of every user."""
        random = np.random.default_rng((self.seed, number))
        share = random.random((len(self.users), self.samples_per_user))
        place = (share * self.counts[self.users, None]).astype(np.int64)
        rows = self.rows[(self.starts[self.users, None] + place).ravel()]
        return random.permutation(rows)


def build_training_set(interactions: Interactions, item_id: np.ndarray, x0_ID: np.ndarray, uri: str) -> TrainingSet:
    """Join interactions with item embeddings. Raises UserError for rated items without an embedding."""
    order = np.argsort(item_id)
    place = np.minimum(np.searchsorted(item_id, interactions.item_id, sorter=order), len(order) - 1)
    item_index = order[place]
    missing = item_id[item_index] != interactions.item_id
    if missing.any():
        names = ", ".join(sorted(set(interactions.item_id[missing]))[:3])
        raise UserError(
            f"items {uri}: {int(missing.sum())} of {len(missing)} interactions rate an item that has no embedding there "
            f"({names}); embed those items with `rebeca embed`, or drop their ratings"
        )
    return TrainingSet(
        x0_ID=x0_ID,
        item_index=item_index.astype(np.int32),
        user_index=interactions.user_index,
        like=interactions.like,
        held_out=interactions.held_out,
        num_users=interactions.num_users,
    )


def train_prior(config: TrainConfig) -> dict[str, float]:
    """Fit a prior as `config` says and write its directory; returns the metrics of the best epoch.

    A run that was killed goes on from its last epoch when started again with the same storage and run name.
    """
    require_writable(config.out, "prior")
    interactions = read_interactions(config.interactions)
    items = read_image_embeds(config.items)
    image_embeds = torch.from_numpy(items.image_embeds)
    scaler = EmbedScaler.fit(image_embeds)
    data = build_training_set(interactions, items.item_id, scaler.scale(image_embeds).numpy(), config.items)
    start_ray()

    users = user_table(interactions)
    config = config.model_copy(update={"run_name": run_name(config, users, items)})
    workers = config.workers
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
    torch.manual_seed(optimization.seed)

    network = build_network(config.network, embed_dim=data.x0_ID.shape[1], num_users=data.num_users).to(device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema_decay))
    parallel: nn.Module = DistributedDataParallel(network) if world_size > 1 else network
    users = network.user.weight
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in network.parameters() if parameter is not users]},
        {"params": [users], "lr": optimization.user_learning_rate or optimization.learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optimization.learning_rate, weight_decay=optimization.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=optimization.plateau_factor, patience=optimization.plateau_patience
    )
    first_epoch, best_loss, stale_epochs, curve = 1, math.inf, 0, []
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True, map_location=device)
        network.load_state_dict(state["network"])
        average.module.load_state_dict(state["average"])
        average.n_averaged.fill_(state["num_averaged"])
        optimizer.load_state_dict(state["optimizer"])
        plateau.load_state_dict(state["plateau"])
        first_epoch, best_loss, stale_epochs, curve = state["epoch"] + 1, state["best_loss"], state["stale_epochs"], state["curve"]

    diffusion = Diffusion.build(config.diffusion, device)
    sampler = BalancedUserSampler(data.user_index, data.held_out, data.num_users, optimization.samples_per_user, optimization.seed)
    batch_size = max(1, optimization.batch_size // world_size)
    writer = SummaryWriter(f"{config.storage}/{config.run_name}/tensorboard") if rank == 0 else None
    for epoch in range(first_epoch, optimization.max_epochs + 1):
        if stale_epochs >= optimization.early_stopping_patience:
            break
        started = time.perf_counter()
        rows = sampler.epoch(epoch)[rank::world_size]
        steps = max(1, len(sampler.users) * optimization.samples_per_user // (batch_size * world_size))
        generator = torch.Generator(device).manual_seed(hash((optimization.seed, epoch, rank)) % 2**63)
        parallel.train()
        total = torch.zeros((), device=device)
        with progress_bar(steps, f"epoch {epoch}", settings["live"] and rank == 0) as bar:
            for step in range(steps):
                loss = batch_loss(parallel, network, diffusion, data, rows[step * batch_size : (step + 1) * batch_size], generator, config)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), optimization.gradient_clip)
                optimizer.step()
                average.update_parameters(network)
                total += loss.detach()
                if bar is not None:
                    bar.update(1)
        train_loss = mean_over_workers(total / steps)
        val_loss = validation_loss(cast(Prior, average.module), diffusion, data, rank, world_size, device)
        if not math.isfinite(train_loss):
            raise UserError(
                f"training diverged in epoch {epoch} at learning rate {optimizer.param_groups[0]['lr']:.3g}; "
                "lower optimization.learning_rate and user_learning_rate"
            )
        plateau.step(val_loss)
        learning_rate = optimizer.param_groups[0]["lr"]
        stale_epochs = 0 if val_loss < best_loss else stale_epochs + 1
        best_loss = min(best_loss, val_loss)
        curve.append([epoch, round(train_loss, 6), round(val_loss, 6), learning_rate])
        metrics = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "learning_rate": learning_rate}
        if writer is None:
            train.report(metrics)
            continue
        for name in ("train_loss", "val_loss", "learning_rate"):
            writer.add_scalar(name, metrics[name], epoch)
        writer.flush()
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch}/{optimization.max_epochs}  train {train_loss:.4f}  val {val_loss:.4f}  best {best_loss:.4f}  "
            f"lr {learning_rate:.1e}  {steps * batch_size * world_size / seconds:,.0f} samples/s",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "network": network.state_dict(),
                "average": average.module.state_dict(),
                "num_averaged": int(average.n_averaged),
                "optimizer": optimizer.state_dict(),
                "plateau": plateau.state_dict(),
                "epoch": epoch,
                "best_loss": best_loss,
                "stale_epochs": stale_epochs,
                "curve": curve,
            }
            torch.save(state, Path(folder) / STATE)
            train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


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
