"""A LoRA: match its layers with the weights of a model, by name and shape, and merge them.

Kohya, peft and diffusers write the same layer in other names. A layer without its weight is refused: a file
that is named in a config has its whole effect, or none is drawn.

Shapes: R rank, I inputs and O outputs of a layer; a convolution has a kernel behind them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from rebeca_ray.decoder.headers import Shapes, read_shapes
from rebeca_ray.errors import InputError

KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.default)?\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
UNET_PREFIXES = ("lora_unet_", "unet.", "base_model.model.")
TEXT_PREFIXES = ("lora_te_", "lora_te1_", "text_encoder.")
GIVE = "give a plain LoRA of the model's base"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a LoRA: the weight that it changes, and the keys of its tensors."""

    weight: str  # `unet.` or `text.`, and the name in that network
    down: str  # [R, I, …]
    up: str  # [O, R, …]
    alpha: str | None  # the layer is scaled by alpha / R; without an alpha by 1


def match_layers(what: str, lora: Shapes, unet: Shapes, text_encoder: Shapes) -> list[Layer]:
    """Return the layers of a LoRA. Raises InputError, naming `what`, if one of its tensors has no place."""
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(lora):
        match = KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{what}: {key} is no part of a plain LoRA, perhaps of a DoRA, LoHa or LoKr; "
                f"expected pairs such as lora_down and lora_up; {GIVE}"
            )
        side = (
            match["kohya"] or match["diffusers"] or match["alpha"] or {"A": "down", "B": "up"}[match["peft"]]
        )
        keys.setdefault(match["layer"], {})[side] = key
    if not keys:
        raise InputError(f"{what}: holds no tensors; expected pairs such as lora_down and lora_up; {GIVE}")
    weights = {f"unet.{flat(name)}": f"unet.{name}" for name in unet}
    weights |= {
        f"text.{flat(name)}".replace("text.text_model_", "text."): f"text.{name}" for name in text_encoder
    }
    shapes = {f"unet.{name}": shape for name, shape in unet.items()}
    shapes |= {f"text.{name}": shape for name, shape in text_encoder.items()}
    layers = []
    for layer, sides in keys.items():
        weight = weights.get(f"{target_of(layer)}_weight")
        if weight is None:
            raise InputError(f"{what}: changes {layer}, which is no layer of the model; {GIVE}")
        if not {"down", "up"} <= sides.keys():
            raise InputError(
                f"{what}: {layer} has {' and '.join(sides)} alone; expected a down and an up; "
                "copy the file again"
            )
        if prod(lora.get(sides.get("alpha", ""), ())) != 1:
            raise InputError(f"{what}: {layer} has several alphas; expected one number; {GIVE}")
        check_shapes(f"{what}: {layer}", lora[sides["down"]], lora[sides["up"]], shapes[weight])
        layers.append(Layer(weight=weight, down=sides["down"], up=sides["up"], alpha=sides.get("alpha")))
    return layers


def check_shapes(where: str, down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> None:
    """Raise InputError if a layer does not fit its weight."""
    whole = len(down) == len(up) >= 2 and up[1] == down[0] > 0 and {*up[2:]} <= {1}
    # A linear layer may be written as a convolution of 1 x 1, and the other way round.
    same_kernel = whole and (down[2:] == weight[2:] or {*down[2:], *weight[2:]} <= {1})
    if not same_kernel or (up[0], down[1]) != weight[:2]:
        raise InputError(
            f"{where} has a down of {words(down)} and an up of {words(up)}; "
            f"the model's weight is {words(weight)}; {GIVE}"
        )


def target_of(layer: str) -> str:
    """Return the network and the layer that a LoRA's layer changes, with underscores for dots."""
    # Attention processors once held the LoRA, and `to_out` stood for its first layer.
    layer = layer.replace(".processor.", ".")
    text = next((prefix for prefix in TEXT_PREFIXES if layer.startswith(prefix)), None)
    if text:
        return f"text.{flat(layer.removeprefix(text)).removeprefix('text_model_')}"
    unet = next((prefix for prefix in UNET_PREFIXES if layer.startswith(prefix)), "")
    name = flat(layer.removeprefix(unet))
    return f"unet.{name}_0" if name.endswith("_to_out") else f"unet.{name}"


def flat(name: str) -> str:
    """Return a name with underscores for its dots, as kohya writes it."""
    return name.replace(".", "_")


def words(shape: tuple[int, ...]) -> str:
    """Return a shape as an error shows it."""
    return " x ".join(map(str, shape)) or "a single number"


def inspect_lora(what: str, file: Path, unet: Shapes, text_encoder: Shapes) -> None:
    """Raise InputError, naming `what`, for a LoRA that does not fit the model, by its header alone."""
    match_layers(what, read_shapes(what, file), unet, text_encoder)


@torch.no_grad()
def merge_lora(what: str, file: Path, unet: nn.Module, text_encoder: nn.Module) -> None:
    """Add a LoRA to the weights of a model (Hu et al. 2021, eq. 3)."""
    tensors = load_file(file)
    parameters = {f"unet.{name}": value for name, value in unet.named_parameters()}
    parameters |= {f"text.{name}": value for name, value in text_encoder.named_parameters()}
    layers = match_layers(
        what,
        shapes_of(tensors),
        shapes_of(dict(unet.named_parameters())),
        shapes_of(dict(text_encoder.named_parameters())),
    )
    for layer in layers:
        weight = parameters[layer.weight]
        # In the model's precision first, and multiplied in float32, as peft does it.
        down, up = (tensors[key].to(weight.dtype).float() for key in (layer.down, layer.up))
        alpha = float(tensors[layer.alpha]) if layer.alpha else len(down)
        delta = (up.flatten(1) @ down.flatten(1)).view_as(weight) * (alpha / len(down))
        weight.add_(delta.to(weight.dtype))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
