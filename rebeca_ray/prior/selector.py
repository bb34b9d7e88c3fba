"""Predict whether a user likes an embedding, by a small logistic matrix factorisation over embeddings.

`P(like | u, x) = sigmoid(theta_u · (W x + w) + b_u + b · x + c)`, x in the prior's space. The selector
chooses among candidates before decoding. The evaluation's verifier is another model, from other ratings and
another seed.

Shapes: G users, N embeddings, L interactions of a history, D embed dim, I items, F factors (F+1: with b_u).
"""

import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.prior.users import History

NUM_FACTORS = 64
MAX_HISTORY = 128  # a user's factors are made from at most so many interactions


class Selector(nn.Module):
    """Matrix factorisation with user factors from the history (asymmetric SVD: Koren 2008, section 4).

    `theta_u` sums a vector of the liked items and one of the disliked items, each a mean with a learned
    shrinkage. A user with a new history therefore has factors without training; an empty history gives those
    of an average user. `rows_VF` are the factors of an `id` prior's users, because such a prior is sampled
    without histories.
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
        self.shrinkage = nn.Parameter(torch.tensor(5.0))
        self.register_buffer("rows_VF", rows_VF)

    def user_factors(self, history: History) -> torch.Tensor:
        """Return the factors [G, F+1] of histories."""
        disliked_GLF, liked_GLF = self.said(history.item_BLD).chunk(2, dim=-1)
        present_GL = history.present_BL.float()
        like_GL = history.like_BL * present_GL
        dislike_GL = present_GL - like_GL
        num_likes_G1, num_dislikes_G1 = like_GL.sum(1, keepdim=True), dislike_GL.sum(1, keepdim=True)
        shrinkage = F.softplus(self.shrinkage)
        theta_GF = (liked_GLF * like_GL[..., None]).sum(1) / (num_likes_G1 + shrinkage)
        theta_GF = theta_GF + (disliked_GLF * dislike_GL[..., None]).sum(1) / (num_dislikes_G1 + shrinkage)
        count_G1 = num_likes_G1 + num_dislikes_G1
        features_GF = torch.cat(
            [theta_GF, torch.log1p(count_G1) / 5, (num_likes_G1 + 1) / (count_G1 + 4)], dim=1
        )
        return torch.cat([theta_GF, self.generosity(features_GF)], dim=1)

    def item_factors(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return the factors [N, F+1] of embeddings; the last one is their popularity."""
        return torch.cat([self.factors(x_ND), self.popularity(x_ND)], dim=1)

    def logit(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """Return the logit [N] for each embedding and the factors of the user beside it."""
        return (self.factors(x_ND) * user_NF[:, :-1]).sum(1) + user_NF[:, -1] + self.popularity(x_ND)[:, 0]

    @torch.inference_mode()
    def like_probability(self, x_ND: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
        """Return the like probability [N] for each embedding and the factors of the user beside it."""
        return torch.sigmoid(self.logit(x_ND, user_NF))


def match(item_NF: torch.Tensor, user_NF: torch.Tensor) -> torch.Tensor:
    """Return the logit [N] of `item_factors` and `user_factors`, row by row; equal to `Selector.logit`."""
    return (item_NF[:, :-1] * user_NF[:, :-1]).sum(1) + user_NF[:, -1] + item_NF[:, -1]
