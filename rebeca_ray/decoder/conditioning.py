"""The conditioning of a UNet: named tensors with one row per image.

A family declares the names, such as text tokens, image tokens and the weight of the image. The denoising loop
passes the tensors on in the declared order and knows none of their names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """The tensors that a UNet reads at every step, by name. The first axis of each is the batch."""

    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def replace(self, **tensors: torch.Tensor) -> "Conditioning":
        """Return a copy with `tensors` added; a tensor replaces that of the same name."""
        return Conditioning({**self.tensors, **tensors})

    def concatenate(self, other: "Conditioning") -> "Conditioning":
        """Return the rows of both, for guidance as one doubled batch. Both must have the same names."""
        assert set(self.tensors) == set(other.tensors), (set(self.tensors), set(other.tensors))
        return Conditioning({name: torch.cat([rows, other[name]]) for name, rows in self.tensors.items()})

    def take(self, rows: Sequence[int]) -> "Conditioning":
        """Return some rows, in the order of `rows`; a row may recur."""
        index = list(rows)
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def in_order(self, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Return the tensors in the order of `names`, which must name each tensor once."""
        assert set(names) == set(self.tensors), (names, set(self.tensors))
        return tuple(self.tensors[name] for name in names)
