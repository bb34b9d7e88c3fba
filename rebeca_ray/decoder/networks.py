"""The networks of a decoder, as plain functions of tensors: the same to every engine.

    encoders          named by the family          -> tensors of the conditioning, once per batch
    unet              latents_BCYX, timestep_B, and the conditioning in the family's order -> predicted_BCYX
    vae_decoder       latents_BCYX                 -> pixels_BRYX in [-1, 1]

With `cache_interval` (DeepCache), the UNet returns predicted_BCYX and deep_BCYX, the features for

    shallow_unet      the inputs of unet, and deep_BCYX                                  -> predicted_BCYX

A `Family` says how such networks are loaded and called. Each module in `families/` declares one.

Shapes: B batch, C latent channels, R red green blue, Y X pixels or latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.conditioning import Conditioning
from rebeca_ray.decoder.interface import Rows

# A quantised graph takes and returns float32.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}
Network = Callable[..., Any]  # tensors in; one tensor out, or a tuple where the signature has several outputs
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The names of a network's tensors, in call order. Guidance doubles the batch of a `doubled` network."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    doubled: bool = False


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The loaded networks of one decoder, and the sizes that the denoising loop needs."""

    family: "Family"
    encoders: Mapping[str, Network]
    unet: Network
    vae_decoder: Network
    tokenizers: Mapping[str, Any]
    scheduler_config: dict[str, Any]
    embed_dim: int
    latent_channels: int
    image_size: int  # pixels per side
    vae_scale_factor: int
    device: str
    dtype: torch.dtype
    shallow_unet: Network | None = None  # for the steps between whole passes; `unet` then returns a pair
    deep_channels: int = 0  # of the features that `shallow_unet` takes; read for an export alone
    zeroes_negative: bool = False  # an empty negative prompt has zeros in place of its text

    def by_name(self) -> dict[str, Network]:
        """Return every network under its name in `Family.signatures`."""
        shallow = {"shallow_unet": self.shallow_unet} if self.shallow_unet else {}
        return {**self.encoders, "unet": self.unet, "vae_decoder": self.vae_decoder, **shallow}

    def condition(self, rows: Rows, *, guided: bool = False) -> Conditioning:
        """Return the conditioning of `rows`. With `guided`, the same number of unconditional rows follows."""
        return self.family.condition(self, rows, guided)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models that are loaded, conditioned and exported alike."""

    name: str  # in `decoder.json` of an export
    encoders: Mapping[str, Signature]  # the networks that run once per batch
    conditioning: tuple[str, ...]  # the inputs of the UNet after latents and timestep, in call order
    load_networks: Callable[[DecoderSettings], Networks]  # run by PyTorch
    load_tokenizers: Callable[[Path], dict[str, Any]]  # from the folder of an export, by subfolder
    condition: Callable[[Networks, Rows, bool], Conditioning]  # as `Networks.condition`
    example_inputs: Callable[[Networks], dict[str, Tensors]]  # of every encoder, a batch of two

    def signatures(self, *, deep_cache: bool) -> dict[str, Signature]:
        """Return the signature of every network by name; with `deep_cache`, a shallow UNet is among them."""
        inputs, deep = ("latents", "timestep", *self.conditioning), ("deep",) if deep_cache else ()
        networks = {
            **self.encoders,
            "unet": Signature(inputs=inputs, outputs=("predicted", *deep), doubled=True),
            "vae_decoder": Signature(inputs=("latents",), outputs=("pixels",)),
        }
        if deep_cache:
            shallow = Signature(inputs=(*inputs, *deep), outputs=("predicted",), doubled=True)
            networks["shallow_unet"] = shallow
        return networks
