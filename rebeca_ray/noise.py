"""Draw noise that depends on an item's seed alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch


def item_noise(
    seeds: Sequence[int], embed_dim: int, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield one standard normal [B, D] after another; row i depends on `seeds[i]` alone (64 bits).

    Philox is counter-based and keyed by the seed. An item's noise is therefore the same in any batch, order
    or process.
    """
    yield torch.from_numpy(first_noise(seeds, embed_dim)).to(device)
    # Most samplers never come here. An ancestral one needs a generator per item, past its first draw.
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    noise_BD = np.empty((len(seeds), embed_dim), np.float32)
    for generator, row_D in zip(generators, noise_BD, strict=True):
        generator.standard_normal(dtype=np.float32, out=row_D)
    while True:
        noise_BD = np.empty((len(seeds), embed_dim), np.float32)
        for generator, row_D in zip(generators, noise_BD, strict=True):
            generator.standard_normal(dtype=np.float32, out=row_D)
        yield torch.from_numpy(noise_BD).to(device)


def first_noise(seeds: Sequence[int], embed_dim: int) -> np.ndarray:
    """Return the first draw [B, D] of each seed's generator.

    One generator is re-keyed per row: making a new one reads the system's entropy and costs more than the
    draw.
    """
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    state = philox.state
    noise_BD = np.empty((len(seeds), embed_dim), np.float32)
    for seed, row_D in zip(seeds, noise_BD, strict=True):
        state["state"]["key"][0] = seed
        philox.state = state
        generator.standard_normal(dtype=np.float32, out=row_D)
    return noise_BD
