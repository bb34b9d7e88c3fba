"""Cut the users of a run into shards of rendering work, in the order of their keys.

A key has three parts, and the smaller key is rendered earlier. All functions take and return columns.

Shapes: G users.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rebeca_ray.identity import hash128

RENDER_KEY = np.dtype([("first", np.float64), ("second", np.float64), ("order", np.float64)])


def render_keys(decisions: pa.Table, by_urgency: bool) -> np.ndarray:
    """Return the keys [G] of rows of `schemas.DECISIONS`: by priority, then activity; or by bucket.

    A hash of the user decides between equals, so that the order is total. Doubles hold its 48 bits exactly.
    """
    keys = np.zeros(decisions.num_rows, RENDER_KEY)
    if by_urgency:
        keys["first"] = -decisions["priority"].to_numpy().astype(np.float64)
        keys["second"] = -decisions["activity"].to_numpy().astype(np.float64)
    else:
        keys["first"] = decisions["bucket"].to_numpy()
    keys["order"] = [int(hash128("order", user)[:12], 16) for user in decisions["user_id"].to_pylist()]
    return keys


def shards_of(keys: np.ndarray, boundaries: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Return the shard [G] of each key; `boundaries` are the first keys of all shards but the first."""
    return np.searchsorted(np.array([tuple(key) for key in boundaries], RENDER_KEY), keys, side="right")
