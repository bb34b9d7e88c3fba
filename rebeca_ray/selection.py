"""Choosing before decoding: of a user's candidates those that are liked, unlike each other, and no copy of an item.

Shapes: G users, C candidates a user, K chosen a user, D embed dim, I items.
"""

import numpy as np
import torch

ITEMS_A_CHUNK = 131_072


def nearest_items(unit_BD: torch.Tensor, unit_ID: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and cosine similarity of the nearest item of each embedding, by brute force in chunks of the items.

    B·I·D multiply-adds: at 10 million items and D = 1024, 10^10 a candidate. Four candidates for each of 10 million images
    are 8·10^17 floating-point operations, half an hour of one H100, beside hundreds of hours of decoding: an index would save what is
    no cost, and miss some copies.
    """
    best_B = unit_BD.new_full((len(unit_BD),), -torch.inf)
    row_B = torch.zeros(len(unit_BD), dtype=torch.long, device=unit_BD.device)
    for start in range(0, len(unit_ID), ITEMS_A_CHUNK):
        value_B, place_B = (unit_BD @ unit_ID[start : start + ITEMS_A_CHUNK].T).max(1)
        row_B = torch.where(value_B > best_B, start + place_B, row_B)
        best_B = torch.maximum(best_B, value_B)
    return row_B, best_B


def choose(unit_CD: np.ndarray, like_C: np.ndarray, copy_C: np.ndarray, num_chosen: int, diversity: float) -> np.ndarray:
    """K of one user's candidates, best first, by maximal marginal relevance (Carbonell & Goldstein 1998).

    Each choice maximises `(1 - diversity) · like - diversity · greatest cosine to those chosen`. Candidates marked as copies come
    only when nothing else is left, so that K are always chosen. With as many candidates as asked, all are kept in
    their order: plain sampling.
    """
    if len(unit_CD) == num_chosen:
        return np.arange(num_chosen)
    relevance_C = (1 - diversity) * like_C - 10.0 * copy_C  # no copy outranks an original
    similarity_CC = unit_CD @ unit_CD.T
    closest_C = np.full(len(unit_CD), -1.0, np.float32)
    chosen: list[int] = []
    for _ in range(num_chosen):
        merit_C = relevance_C - diversity * closest_C
        merit_C[chosen] = -np.inf
        chosen.append(int(merit_C.argmax()))
        closest_C = np.maximum(closest_C, similarity_CC[chosen[-1]])
    return np.array(chosen)
