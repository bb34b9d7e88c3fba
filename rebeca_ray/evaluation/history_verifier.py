"""A verifier that reads a user's taste from a history, as the selector does, but from other ratings.

The paper's verifiers learn numbers for each user, which takes dozens of ratings of each. This one shares all
its weights between users: it can judge with ten ratings, and users whom it was not fitted to.

Shapes: V users, G some of them, N embeddings, D embed dim, F factors (F+1: with the user's generosity).
"""

from dataclasses import dataclass

import numpy as np
import torch

from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.verifier import check_embeddings
from rebeca_ray.prior.selector import Selector


@dataclass(frozen=True, kw_only=True)
class HistoryVerifier:
    """A model of the selector's form, and each user's factors from the ratings that the verifier may read."""

    model: Selector
    factor_VF: torch.Tensor
    num_ratings_V: np.ndarray

    def like_probability(self, x_ND: np.ndarray, user_N: np.ndarray) -> np.ndarray:
        """Return the like probability [N] for each embedding and the user beside it.

        Raises InputError for a user without ratings, and for embeddings that do not fit.
        """
        self.check(x_ND, user_N)
        factor_NF = self.factor_VF[torch.as_tensor(user_N, dtype=torch.long)]
        return self.model.like_probability(as_tensor(x_ND), factor_NF).numpy()

    def like_matrix(self, x_ND: np.ndarray, user_G: np.ndarray) -> np.ndarray:
        """Return the like probabilities [G, N] of some users for all embeddings, for permutation tests.

        Raises InputError as `like_probability` does.
        """
        self.check(x_ND, user_G)
        with torch.inference_mode():
            gradient_GD, offset_G = self.model.linear(
                self.factor_VF[torch.as_tensor(user_G, dtype=torch.long)]
            )
            return torch.sigmoid(gradient_GD @ as_tensor(x_ND).T + offset_G[:, None]).numpy()

    def check(self, x_ND: np.ndarray, user_N: np.ndarray) -> None:
        """Raise InputError for embeddings that do not fit, and for a user without ratings."""
        check_embeddings(x_ND, self.model.popularity.in_features)
        if not (self.num_ratings_V[user_N] > 0).all():
            unknown = user_N[self.num_ratings_V[user_N] == 0][0]
            raise InputError(f"verifier: user {unknown} has no ratings in it; leave the user out")


def as_tensor(x_ND: np.ndarray) -> torch.Tensor:
    """Return embeddings in float32, copied: a column of a table cannot be written to."""
    return torch.tensor(x_ND, dtype=torch.float32)
