"""Predict whether a user likes an embedding, by a model that is independent of the prior's selector.

The verifier (paper, evaluation) takes any embeddings: those of the prior, or those of another CLIP that sees
decoded pictures. `verifier_training.py` fits it. `independence.py` chooses its ratings.

Shapes: V users, G some of them, N pairs of embedding and user, I items, D embed dim, F factors, T numbers per
user and per embedding.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import nn

from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.errors import InputError

ITEM_DEVIATION = 1e-5  # of the bilinear form's initial item weights
PAIRS_AT_ONCE = 2**16


class Ratings(NamedTuple):
    """N ratings: the user, counted from 0, the item's row among the embeddings, and 1 for a like or 0."""

    user_N: np.ndarray
    item_N: np.ndarray
    like_N: np.ndarray

    def take(self, kept_N: np.ndarray) -> Self:
        """Return the ratings that a mask or row numbers choose."""
        return type(self)(*(np.asarray(column)[kept_N] for column in self))


class BilinearVerifier(nn.Module):
    """The paper's first verifier: `Theta1[u] · (x Ma) + Theta2[u] + x · Mb` is the logit of a like.

    A user has T = F+1 numbers, Theta1 and Theta2. An embedding has T = F+1 as well, `x Ma` and `x · Mb`. Ma
    and Mb start from a normal law of deviation 1e-5. Without factors, the model is the authors' control:
    users differ in generosity alone.
    """

    def __init__(self, embed_dim: int, num_factors: int) -> None:
        super().__init__()
        self.items = nn.Linear(embed_dim, num_factors + 1, bias=False)
        nn.init.normal_(self.items.weight, std=ITEM_DEVIATION)

    def forward(self, item_NT: torch.Tensor, user_NT: torch.Tensor) -> torch.Tensor:
        """Return the logit [N] for each embedding's numbers and the user's beside them."""
        return (item_NT[:, :-1] * user_NT[:, :-1]).sum(1) + item_NT[:, -1] + user_NT[:, -1]


class NcfVerifier(nn.Module):
    """The paper's second verifier, neural collaborative filtering (He et al. 2017, section 3.4).

    The logit is `Linear([theta[u] * W x ; MLP([theta'[u] ; W' x])]) + b[u] + b · x`. A user has T = 2F+1
    numbers, theta, theta' and b[u]. An embedding has T = 2F+1 as well, `W x`, `W' x` and `b · x`. Dropout
    follows each ReLU of the perceptron.
    """

    def __init__(
        self, embed_dim: int, num_factors: int, hidden_sizes: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.num_factors = num_factors
        first, second = hidden_sizes
        self.items = nn.Linear(embed_dim, 2 * num_factors + 1, bias=False)
        self.perceptron = nn.Sequential(
            nn.Linear(2 * num_factors, first),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(num_factors + second, 1)

    def forward(self, item_NT: torch.Tensor, user_NT: torch.Tensor) -> torch.Tensor:
        """Return the logit [N] for each embedding's numbers and the user's beside them."""
        factors = slice(0, self.num_factors)
        others = slice(self.num_factors, 2 * self.num_factors)
        hidden = self.perceptron(torch.cat([user_NT[:, others], item_NT[:, others]], dim=1))
        product_NF = user_NT[:, factors] * item_NT[:, factors]
        logit_N = self.head(torch.cat([product_NF, hidden], dim=1))[:, 0]
        return logit_N + item_NT[:, -1] + user_NT[:, -1]


Network = BilinearVerifier | NcfVerifier


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A fitted verifier: the item side, shared by all users, and each user's numbers.

    `validation_loss` is the cross-entropy on the validation ratings, where every user counts the same. It is
    that of epoch `num_epochs`, after which training found nothing better.
    """

    settings: VerifierSettings
    network: Network
    theta_VT: torch.Tensor
    num_ratings_V: np.ndarray  # that the user's numbers were fitted to
    validation_loss: float
    num_epochs: int

    def like_probability(self, x_ND: np.ndarray, user_N: np.ndarray) -> np.ndarray:
        """Return the like probability [N] for each embedding and the user beside it.

        Raises InputError for a user without ratings, and for embeddings that do not fit.
        """
        if len(x_ND) != len(user_N):
            raise InputError(f"x_ND: {len(x_ND)} embeddings for {len(user_N)} users; give one per user")
        self.check_users(user_N)
        user, like = torch.as_tensor(user_N, dtype=torch.long), []
        with torch.inference_mode():
            for rows in torch.arange(len(user)).split(PAIRS_AT_ONCE):
                logit_N = self.network(self.item_numbers(x_ND[rows.numpy()]), self.theta_of(user[rows]))
                like.append(torch.sigmoid(logit_N).cpu().numpy())
        return np.concatenate([np.empty(0, np.float32), *like])

    def like_matrix(self, x_ND: np.ndarray, user_G: np.ndarray) -> np.ndarray:
        """Return the like probabilities [G, N] of some users for all embeddings, for permutation tests.

        Raises InputError as `like_probability` does.
        """
        self.check_users(user_G)
        like_GN = np.empty((len(user_G), len(x_ND)), np.float32)
        user = torch.as_tensor(user_G, dtype=torch.long)
        with torch.inference_mode():
            for start in range(0, len(x_ND), PAIRS_AT_ONCE):
                part = slice(start, start + PAIRS_AT_ONCE)
                item_NT = self.item_numbers(x_ND[part])
                for row_N, theta_T in zip(like_GN, self.theta_of(user), strict=True):
                    logit_N = self.network(item_NT, theta_T.expand(len(item_NT), -1))
                    row_N[part] = torch.sigmoid(logit_N).cpu().numpy()
        return like_GN

    def item_numbers(self, x_ND: np.ndarray) -> torch.Tensor:
        """Return the numbers [N, T] of embeddings."""
        weight_TD = self.network.items.weight
        check_embeddings(x_ND, weight_TD.shape[1])
        return self.network.items(torch.tensor(x_ND, dtype=torch.float32, device=weight_TD.device))

    def theta_of(self, user_N: torch.Tensor) -> torch.Tensor:
        """Return the numbers [N, T] of users."""
        return self.theta_VT[user_N.to(self.theta_VT.device)]

    def check_users(self, user_N: np.ndarray) -> None:
        """Raise InputError for a user without ratings in the verifier."""
        user_N = np.asarray(user_N)
        known_N = (user_N >= 0) & (user_N < len(self.num_ratings_V))
        known_N[known_N] = self.num_ratings_V[user_N[known_N]] > 0
        if not known_N.all():
            raise InputError(
                f"verifier: user {user_N[~known_N][0]} has no ratings in it; expected users from 0 to "
                f"{len(self.num_ratings_V) - 1} with ratings; fit the ratings of others by fit_users"
            )


def make_network(settings: VerifierSettings, embed_dim: int) -> tuple[Network, int]:
    """Return a network with initial weights, and the numbers T that it needs per user."""
    if settings.kind == "bilinear":
        return BilinearVerifier(embed_dim, settings.num_factors), settings.num_factors + 1
    network = NcfVerifier(embed_dim, settings.num_factors, settings.hidden_sizes, settings.dropout)
    return network, 2 * settings.num_factors + 1


def check_embeddings(x_ND: np.ndarray, embed_dim: int | None = None) -> None:
    """Raise InputError unless the embeddings are finite rows, of `embed_dim` numbers if it is given."""
    if x_ND.ndim != 2 or (embed_dim is not None and x_ND.shape[1] != embed_dim):
        raise InputError(
            f"embeddings: shape {x_ND.shape}; expected rows of {embed_dim or 'equally many'} numbers"
        )
    if not np.isfinite(x_ND).all():
        raise InputError("embeddings: NaN or infinite numbers; embed their items again")


def check_ratings(ratings: Ratings, num_items: int) -> None:
    """Raise InputError for columns of different lengths, unknown items, and likes other than 0 and 1."""
    lengths = [len(column) for column in ratings]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError(f"ratings: {lengths} users, items and likes; expected some, and as many of each")
    user_N, item_N, like_N = (np.asarray(column) for column in ratings)
    if user_N.min() < 0:
        raise InputError(f"ratings: user {user_N.min()}; count users from 0")
    if item_N.min() < 0 or item_N.max() >= num_items:
        raise InputError(
            f"ratings: items {item_N.min()} to {item_N.max()}; expected rows of {num_items} embeddings"
        )
    if not np.isin(like_N, (0, 1)).all():
        raise InputError(f"ratings: like {like_N[~np.isin(like_N, (0, 1))][0]}; expected 0 or 1")
