"""DeepCache: between whole passes, only the outer blocks of a UNet run (Ma et al. 2024).

The features that enter the last up block change little from one step to the next. A whole pass keeps them,
and a shallow pass takes them in place of all blocks but the first down block and the last up block.

Shapes: B batch, C channels, Y X latents.
"""

import copy
from typing import Any

import torch
from torch import nn

from rebeca_ray.errors import InputError


class Kept(nn.Module):
    """In the place of the middle block: the features of the last whole pass, for the first rows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.deep_BCYX: torch.Tensor | None = None

    def forward(self, sample_BCYX: torch.Tensor, embedding_BC: torch.Tensor) -> torch.Tensor:
        assert self.deep_BCYX is not None  # a whole pass comes first
        return self.deep_BCYX[: len(sample_BCYX)]


class WithoutSampler(nn.Module):
    """A down block without the output of its downsampler, which only deeper blocks read."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(
        self, hidden_states: torch.Tensor, **inputs: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        hidden_states, outputs = self.block(hidden_states=hidden_states, **inputs)
        return hidden_states, outputs[:-1]


def shallow_copy(unet: Any, name: str) -> Any:
    """Return a UNet of diffusers that shares its weights with `unet`, and runs its outer blocks alone.

    Every pass of `unet` keeps the features for it. Raises InputError for a model with a single block, naming
    `name`.
    """
    if len(unet.down_blocks) < 2 or unet.mid_block is None:
        raise InputError(
            f"decoder.cache_interval: the UNet of {name} has {len(unet.down_blocks)} down block; "
            "expected at least 2; set it to 1"
        )
    kept = Kept()

    def keep(block: nn.Module, positional: tuple[Any, ...], named: dict[str, torch.Tensor]) -> None:
        kept.deep_BCYX = named["hidden_states"]

    shallow = copy.copy(unet)
    shallow.__dict__["_modules"] = dict(unet._modules)
    shallow.down_blocks = nn.ModuleList([WithoutSampler(unet.down_blocks[0])])
    shallow.mid_block = kept
    # The same block behind another module: the hook belongs to whole passes alone.
    shallow.up_blocks = nn.ModuleList([unhooked(unet.up_blocks[-1])])
    unet.up_blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
    return shallow


def unhooked(block: nn.Module) -> nn.Module:
    """Return a module with the same weights, whose hooks are its own."""
    other = copy.copy(block)
    other.__dict__["_forward_pre_hooks"] = type(block._forward_pre_hooks)()
    other.__dict__["_forward_pre_hooks_with_kwargs"] = type(block._forward_pre_hooks_with_kwargs)()
    return other
