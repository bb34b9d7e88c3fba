"""A safety checker that likes everything, and a decoder that has memory for two images at once, in whatever process imports this."""

import numpy as np
import torch

from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.interface import Rows

whole = DenoisingLoop.draw


def draw(self: DenoisingLoop, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return whole(self, rows)


DenoisingLoop.draw = draw  # type: ignore[method-assign]


def checker(images_BYX3: np.ndarray) -> np.ndarray:
    return np.zeros(len(images_BYX3))
