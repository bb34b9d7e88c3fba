"""Plan the items of several users, as pure functions from arrays to columns.

keys, user tokens -> sample_candidates -> judge_candidates -> choose_candidates -> columns of the chosen ones
embeddings of earlier items -> rescore_items -> their order and like probabilities

In float32, matrix products of a few rows round differently from those of many. Candidates therefore stay in
whole tiles until they are chosen: an item's bits then depend on the item alone. For the same reason, chosen
ones are compared with the real items in tiles.

Shapes: G users, N candidates padded to whole tiles, K planned items, D embed dim, U user tokens, H width,
F factors of the selector, I real items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rebeca_ray.config.sections import SamplerSettings, SelectionSettings
from rebeca_ray.identity import candidate_seeds
from rebeca_ray.prior.checkpoint import TrainedPrior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.selection import choose, nearest_items
from rebeca_ray.prior.selector import Selector, match
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.prior.variants import Variants, sample_variants

ROWS_PER_TILE = 64  # of candidates that are compared with the real items
UNKNOWN = -1  # instead of the row of a real item


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Columns of N candidates, user by user; copies of the last one fill the last tile."""

    embeds_ND: np.ndarray  # CLIP embeddings, rounded to half precision
    unit_ND: np.ndarray
    like_N: np.ndarray | None
    factor_NF: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class ChosenItems:
    """Columns of K chosen candidates, user by user, best first."""

    user_K: np.ndarray  # row of the user
    rank_K: np.ndarray
    candidate_K: np.ndarray  # number among the user's candidates
    embeds_KD: np.ndarray
    like_K: np.ndarray | None
    sampled_factor_KF: (
        np.ndarray | None
    )  # of candidate number `rank`: an unbiased sample, since nobody chose it
    nearest_K: np.ndarray | None  # row of the nearest real item
    similarity_K: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class RescoredItems:
    """Columns of K earlier items, user by user, best first."""

    row_K: np.ndarray  # row of the item as it was given
    user_K: np.ndarray
    rank_K: np.ndarray
    like_K: np.ndarray


def sample_candidates(
    prior: TrainedPrior,
    diffusion: Diffusion,
    sampler: SamplerSettings,
    users: UserVectors,
    keys: Sequence[str],
    count_G: np.ndarray,
    variants: Variants | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return `count_G[g]` candidates of each user in the prior's space [N, D], and their users' rows [N].

    `keys` are the users' plan keys: they seed the noise. `sampler` is a resolved one. Users with an item of
    `variants` get variants of it.
    """
    seeds = [
        seed
        for key, count in zip(keys, count_G.tolist(), strict=True)
        for seed in candidate_seeds(key, count)
    ]
    user_N = np.repeat(np.arange(len(count_G)), count_G)
    padding = -len(user_N) % sampler.batch_size
    user_N, seeds = np.pad(user_N, (0, padding), mode="edge"), seeds + seeds[-1:] * padding
    if variants is None:
        return sample_liked(prior, diffusion, users, user_N, seeds, sampler), user_N
    return sample_variants(prior, diffusion, users, user_N, seeds, sampler, variants), user_N


def judge_candidates(
    prior: TrainedPrior,
    factor_GF: torch.Tensor | None,
    x_ND: torch.Tensor,
    user_N: np.ndarray,
) -> Candidates:
    """Return the columns of candidates `x_ND`, with the selector's verdict if there is one."""
    like_N, factor_NF = judge(prior.selector, factor_GF, x_ND, user_N)
    embeds_ND = prior.scaler.unscale(x_ND).half().float()  # as the catalog keeps them
    return Candidates(
        embeds_ND=embeds_ND.numpy(),
        unit_ND=F.normalize(embeds_ND).numpy(),
        like_N=like_N,
        factor_NF=factor_NF,
    )


def judge(
    selector: Selector | None, factor_GF: torch.Tensor | None, x_ND: torch.Tensor, user_N: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return like probabilities [N] and item factors [N, F+1]; None without selector or user factors."""
    if selector is None or factor_GF is None:
        return None, None
    factor_NF = selector.item_factors(x_ND.to(factor_GF.device))
    like_N = torch.sigmoid(match(factor_NF, factor_GF[torch.from_numpy(user_N).to(factor_GF.device)]))
    return like_N.cpu().numpy(), factor_NF.cpu().numpy()


def choose_candidates(
    candidates: Candidates,
    count_G: np.ndarray,
    selection: SelectionSettings,
    real_unit_ID: torch.Tensor | None,
    variants: Variants | None = None,
) -> ChosenItems:
    """Return `count_G[g]` items of each user, chosen from `candidates_per_item` times as many candidates.

    A candidate near a real item is a copy, unless that item is the one of `variants` that it was made from.
    Only chosen candidates are compared with the real items. A user with a copy among them chooses again,
    which ends with the choice that all comparisons would give.
    """
    candidates_G = count_G * selection.candidates_per_item
    stop_G = np.cumsum(candidates_G)
    start_G = stop_G - candidates_G
    like_N, num_candidates = candidates.like_N, len(candidates.unit_ND)
    # Without a selector all are equally relevant; without real items none is a copy.
    relevance_N = np.zeros(num_candidates, np.float32) if like_N is None else like_N
    copy_N = np.zeros(num_candidates, bool)
    nearest_N, similarity_N = np.full(num_candidates, UNKNOWN), np.zeros(num_candidates, np.float32)

    # A choice depends on the user's earlier ones, so users are taken one by one. All else is columns.
    row_GK: list[np.ndarray] = [np.array([], int)] * len(count_G)
    choosing = np.arange(len(count_G))
    while len(choosing):
        for user in choosing.tolist():
            of = slice(start_G[user], stop_G[user])
            row_GK[user] = start_G[user] + choose(
                candidates.unit_ND[of], relevance_N[of], copy_N[of], count_G[user], selection.diversity
            )
        if real_unit_ID is None:
            break
        row_C = np.concatenate([row_GK[user] for user in choosing])
        row_C = row_C[nearest_N[row_C] == UNKNOWN]
        if not len(row_C):
            break
        nearest_N[row_C], similarity_N[row_C] = nearest_in_tiles(candidates.unit_ND[row_C], real_unit_ID)
        copy_N[row_C] = similarity_N[row_C] > selection.max_item_similarity
        if variants is not None:
            copy_N[row_C] &= nearest_N[row_C] != np.repeat(variants.row_G, candidates_G)[row_C]
        choosing = np.unique(np.searchsorted(stop_G, row_C[copy_N[row_C]], side="right"))

    user_K = np.repeat(np.arange(len(count_G)), count_G)
    rank_K, row_K = ranks(user_K), np.concatenate(row_GK)
    return ChosenItems(
        user_K=user_K,
        rank_K=rank_K,
        candidate_K=row_K - start_G[user_K],
        embeds_KD=candidates.embeds_ND[row_K],
        like_K=take(like_N, row_K),
        sampled_factor_KF=take(candidates.factor_NF, start_G[user_K] + rank_K),
        nearest_K=None if real_unit_ID is None else nearest_N[row_K],
        similarity_K=None if real_unit_ID is None else similarity_N[row_K],
    )


def nearest_in_tiles(unit_CD: np.ndarray, real_unit_ID: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return row [C] and cosine similarity [C] of the nearest real item of each candidate."""
    padded = np.pad(unit_CD, ((0, -len(unit_CD) % ROWS_PER_TILE), (0, 0)))
    tiles = torch.from_numpy(padded).to(real_unit_ID.device).split(ROWS_PER_TILE)
    pairs = [nearest_items(tile, real_unit_ID) for tile in tiles]
    nearest, similarity = (
        torch.cat(parts)[: len(unit_CD)].cpu().numpy() for parts in zip(*pairs, strict=True)
    )
    return nearest, similarity


def rescore_items(
    prior: TrainedPrior, factor_GF: torch.Tensor | None, embeds_KD: np.ndarray, user_K: np.ndarray, tile: int
) -> RescoredItems:
    """Return the like probability of earlier items by today's selector, and their order by it.

    Rows are padded to a multiple of `tile`, the sampler's batch size.
    """
    padding = -len(user_K) % tile
    x_ND = prior.scaler.scale(torch.from_numpy(np.pad(embeds_KD, ((0, padding), (0, 0)), mode="edge")))
    like_N, _ = judge(prior.selector, factor_GF, x_ND, np.pad(user_K, (0, padding), mode="edge"))
    assert like_N is not None  # nobody is rescored without a selector
    like_K = like_N[: len(user_K)]
    row_K = np.lexsort((-like_K, user_K))
    return RescoredItems(row_K=row_K, user_K=user_K[row_K], rank_K=ranks(user_K[row_K]), like_K=like_K[row_K])


def ranks(user_K: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2, … within each run of equal users."""
    return np.arange(len(user_K)) - np.searchsorted(user_K, user_K)


def take(column: np.ndarray | None, row_K: np.ndarray) -> np.ndarray | None:
    return None if column is None else column[row_K]
