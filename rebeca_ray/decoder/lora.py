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
LORA_PARTS = ("unet", "text_encoder", "text_encoder_2")  # the networks that a LoRA may change
# Layers without a prefix are the UNet's.
PREFIXES = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "base_model.model.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
}
# Kohya writes the layers of SDXL's UNet in the names of its authors' code.
LDM_LAYERS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
LDM_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)")
LDM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
RESNETS = r"down_blocks\.0\.resnets\.\d+\.conv1\.weight"  # their number is the depth of a UNet's blocks
GIVE = "give a plain LoRA of the model's base"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a LoRA: the weight that it changes, and the keys of its tensors."""

    weight: str  # the network, a dot, and the name in that network
    down: str  # [R, I, …]
    up: str  # [O, R, …]
    alpha: str | None  # the layer is scaled by alpha / R; without an alpha by 1


def match_layers(what: str, lora: Shapes, model: Mapping[str, Shapes]) -> list[Layer]:
    """Return the layers of a LoRA for a model, given by its networks among `LORA_PARTS`.

    Raises InputError, naming `what`, if one of its tensors has no place.
    """
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
    shapes = {f"{part}.{name}": shape for part, tensors in model.items() for name, shape in tensors.items()}
    weights = {
        f"{part}.{flat(name).removeprefix('text_model_')}": f"{part}.{name}"
        for part, tensors in model.items()
        for name in tensors
    }
    depth = len([name for name in model["unet"] if re.fullmatch(RESNETS, name)])
    layers = []
    for layer, sides in keys.items():
        weight = weights.get(f"{target_of(layer, depth)}_weight")
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


def target_of(layer: str, depth: int) -> str:
    """Return the network and the layer that a LoRA's layer changes, with underscores for dots."""
    # Attention processors once held the LoRA, and `to_out` stood for its first layer.
    layer = layer.replace(".processor.", ".")
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
    part, name = PREFIXES.get(prefix, "unet"), flat(layer.removeprefix(prefix))
    if part != "unet":
        return f"{part}.{name.removeprefix('text_model_')}"
    name = from_ldm(name, depth)
    return f"unet.{name}_0" if name.endswith("_to_out") else f"unet.{name}"


def from_ldm(name: str, depth: int) -> str:
    """Return diffusers' name of a UNet's layer for the name in its authors' code; other names stay.

    `depth` is the number of residual layers per block. The authors number all of them in one row.
    """
    match = LDM_BLOCK.fullmatch(name)
    if name in LDM_LAYERS or match is None:
        return LDM_LAYERS.get(name, name)
    blocks, index, kind, rest = match[1], int(match[2]), match[3], match[4]
    rest = LDM_RESNET.get(rest, rest)
    if blocks == "middle_block":
        inner = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}.get(index)
        return f"mid_block_{inner}_{rest}"
    way = "down" if blocks == "input_blocks" else "up"
    block, layer = divmod(index - 1 if way == "down" else index, depth + 1)
    if rest == "conv" and layer == depth:  # a change of resolution comes last in its block
        return f"{way}_blocks_{block}_{way}samplers_0_{rest}"
    inner = {"0": f"resnets_{layer}", "1": f"attentions_{layer}"}.get(kind)
    return f"{way}_blocks_{block}_{inner}_{rest}" if inner else name


def flat(name: str) -> str:
    """Return a name with underscores for its dots, as kohya writes it."""
    return name.replace(".", "_")


def words(shape: tuple[int, ...]) -> str:
    """Return a shape as an error shows it."""
    return " x ".join(map(str, shape)) or "a single number"


def inspect_lora(what: str, file: Path, model: Mapping[str, Shapes]) -> None:
    """Raise InputError, naming `what`, for a LoRA that does not fit the model, by its header alone."""
    match_layers(what, read_shapes(what, file), model)


@torch.no_grad()
def merge_lora(what: str, file: Path, model: Mapping[str, nn.Module]) -> None:
    """Add a LoRA to the weights of a model (Hu et al. 2021, eq. 3), given by its networks.

    Raises InputError, naming `what`, for a LoRA that does not fit.
    """
    tensors = load_file(file)
    weights = {part: dict(network.named_parameters()) for part, network in model.items()}
    parameters = {f"{part}.{name}": value for part in weights for name, value in weights[part].items()}
    shapes = {part: shapes_of(named) for part, named in weights.items()}
    layers = match_layers(what, shapes_of(tensors), shapes)
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
