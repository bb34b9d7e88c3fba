"""A safety checker that accepts every image. An import also limits the process's decoder to two images."""

import numpy as np
import torch

from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.interface import Rows

draw_any_number = DenoisingLoop.draw


def draw(self: DenoisingLoop, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return draw_any_number(self, rows)


DenoisingLoop.draw = draw  # type: ignore[method-assign]


def checker(images_BYX3: np.ndarray) -> np.ndarray:
    return np.zeros(len(images_BYX3))
