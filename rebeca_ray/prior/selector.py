"""Predict whether a user likes an embedding, by a small logistic matrix factorisation over embeddings.

`P(like | u, x) = sigmoid(theta_u · (W x + w) + b_u + b · x + c)`, x in the prior's space. The selector
chooses among candidates before decoding. The evaluation's verifier is another model, from other ratings and
another seed.

Shapes: G users, N embeddings, L interactions of a history, D embed dim, I items, F factors (F+1: with b_u).
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.prior.users import History

NUM_FACTORS = 128
HIDDEN = 128
MAX_HISTORY = 256  # a user's factors are made from at most so many interactions


class RatedSums(NamedTuple):
    """What G users said: sums and numbers of the embeddings that they disliked and liked."""

    sum_G2D: torch.Tensor
    count_G2: torch.Tensor

    @classmethod
    def of(cls, history: History) -> Self:
        """Return the sums of histories."""
        like_GL, present_GL = history.like_BL.float(), history.present_BL.float()
        mark_G2L = torch.stack([1 - like_GL, like_GL], dim=1) * present_GL[:, None]
        return cls(mark_G2L @ history.item_BLD, mark_G2L.sum(2))

    def take(self, row: torch.Tensor) -> Self:
        """Return the sums of some users."""
        return self._replace(sum_G2D=self.sum_G2D[row], count_G2=self.count_G2[row])

    def shrunk(self, share_G: torch.Tensor) -> Self:
        """Return the sums of users who had said only a share of it, the same in every direction."""
        return self._replace(
            sum_G2D=self.sum_G2D * share_G[:, None, None], count_G2=self.count_G2 * share_G[:, None]
        )


class Selector(nn.Module):
    """Matrix factorisation with user factors from the history (asymmetric SVD: Koren 2008, section 4).

    `theta_u` sums a vector of the liked items and one of the disliked items, each a mean with a learned
    shrinkage, and what a perceptron makes of both. A user with a new history therefore has factors without
    training; an empty history gives those of an average user. The logit is linear in the embedding, so its
    gradient is one vector per user. `rows_VF` are the factors of an `id` prior's users, because such a prior
    is sampled without histories.
    """

    rows_VF: torch.Tensor | None

    def __init__(
        self, embed_dim: int, num_factors: int = NUM_FACTORS, rows_VF: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.said = nn.Linear(embed_dim, 2 * num_factors)  # one half if disliked, one if liked
        self.factors = nn.Linear(embed_dim, num_factors)
        self.popularity = nn.Linear(embed_dim, 1)
        self.generosity = nn.Linear(num_factors + 2, 1)
        self.shrinkage = nn.Parameter(torch.tensor([5.0, 5.0]))
        last = nn.Linear(HIDDEN, num_factors)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(2 * num_factors + 2, HIDDEN), nn.GELU(approximate="tanh"), last)
        self.register_buffer("rows_VF", rows_VF)

    def user_factors(self, history: History) -> torch.Tensor:
        """Return the factors [G, F+1] of histories."""
        return self.factors_from(RatedSums.of(history))

    def factors_from(self, sums: RatedSums) -> torch.Tensor:
        """Return the factors [G, F+1] of users from what they said."""
        # The map of items is linear, so it maps their sum.
        weight_2FD, bias_2F = self.said.weight.unflatten(0, (2, -1)), self.said.bias.view(2, -1)
        said_2GF = sums.sum_G2D.transpose(0, 1) @ weight_2FD.mT
        count_2G1 = sums.count_G2.T[..., None]
        mean_2GF = (said_2GF + count_2G1 * bias_2F[:, None]) / (
            count_2G1 + F.softplus(self.shrinkage)[:, None, None]
        )
        count_G1, num_likes_G1 = sums.count_G2.sum(1, keepdim=True), sums.count_G2[:, 1:]
        counts_G2 = torch.cat([torch.log1p(count_G1) / 5, (num_likes_G1 + 1) / (count_G1 + 4)], dim=1)
        # Who said nothing has no taste of their own: the perceptron's part grows with the number of ratings.
        share_G1 = count_G1 / (count_G1 + F.softplus(self.shrinkage).mean())
        theta_GF = mean_2GF.sum(0) + share_G1 * self.head(
            torch.cat([mean_2GF[0], mean_2GF[1], counts_G2], dim=1)
        )
        return torch.cat([theta_GF, self.generosity(torch.cat([theta_GF, counts_G2], dim=1))], dim=1)

    def item_factors(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return the factors [N, F+1] of embeddings; the last one is their popularity."""
        return torch.cat([self.factors(x_ND), self.popularity(x_ND)], dim=1)

    def logit(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """Return the logit [N] for each embedding and the factors of the user beside it."""
        return (self.factors(x_ND) * user_NF[:, :-1]).sum(1) + user_NF[:, -1] + self.popularity(x_ND)[:, 0]

    def linear(self, user_GF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradient [G, D] and offset [G] of users' logits: `logit = x · gradient + offset`."""
        theta_GF = user_GF[:, :-1]
        gradient_GD = theta_GF @ self.factors.weight + self.popularity.weight
        offset_G = theta_GF @ self.factors.bias + user_GF[:, -1] + self.popularity.bias
        return gradient_GD, offset_G

    @torch.inference_mode()
    def like_probability(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """Return the like probability [N] for each embedding and the factors of the user beside it."""
        return torch.sigmoid(self.logit(x_ND, user_NF))


def match(item_NF: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
    """Return the logit [N] of `item_factors` and `user_factors`, row by row; equal to `Selector.logit`."""
    return (item_NF[:, :-1] * user_NF[:, :-1]).sum(1) + user_NF[:, -1] + item_NF[:, -1]
