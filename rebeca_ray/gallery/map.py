"""The map of a snapshot: a sample of its items on a grid, similar ones close to each other.

items spread over the table -> embeddings -> the two main directions -> the best assignment to cells
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from rebeca_ray.gallery.tables import Tables
from rebeca_ray.gallery.views import ITEM, Row

COLUMNS, ROWS = 20, 12
READS = 12  # parts of the table that the sample comes from


@dataclass(frozen=True)
class Cell:
    """An item, and its column and row on the map."""

    item: Row
    column: int
    row: int


def map_of(tables: Tables) -> list[Cell]:
    """Return a sample of the items, each in a cell of its own. Reads READS row groups."""
    total, count = tables.num_rows("items"), COLUMNS * ROWS
    columns, part = [*ITEM, "image_embeds"], count // READS
    if total <= count:
        items = tables.page("items", 0, columns, count).to_pylist()
    else:
        starts = np.linspace(0, total - part, READS).astype(int).tolist()
        items = [row for start in starts for row in tables.page("items", start, columns, part).to_pylist()]
    items = [*{item["item_id"]: item for item in items}.values()]  # parts of a small table overlap
    embeds_ID = np.array([item.pop("image_embeds") for item in items], np.float64).reshape(len(items), -1)
    return [Cell(item, column, row) for item, (column, row) in zip(items, cells(embeds_ID), strict=True)]


def cells(embeds_ID: np.ndarray) -> list[tuple[int, int]]:
    """Return a cell per embedding, each once: the cells that are nearest to the main directions in all.

    Ranks spread the directions evenly over the grid.
    """
    count = len(embeds_ID)
    if not count:
        return []
    unit = embeds_ID / np.linalg.norm(embeds_ID, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    position = (rankdata(flat, axis=0) - 0.5) / count  # in (0, 1)
    grid = np.array([(column, row) for row in range(ROWS) for column in range(COLUMNS)])
    centres = (grid + 0.5) / [COLUMNS, ROWS]
    distance = ((position[:, None] - centres[None]) ** 2).sum(-1)
    _, chosen = linear_sum_assignment(distance)
    return [(int(column), int(row)) for column, row in grid[chosen]]
