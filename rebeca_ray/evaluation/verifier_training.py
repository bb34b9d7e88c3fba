"""Fit a verifier to ratings, fit further users to a frozen verifier, and choose its settings by validation.

Shapes: V users, N ratings, B ratings of a step, J different items of a step, I items, D embed dim, T numbers
per user and per embedding.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.verifier import (
    Network,
    Ratings,
    Verifier,
    check_embeddings,
    check_ratings,
    make_network,
)
from rebeca_ray.progress import counting

USER_STEPS, USER_LEARNING_RATE = 500, 0.1  # of users who are fitted to a frozen verifier
MIN_DEVIATION = 1e-3  # of a number over the trained users

Schedule = torch.optim.lr_scheduler.ExponentialLR | torch.optim.lr_scheduler.ReduceLROnPlateau


class Examples(NamedTuple):
    """N ratings on the device, with the weights that make every user count the same."""

    user_N: torch.Tensor
    item_N: torch.Tensor
    like_N: torch.Tensor
    weight_N: torch.Tensor


def fit_verifier(
    ratings: Ratings, x_ID: np.ndarray, settings: VerifierSettings, validation_N: np.ndarray | None = None
) -> Verifier:
    """Return a verifier fitted to ratings of items with the embeddings `x_ID` (paper, evaluation).

    `validation_N` marks the ratings that decide when training ends. By default, `settings.validation_share`
    of them are drawn by the seed. The loss is the cross-entropy weighted by 1 / (U · share of the user's
    ratings): the mean over users of their mean. Theta starts from a standard normal law. Adam takes all
    ratings in each step, unless `settings.batch_size` is set. The learning rate decays by the epoch
    (bilinear), or when validation stalls (NCF). The weights of the best epoch are returned.

    Raises InputError unless both parts have ratings, and those to fit have likes and dislikes.
    """
    check_embeddings(x_ID)
    check_ratings(ratings, len(x_ID))
    if validation_N is None:
        validation_N = validation_mask(len(ratings.user_N), settings.validation_share, settings.seed)
    training, validation = ratings.take(~validation_N), ratings.take(validation_N)
    num_ratings_V = np.bincount(training.user_N, minlength=int(np.max(ratings.user_N)) + 1)
    # A user without ratings to fit keeps random numbers, so the user's validation ratings say nothing.
    validation = validation.take(num_ratings_V[validation.user_N] > 0)
    check_parts(training, validation)

    on_gpu = [torch.cuda.current_device()] if settings.device == "cuda" else []
    with torch.random.fork_rng(on_gpu):
        torch.manual_seed(settings.seed)
        network, num_numbers = make_network(settings, x_ID.shape[1])
        theta_VT = torch.randn(len(num_ratings_V), num_numbers).to(settings.device).requires_grad_()
        network = network.to(settings.device)
        device_x_ID = torch.as_tensor(x_ID, dtype=torch.float32, device=settings.device)
        loss, epoch = train(
            network,
            theta_VT,
            device_x_ID,
            examples_of(training, settings.device),
            examples_of(validation, settings.device),
            settings,
        )
    return Verifier(
        settings=settings,
        network=network.eval().requires_grad_(False),
        theta_VT=theta_VT.detach(),
        num_ratings_V=num_ratings_V,
        validation_loss=loss,
        num_epochs=epoch,
    )


def validation_mask(num_ratings: int, share: float, seed: int) -> np.ndarray:
    """Return [N] bool: a random share of the ratings, rounded, at least one."""
    chosen = np.random.default_rng(seed).permutation(num_ratings)[: max(1, round(share * num_ratings))]
    return np.isin(np.arange(num_ratings), chosen)


def check_parts(training: Ratings, validation: Ratings) -> None:
    """Raise InputError unless there are likes and dislikes to fit, and ratings to validate."""
    likes, number = int(training.like_N.sum()), len(training.like_N)
    if likes in (0, number):
        raise InputError(
            f"verifier: {likes} likes among {number} ratings to fit; expected likes and dislikes; "
            "give it more ratings"
        )
    if not len(validation.like_N):
        raise InputError(
            "verifier: no validation ratings of users with ratings to fit; give it more ratings per user"
        )


def examples_of(ratings: Ratings, device: str) -> Examples:
    """Return ratings as tensors, weighted by 1 / (U · share of the user's ratings)."""
    count_V = np.bincount(ratings.user_N)
    weight_N = len(ratings.user_N) / (np.count_nonzero(count_V) * count_V[ratings.user_N])
    columns = ((ratings.user_N, torch.long), (ratings.item_N, torch.long), (ratings.like_N, torch.float32))
    user_N, item_N, like_N = (torch.as_tensor(values, dtype=kind).to(device) for values, kind in columns)
    return Examples(user_N, item_N, like_N, torch.as_tensor(weight_N, dtype=torch.float32).to(device))


def train(
    network: Network,
    theta_VT: torch.Tensor,
    x_ID: torch.Tensor,
    training: Examples,
    validation: Examples,
    settings: VerifierSettings,
) -> tuple[float, int]:
    """Train in place until validation stalls; return the best validation loss and its epoch."""
    optimizer = torch.optim.Adam(
        [*network.parameters(), theta_VT], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = schedule_of(optimizer, settings)
    best, best_epoch, best_weights = float("inf"), 0, (network.state_dict(), theta_VT.detach())
    most = settings.max_epochs
    with counting(f"fit the verifier for at most {most} epochs", most) as counted:
        for epoch in range(1, most + 1):
            counted.add()
            network.train()
            for part in batches(training, settings.batch_size):
                optimizer.zero_grad()
                mean_loss(network, theta_VT, x_ID, part).backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                loss = float(mean_loss(network, theta_VT, x_ID, validation))
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step(loss)
            else:
                schedule.step()
            if loss < best - settings.early_stopping_tolerance:
                best, best_epoch = loss, epoch
                best_weights = (copy.deepcopy(network.state_dict()), theta_VT.detach().clone())
            elif epoch - best_epoch >= settings.early_stopping_patience:
                break
    if not best_epoch:
        raise InputError(
            f"verifier: the validation loss is {loss} in every epoch; expected a number; "
            "scale the embeddings down, or lower verifier.learning_rate"
        )
    network.load_state_dict(best_weights[0])
    with torch.no_grad():
        theta_VT.copy_(best_weights[1])
    return best, best_epoch


def schedule_of(optimizer: torch.optim.Optimizer, settings: VerifierSettings) -> Schedule:
    """Return the schedule of the learning rate: exponential (bilinear), or lower on a plateau (NCF)."""
    if settings.kind == "bilinear":
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, settings.learning_rate_decay)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=settings.plateau_factor, patience=settings.plateau_patience
    )


def batches(examples: Examples, batch_size: int | None) -> Iterator[Examples]:
    """Yield all examples at once, or random batches of them."""
    if batch_size is None:
        yield examples
        return
    for rows in torch.randperm(len(examples.user_N)).to(examples.user_N.device).split(batch_size):
        yield Examples(*(column[rows] for column in examples))


def mean_loss(
    network: Network, theta_VT: torch.Tensor, x_ID: torch.Tensor, examples: Examples
) -> torch.Tensor:
    """Return the weighted mean cross-entropy. An item that several users rated is mapped once."""
    item_J, position_B = examples.item_N.unique(return_inverse=True)
    item_JT = network.items(x_ID[item_J])
    logit_B = network(item_JT[position_B], theta_VT[examples.user_N])
    loss_B = F.binary_cross_entropy_with_logits(logit_B, examples.like_N, reduction="none")
    return (examples.weight_N * loss_B).mean()


def fit_users(verifier: Verifier, ratings: Ratings, x_ID: np.ndarray) -> Verifier:
    """Return the verifier for the users of `ratings`, unseen in its training. The item side is frozen.

    Each user's Theta is the most probable one (maximum a posteriori): it minimises the sum of the
    cross-entropy over the user's ratings, plus half the squared distance from the trained users' mean, in
    standard deviations over the trained users. A user with few ratings is therefore close to the average
    user, and one with many follows them. Adam takes 500 steps on all users at once, and no user depends on
    another.

    Users count from 0 in `ratings`; the users of `verifier` are no longer in the result. Raises InputError if
    the verifier was fitted to fewer than two users, and for ratings that do not fit.
    """
    check_embeddings(x_ID, verifier.network.items.weight.shape[1])
    check_ratings(ratings, len(x_ID))
    trained_VT = verifier.theta_VT[torch.from_numpy(verifier.num_ratings_V > 0)]
    if len(trained_VT) < 2:
        raise InputError(
            f"verifier: fitted to {len(trained_VT)} user; others need the spread of at least two"
        )
    mean_T, deviation_T = trained_VT.mean(0), trained_VT.std(0).clamp(min=MIN_DEVIATION)
    num_ratings_V = np.bincount(ratings.user_N)
    examples = examples_of(ratings, str(trained_VT.device))
    item_J, position_N = np.unique(ratings.item_N, return_inverse=True)
    with torch.no_grad():
        item_NT = verifier.item_numbers(x_ID[item_J])[torch.from_numpy(position_N)]
    from_mean_VT = torch.zeros(len(num_ratings_V), len(mean_T), device=mean_T.device, requires_grad=True)
    optimizer = torch.optim.Adam([from_mean_VT], lr=USER_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=USER_STEPS)
    for _ in range(USER_STEPS):
        optimizer.zero_grad()
        theta_VT = mean_T + deviation_T * from_mean_VT
        logit_N = verifier.network(item_NT, theta_VT[examples.user_N])
        misfit = F.binary_cross_entropy_with_logits(logit_N, examples.like_N, reduction="sum")
        (misfit + from_mean_VT.square().sum() / 2).backward()
        optimizer.step()
        decay.step()
    theta_VT = mean_T + deviation_T * from_mean_VT.detach()
    return replace(verifier, theta_VT=theta_VT, num_ratings_V=num_ratings_V)


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """The result of one point of a grid."""

    settings: VerifierSettings
    validation_loss: float
    num_epochs: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The verifier with the least validation loss, and the results of all points in the order of the grid."""

    verifier: Verifier
    points: tuple[GridPoint, ...]


def grid_of(
    settings: VerifierSettings, num_factors: Sequence[int], weight_decay: Sequence[float]
) -> list[VerifierSettings]:
    """Return the settings with every pair of a dimension and a regularisation."""
    return [
        VerifierSettings.model_validate(
            {**settings.model_dump(), "num_factors": factors, "weight_decay": decay}
        )
        for factors, decay in itertools.product(num_factors, weight_decay)
    ]


def choose_verifier(
    ratings: Ratings,
    x_ID: np.ndarray,
    grid: Sequence[VerifierSettings],
    validation_N: np.ndarray | None = None,
) -> Choice:
    """Fit a verifier at every point of a grid, and return the one with the least validation loss.

    All points share the validation ratings: `validation_N`, or those that the first point draws. Of equal
    losses, the first wins. Raises InputError for an empty grid, and as `fit_verifier` does.
    """
    if not grid:
        raise InputError("grid: no settings to choose from; give at least one")
    if validation_N is None:
        validation_N = validation_mask(len(ratings.user_N), grid[0].validation_share, grid[0].seed)
    points: list[GridPoint] = []
    best: Verifier | None = None
    for settings in grid:
        verifier = fit_verifier(ratings, x_ID, settings, validation_N)
        points.append(
            GridPoint(
                settings=settings,
                validation_loss=verifier.validation_loss,
                num_epochs=verifier.num_epochs,
            )
        )
        if best is None or verifier.validation_loss < best.validation_loss:
            best = verifier
    assert best is not None
    return Choice(verifier=best, points=tuple(points))
