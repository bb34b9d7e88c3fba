"""Noise that depends on an item alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch


def item_noise(
    seeds: Sequence[int], embed_dim: int, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """One standard normal [B, D] after another, each item's from its own seed alone.

    Counter-based (Philox keyed by the seed), so that an item's noise is the same in any batch, order or process.
    """
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    while True:
        draws = [generator.standard_normal(embed_dim, np.float32) for generator in generators]
        yield torch.from_numpy(np.stack(draws)).to(device)
