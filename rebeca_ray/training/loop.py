"""The loop that every Ray Train worker runs: epochs of a streamed share of the users, validation, a checkpoint each.

Shapes: B samples, D embed dim, I items, U user tokens, H width.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train import Checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.data.histories import Histories
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.user_blocks import TARGETS_PER_HISTORY, USERS_PER_BLOCK, Batch, UserBlock, num_batches
from rebeca_ray.prior.users import History
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training.state import DenoisingLoss, TrainState, user_tokens

log = logging.getLogger(__name__)

STATE = "state.pt"
DIVERGED = 10.0  # times the best validation loss
STEPS_PER_CHECK, NEVER = 1000, 2**62


def users_of(
    fit: TrainState, batch: Batch, x0_ID: np.ndarray, device: torch.device
) -> History | torch.Tensor | None:
    if fit.table:
        return fit.table(torch.from_numpy(batch.user_index_G).to(device))
    return batch.history.look_up(x0_ID, device) if fit.prior.history_encoder else None


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Ray Train's loop: one epoch, one validation, one report with a checkpoint, until it stops improving."""
    logging.getLogger().setLevel(logging.WARNING)  # else Ray Train prints every report in full
    config = TrainConfig.model_validate(settings["config"])
    histories: Histories = settings["histories"]
    x0_ID, validation = ray.get([settings["x0_ID"], settings["validation"]])
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = train.torch.get_device()
    torch.set_num_threads(config.workers.threads_per_worker)
    optimization = config.optimization

    fit = TrainState(config, x0_ID.shape[1], histories.num_users, device)
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            fit.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True, map_location=device))
        if rank == 0:
            log.info(
                f"training run {config.run_name} in {config.storage} resumes "
                f"after epoch {fit.epoch}/{optimization.max_epochs}"
            )
    diffusion = Diffusion.build(config.diffusion, device)
    loss: nn.Module = DenoisingLoss(fit.prior, diffusion, config)
    loss = DistributedDataParallel(loss) if world_size > 1 else loss
    users = UserShare(histories, rank, world_size)
    writer = SummaryWriter(f"{config.storage}/{config.run_name}/tensorboard") if rank == 0 else None
    while (
        fit.epoch < optimization.max_epochs
        and fit.stale_epochs < optimization.early_stopping_patience
        and not fit.diverged
    ):
        started, epoch = time.perf_counter(), fit.epoch + 1
        generator = torch.Generator(device).manual_seed(hash((optimization.seed, epoch, rank)) % 2**63)
        batches = islice(epoch_batches(users, config, epoch), optimization.steps_per_epoch)
        with progress_bar(
            num_steps(histories, config), f"epoch {epoch}", settings["live"] and rank == 0
        ) as bar:
            train_loss, samples = train_epoch(loss, fit, batches, x0_ID, generator, config, bar)
        val_loss = validation_loss(fit, diffusion, validation, x0_ID, rank, world_size, device)
        if not fit.diverged and not val_loss < DIVERGED * fit.best_loss:
            steps = epoch * num_steps(histories, config)
            fit.diverged = f"validation loss {val_loss:.4g} after epoch {epoch} (step {steps}) at learning rate {fit.learning_rate:.3g}"
        if fit.diverged:
            train_loss = val_loss = sys.float_info.max  # Ray's checkpoint list keeps no infinity
        rate = samples * world_size / (time.perf_counter() - started)
        fit.end_epoch(train_loss, val_loss, rate)
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "learning_rate": fit.learning_rate,
        }
        if writer is None:
            train.report(metrics)
            continue
        for name in ("train_loss", "val_loss", "learning_rate"):
            writer.add_scalar(name, metrics[name], epoch)
        writer.flush()
        log.info(
            f"epoch {epoch}/{optimization.max_epochs}  train {train_loss:.4f}  val {val_loss:.4f}  "
            f"best {fit.best_loss:.4f}  lr {fit.learning_rate:.1e}  {rate:,.0f} samples/s"
        )
        with tempfile.TemporaryDirectory() as folder:
            torch.save(fit.state_dict(), Path(folder) / STATE)
            train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


class UserShare:
    """One worker's share of the users, block by block, anew every epoch. Every worker gets as many users, so as many batches.

    Ray Data streams them, in another order of files every epoch. So few that they fit one block are read once instead:
    starting a stream takes longer than training on them. A share then wraps around, so that nobody is left out; of a stream
    that does not divide evenly, up to one user fewer than there are workers sits an epoch out.
    """

    def __init__(self, histories: Histories, rank: int, world_size: int) -> None:
        self.first_user_index = histories.first_user_index
        self.few: UserBlock | None = None
        if is_streamed(histories):
            self.stream = train.get_dataset_shard("users")
            return
        table = read_table(histories.uri, "histories")
        each = -(-table.num_rows // world_size)
        self.few = UserBlock(
            table.take(np.arange(rank * each, (rank + 1) * each) % table.num_rows), self.first_user_index
        )

    def __iter__(self) -> Iterator[UserBlock]:
        if self.few:
            yield self.few
            return
        for table in self.stream.iter_batches(
            batch_size=USERS_PER_BLOCK, batch_format="pyarrow", prefetch_batches=1
        ):
            yield UserBlock(table, self.first_user_index)


def is_streamed(histories: Histories) -> bool:
    return histories.num_users > USERS_PER_BLOCK


def epoch_batches(users: UserShare, config: TrainConfig, epoch: int) -> Iterator[Batch]:
    optimization = config.optimization
    for block in users:
        yield from block.batches(
            samples_per_user=optimization.samples_per_user,
            like_share=optimization.like_share,
            batch_size=max(1, optimization.batch_size // config.workers.num_workers),
            targets=targets_per_draw(config),
            max_history=config.network.max_history,
            seed=(optimization.seed, epoch),
        )


def targets_per_draw(config: TrainConfig) -> int:
    return TARGETS_PER_HISTORY if config.network.user_encoder == "history" else 1


def num_steps(histories: Histories, config: TrainConfig) -> int:
    """Optimizer steps an epoch, as far as every user has interactions."""
    targets, users = targets_per_draw(config), -(-histories.num_users // config.workers.num_workers)
    sizes = [USERS_PER_BLOCK] * (users // USERS_PER_BLOCK) + [users % USERS_PER_BLOCK]
    draws_a_user, batch_size = (
        -(-config.optimization.samples_per_user // targets),
        config.optimization.batch_size // config.workers.num_workers,
    )
    steps = sum(num_batches(size * draws_a_user, targets, max(1, batch_size)) for size in sizes if size)
    return min(steps, config.optimization.steps_per_epoch or steps)


def train_epoch(
    loss_of: nn.Module,
    fit: TrainState,
    batches: Iterator[Batch],
    x0_ID: np.ndarray,
    generator: torch.Generator,
    config: TrainConfig,
    bar: Any,
) -> tuple[float, int]:
    """One optimizer step a batch; returns the mean loss over all workers and this worker's samples.

    Notes the first step whose loss is not finite in `fit.diverged`, and ends soon after it. Raises RuntimeError if the workers
    drift apart.
    """
    device = generator.device
    step, samples = 0, 0
    total, diverged = torch.zeros((), device=device), torch.full((), NEVER, device=device)
    for step, batch in enumerate(batches, 1):
        x0_BD = torch.from_numpy(x0_ID[batch.item_index_B]).to(device)
        row_B, like_B = (
            torch.from_numpy(batch.row_B).to(device),
            torch.from_numpy(batch.like_B).long().to(device),
        )
        users = users_of(fit, batch, x0_ID, device)
        if fit.table:
            users = cast(torch.Tensor, users).requires_grad_()
        loss = loss_of(x0_BD, users, row_B, like_B, generator)
        fit.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(fit.prior.parameters(), config.optimization.gradient_clip)
        fit.optimizer.step()
        fit.average.update_parameters(fit.prior)
        if fit.table:
            gradient = cast(torch.Tensor, cast(torch.Tensor, users).grad)
            fit.table.update(
                torch.from_numpy(batch.user_index_G).to(device),
                gradient,
                fit.learning_rate * fit.user_learning_rate_per_step,
            )
        total += loss.detach()
        diverged = torch.where(loss.isfinite(), diverged, diverged.clamp(max=step))
        samples += len(x0_BD)
        if bar is not None:
            bar.update(1)
        if step % STEPS_PER_CHECK == 0 and first_of_workers(diverged) < NEVER:
            break
    weight = torch.stack([parameter.detach().double().sum() for parameter in fit.prior.parameters()]).sum()
    if abs(mean_over_workers(weight.clone()) - float(weight)) > 1e-9 * (1 + abs(float(weight))):
        raise RuntimeError(
            "the workers' weights differ: gradients are not shared"
        )  # rank 0 would save a part of the training
    if (first := first_of_workers(diverged)) < NEVER:
        fit.diverged = f"the loss is not finite in epoch {fit.epoch + 1}, step {first}, at learning rate {fit.learning_rate:.3g}"
    return mean_over_workers(total / max(1, step)), samples


@torch.no_grad()
def validation_loss(
    fit: TrainState,
    diffusion: Diffusion,
    batch: Batch,
    x0_ID: np.ndarray,
    rank: int,
    world_size: int,
    device: torch.device,
) -> float:
    """The loss on held-out interactions, with the same noise and timesteps every epoch, over all workers."""
    generator = torch.Generator().manual_seed(0)
    rows = len(batch.item_index_B)
    timestep_B = torch.randint(0, diffusion.settings.num_train_timesteps, (rows,), generator=generator)
    noise_BD = torch.randn(rows, x0_ID.shape[1], generator=generator)
    prior = cast(Prior, fit.average.module)
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for chunk in np.array_split(np.arange(rows)[rank::world_size], max(1, rows // (world_size * 1024))):
        if len(chunk) == 0:
            continue
        part = batch.take(chunk)
        x0_BD = torch.from_numpy(x0_ID[part.item_index_B]).to(device)
        user_BUH = user_tokens(
            prior, users_of(fit, part, x0_ID, device), torch.from_numpy(part.row_B).to(device)
        )
        condition = prior.condition(user_BUH, torch.from_numpy(part.like_B).long().to(device))
        timestep, noise = timestep_B[chunk].to(device), noise_BD[chunk].to(device)
        prediction = prior(diffusion.add_noise(x0_BD, noise, timestep), timestep, condition)
        total += diffusion.loss(prediction, diffusion.target(x0_BD, noise, timestep)) * len(chunk)
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


def first_of_workers(step: torch.Tensor) -> int:
    if dist.is_initialized() and dist.get_world_size() > 1:
        step = step.clone()
        dist.all_reduce(step, op=dist.ReduceOp.MIN)
    return int(step)


def progress_bar(total: int, what: str, live: bool) -> AbstractContextManager[Any]:
    """A bar on the driver's terminal through Ray, or nothing where nobody watches."""
    if not live:
        return nullcontext()
    from contextlib import closing

    from ray.experimental import tqdm_ray

    return closing(tqdm_ray.tqdm(total=total, desc=what))
