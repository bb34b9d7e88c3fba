"""Choose candidates before decoding: those that a user likes, that differ, and that copy no item.

Shapes: B embeddings, C candidates of one user, K chosen, D embed dim, I items.
"""

import numpy as np
import torch

ROWS_PER_CHUNK, ITEMS_PER_CHUNK = 1024, 65_536  # 256 MiB of similarities at a time
COPY_PENALTY = 10.0  # no copy outranks an original


def nearest_items(unit_BD: torch.Tensor, unit_ID: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and cosine similarity of the nearest item of each embedding.

    Brute force goes through the items in chunks. The cost is B·I·D multiply-adds: at 10 million items and D =
    1024, 10^10 per embedding. 10 million of them are 2·10^17 floating-point operations. One H100 needs 0.9
    hours for them in plain float32 (67 TFLOP/s), beside some 140 hours of decoding at 20 images per second.
    An index would be faster and miss copies.
    """
    rows, best = [], []
    for part_BD in unit_BD.split(ROWS_PER_CHUNK):
        best_B = part_BD.new_full((len(part_BD),), -torch.inf)
        row_B = torch.zeros(len(part_BD), dtype=torch.long, device=part_BD.device)
        for start in range(0, len(unit_ID), ITEMS_PER_CHUNK):
            value_B, index_B = (part_BD @ unit_ID[start : start + ITEMS_PER_CHUNK].T).max(1)
            row_B = torch.where(value_B > best_B, start + index_B, row_B)
            best_B = torch.maximum(best_B, value_B)
        rows.append(row_B)
        best.append(best_B)
    return torch.cat(rows), torch.cat(best)


def choose(
    unit_CD: np.ndarray, like_C: np.ndarray, copy_C: np.ndarray, num_chosen: int, diversity: float
) -> np.ndarray:
    """Return K candidates of a user, best first, by maximal marginal relevance (Carbonell & Goldstein 1998).

    Each choice maximises `(1 - diversity) · like - diversity · greatest cosine to those chosen`. Candidates
    marked as copies come last, so that K are always chosen. If K equals C, all are kept in their order: plain
    sampling.
    """
    if len(unit_CD) == num_chosen:
        return np.arange(num_chosen)
    relevance_C = (1 - diversity) * like_C - COPY_PENALTY * copy_C
    closest_C = np.full(len(unit_CD), -1.0, np.float32)
    chosen: list[int] = []
    for _ in range(num_chosen):
        if chosen:
            closest_C = np.maximum(closest_C, unit_CD @ unit_CD[chosen[-1]])
        merit_C = relevance_C - diversity * closest_C
        merit_C[chosen] = -np.inf  # last, so that not even a NaN is chosen twice
        chosen.append(int(merit_C.argmax()))
    return np.array(chosen, np.int64)
