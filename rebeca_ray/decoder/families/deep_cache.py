"""DeepCache: between whole passes, only the outer blocks of a UNet run (Ma et al. 2024).

The features that enter the last up block change little from one step to the next. A whole pass returns them
beside its prediction. A shallow pass takes them in place of all blocks but the first down block and the last
up block. Both are plain functions of tensors, which an export writes as a graph each.

Shapes: B batch, C channels, E embedding of the time, Y X latents.
"""

import copy
from typing import Any

import torch
from torch import nn

from rebeca_ray.errors import InputError


class DeepInput(nn.Module):
    """In the place of the middle block: returns the features of a whole pass, last in the conditioning."""

    has_cross_attention = True  # so that the UNet passes the conditioning

    def forward(
        self,
        sample_BCYX: torch.Tensor,
        embedding_BE: torch.Tensor,
        encoder_hidden_states: tuple[torch.Tensor, ...],
        **unused: None,
    ) -> torch.Tensor:
        return encoder_hidden_states[-1]


class DeepOutput(nn.Module):
    """In the place of the last up block: this block and the layers after it; returns its input too."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.block = unet.up_blocks[-1]
        self.layers = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)
        self.has_cross_attention = getattr(self.block, "has_cross_attention", False)

    @property
    def resnets(self) -> nn.ModuleList:
        """Return the residual layers of the block; the UNet counts them."""
        return self.block.resnets

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers(self.block(hidden_states=hidden_states, **inputs)), hidden_states


def split_unet(unet: Any, name: str) -> tuple[Any, Any]:
    """Return a whole and a shallow UNet of diffusers, which share the weights of `unet`.

    The whole one returns `predicted_BCYX` and `deep_BCYX`. The shallow one expects `deep_BCYX` as the last
    tensor of the conditioning. Raises InputError for a model with a single block, naming `name`.
    """
    if len(unet.down_blocks) < 2 or unet.mid_block is None:
        raise InputError(
            f"decoder.cache_interval: the UNet of {name} has {len(unet.down_blocks)} down block; "
            "expected at least 2; set it to 1"
        )
    # The block in the last place runs these layers, so the UNet returns its pair as it is.
    whole = with_children(
        unet,
        up_blocks=nn.ModuleList([*unet.up_blocks[:-1], DeepOutput(unet)]),
        conv_norm_out=None,
        conv_out=nn.Identity(),
    )
    # The output of the downsampler is for deeper blocks alone.
    shallow = with_children(
        unet,
        down_blocks=nn.ModuleList([with_children(unet.down_blocks[0], downsamplers=None)]),
        mid_block=DeepInput(),
        up_blocks=nn.ModuleList([unet.up_blocks[-1]]),
    )
    return whole, shallow


def with_children(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """Return a copy of a module that shares its weights; `children` replace those of the same names."""
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    return other
