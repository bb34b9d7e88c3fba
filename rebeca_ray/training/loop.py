"""The loop of every Ray Train worker: epochs over its share of the users, validation, checkpoints.

Shapes: B samples, D embed dim, I items, U user tokens, H width.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
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
from rebeca_ray.config.sections import OptimizationSettings
from rebeca_ray.data.histories import Histories
from rebeca_ray.log import use
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.user_blocks import TARGETS_PER_HISTORY, USERS_PER_BLOCK, Batch, UserBlock, num_batches
from rebeca_ray.prior.users import History
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.telemetry.metrics import record_epoch
from rebeca_ray.training.state import DenoisingLoss, TrainState, user_tokens
from rebeca_ray.watchdog import Pulse

log = logging.getLogger(__name__)

STATE = "state.pt"
ENDED = "ended"  # among the metrics of an epoch: no other follows
DIVERGED = 10.0  # times the best validation loss
STEPS_PER_CHECK, NEVER = 1000, 2**62


def users_of(
    state: TrainState, batch: Batch, x0_ID: np.ndarray, device: torch.device
) -> History | torch.Tensor | None:
    """Return histories, rows of the user table, or None, as the prior encodes users."""
    if state.table:
        return state.table(torch.from_numpy(batch.user_index_G).to(device))
    return batch.history.look_up(x0_ID, device) if state.prior.history_encoder else None


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Repeat epoch, validation, and report with a checkpoint, until the loss stops improving."""
    use(settings["log"])
    logging.getLogger().setLevel(logging.WARNING)  # else Ray Train prints every report in full
    config = TrainConfig.model_validate(settings["config"])
    histories: Histories = settings["histories"]
    pulse: Pulse = settings["pulse"]
    x0_ID, validation = ray.get([settings["x0_ID"], settings["validation"]])
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = train.torch.get_device()
    torch.set_num_threads(config.workers.threads_per_worker)
    optimization = config.optimization

    state = TrainState(config, x0_ID.shape[1], histories.num_users, device)
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True, map_location=device))
        if rank == 0:
            log.info(
                f"training run {config.run_name} in {config.storage} resumes after epoch "
                f"{state.epoch}/{optimization.max_epochs}"
            )
    diffusion = Diffusion.build(config.diffusion, device)
    loss: nn.Module = DenoisingLoss(state.prior, diffusion, config)
    loss = DistributedDataParallel(loss) if world_size > 1 else loss
    users = UserShare(histories, rank, world_size)
    writer = SummaryWriter(f"{config.storage}/{config.run_name}/tensorboard") if rank == 0 else None
    while not has_ended(state, optimization):
        started, epoch = time.perf_counter(), state.epoch + 1
        seed = hash((optimization.seed, epoch, rank)) % 2**63
        generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)  # of the dropout inside a network, so that a resumed run is the same
        batches = islice(beating(epoch_batches(users, config, epoch), pulse), optimization.steps_per_epoch)
        train_loss, samples = train_epoch(loss, state, batches, x0_ID, generator, config)
        val_loss = validation_loss(state, diffusion, validation, x0_ID, rank, world_size, device)
        if not state.diverged and not val_loss < DIVERGED * state.best_loss:
            steps = epoch * num_steps(histories, config)
            state.diverged = (
                f"validation loss {val_loss:.4g} after epoch {epoch} (step {steps}) "
                f"at learning rate {state.learning_rate:.3g}"
            )
        if state.diverged:
            train_loss = val_loss = sys.float_info.max  # Ray's checkpoint list keeps no infinity
        rate = samples * world_size / (time.perf_counter() - started)
        state.end_epoch(train_loss, val_loss, rate)
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "learning_rate": state.learning_rate,
            ENDED: has_ended(state, optimization),
        }
        if writer is None:
            train.report(metrics)
            continue
        for name in ("train_loss", "val_loss", "learning_rate"):
            writer.add_scalar(name, metrics[name], epoch)
        writer.flush()
        record_epoch(epoch, train_loss, val_loss, rate)
        log.info(
            f"epoch {epoch}/{optimization.max_epochs}  train {train_loss:.4f}  val {val_loss:.4f}  "
            f"best {state.best_loss:.4f}  lr {state.learning_rate:.1e}  {rate:,.0f} samples/s"
        )
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state.state_dict(), Path(folder) / STATE)
            train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def has_ended(state: TrainState, optimization: OptimizationSettings) -> bool:
    is_stale = state.stale_epochs >= optimization.early_stopping_patience
    return is_stale or state.epoch >= optimization.max_epochs or bool(state.diverged)


class UserShare:
    """One worker's share of the users, block by block, every epoch; all workers get equally many.

    Ray Data streams them, with the files in another order every epoch. Users that state one block are read
    once instead, because starting a stream takes longer than training on them. Such a share wraps around, so
    that nobody is left out. A stream that does not divide evenly leaves out at most one user fewer than there
    are workers, per epoch.
    """

    def __init__(self, histories: Histories, rank: int, world_size: int) -> None:
        self.first_user_index = histories.first_user_index
        self.few: UserBlock | None = None
        if is_streamed(histories):
            self.stream = train.get_dataset_shard("users")
            return
        table = read_table(histories.uri, "histories")
        size = -(-table.num_rows // world_size)
        self.few = UserBlock(
            table.take(np.arange(rank * size, (rank + 1) * size) % table.num_rows), self.first_user_index
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
    """Yield the batches of one epoch on this worker."""
    optimization = config.optimization
    for block in users:
        yield from block.batches(
            samples_per_user=optimization.samples_per_user,
            with_replacement=optimization.with_replacement,
            like_share=optimization.like_share,
            batch_size=max(1, optimization.batch_size // config.workers.num_workers),
            targets=targets_per_draw(config),
            max_history=config.network.max_history,
            seed=(optimization.seed, epoch),
        )


def beating(batches: Iterator[Batch], pulse: Pulse) -> Iterator[Batch]:
    """Yield the batches, with a heartbeat before each."""
    for batch in batches:
        pulse.beat()
        yield batch


def targets_per_draw(config: TrainConfig) -> int:
    shares_history = config.network.user_encoder == "history" and config.optimization.with_replacement
    return TARGETS_PER_HISTORY if shares_history else 1


def num_steps(histories: Histories, config: TrainConfig) -> int:
    """Return the optimizer steps per epoch, if every user has interactions."""
    targets, users = targets_per_draw(config), -(-histories.num_users // config.workers.num_workers)
    sizes = [USERS_PER_BLOCK] * (users // USERS_PER_BLOCK) + [users % USERS_PER_BLOCK]
    draws_per_user = -(-config.optimization.samples_per_user // targets)
    batch_size = config.optimization.batch_size // config.workers.num_workers
    steps = sum(num_batches(size * draws_per_user, targets, max(1, batch_size)) for size in sizes if size)
    return min(steps, config.optimization.steps_per_epoch or steps)


def train_epoch(
    loss_of: nn.Module,
    state: TrainState,
    batches: Iterator[Batch],
    x0_ID: np.ndarray,
    generator: torch.Generator,
    config: TrainConfig,
) -> tuple[float, int]:
    """Make one optimizer step per batch; return the mean loss over all workers, and this worker's samples.

    Ends soon after the first step with a loss that is not finite, and names the step in `state.diverged`.
    Raises RuntimeError if the workers' weights differ.
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
        users = users_of(state, batch, x0_ID, device)
        if state.table:
            users = cast(torch.Tensor, users).requires_grad_()
        loss = loss_of(x0_BD, users, row_B, like_B, generator)
        state.optimizer.zero_grad()
        loss.backward()
        if config.optimization.gradient_clip is not None:
            nn.utils.clip_grad_norm_(state.prior.parameters(), config.optimization.gradient_clip)
        state.optimizer.step()
        state.update_average()
        if state.table:
            gradient = cast(torch.Tensor, cast(torch.Tensor, users).grad)
            state.table.update(
                torch.from_numpy(batch.user_index_G).to(device),
                gradient,
                state.learning_rate * state.user_learning_rate_per_step,
            )
        total += loss.detach()
        diverged = torch.where(loss.isfinite(), diverged, diverged.clamp(max=step))
        samples += len(x0_BD)
        if step % STEPS_PER_CHECK == 0 and first_of_workers(diverged) < NEVER:
            break
    weight = torch.stack([parameter.detach().double().sum() for parameter in state.prior.parameters()]).sum()
    if abs(mean_over_workers(weight.clone()) - float(weight)) > 1e-9 * (1 + abs(float(weight))):
        # Rank 0 would save a part of the training only.
        raise RuntimeError("the workers' weights differ: gradients are not shared")
    if (first := first_of_workers(diverged)) < NEVER:
        state.diverged = (
            f"the loss is not finite in epoch {state.epoch + 1}, step {first}, "
            f"at learning rate {state.learning_rate:.3g}"
        )
    return mean_over_workers(total / max(1, step)), samples


@torch.no_grad()
def validation_loss(
    state: TrainState,
    diffusion: Diffusion,
    batch: Batch,
    x0_ID: np.ndarray,
    rank: int,
    world_size: int,
    device: torch.device,
) -> float:
    """Return the loss on held-out interactions over all workers; noise and timesteps never change."""
    generator = torch.Generator().manual_seed(0)
    rows = len(batch.item_index_B)
    timestep_B = torch.randint(0, diffusion.settings.num_train_timesteps, (rows,), generator=generator)
    noise_BD = torch.randn(rows, x0_ID.shape[1], generator=generator)
    prior = state.average
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for chunk in np.array_split(np.arange(rows)[rank::world_size], max(1, rows // (world_size * 1024))):
        if len(chunk) == 0:
            continue
        part = batch.take(chunk)
        x0_BD = torch.from_numpy(x0_ID[part.item_index_B]).to(device)
        user_BUH = user_tokens(
            prior, users_of(state, part, x0_ID, device), torch.from_numpy(part.row_B).to(device)
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
