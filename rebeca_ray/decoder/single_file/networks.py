"""The networks of a single file in diffusers' names: their shapes by its header, and their weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rebeca_ray.decoder.headers import Part, Shapes, read_json_file, read_shapes
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject


def read_network(what: str, checkpoint: Path, folder: Path) -> Part:
    """Return a network of a single file by its header; `folder` has its config, and is named as its part.

    Raises InputError, naming `what`, if the file has other tensors than the config says.
    """
    config = read_json_file(what, folder / "config.json")
    tensors = {
        name: torch.empty(shape, device="meta") for name, shape in read_shapes(what, checkpoint).items()
    }
    try:
        shapes = shapes_of(convert(folder.name, tensors, config))
        expected = shapes_of(empty_network(folder, config).state_dict())
    except Exception as error:  # diffusers and transformers raise errors of any type
        raise misfit(what, folder, f"does not fit it ({type(error).__name__})") from None
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            actual = " x ".join(map(str, shapes[name])) if name in shapes else "no tensor"
            raise misfit(what, folder, f"has {name} as {actual}, and not {' x '.join(map(str, shape))}")
    return Part(folder=folder, config=config, shapes=shapes)


def misfit(what: str, folder: Path, reason: str) -> InputError:
    """Return the error for a single file and a config of other sizes."""
    return InputError(
        f"{what}: {folder.name} {reason}; expected the network of {folder / 'config.json'}; "
        "put the configs of this model beside it"
    )


def convert(part: str, tensors: dict[str, torch.Tensor], config: JsonObject) -> dict[str, torch.Tensor]:
    """Return the tensors of a part in diffusers' names and shapes."""
    from diffusers.loaders import single_file_utils as diffusers

    if part == "unet":
        return diffusers.convert_ldm_unet_checkpoint(tensors, config)
    if part == "vae":
        return diffusers.convert_ldm_vae_checkpoint(tensors, config)
    if part == "text_encoder":
        return diffusers.convert_ldm_clip_checkpoint(tensors)
    return diffusers.convert_open_clip_checkpoint(None, tensors, prefix="conditioner.embedders.1.model.")


def shapes_of(tensors: dict[str, torch.Tensor]) -> Shapes:
    """Return the shapes of tensors by name; CLIP's names are the same in each version of transformers."""
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in tensors.items()}


def network_class(part: str) -> Any:
    """Return the class of a part."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }[part]


def empty_network(folder: Path, config: JsonObject) -> Any:
    """Return the network of a config, without memory for its weights."""
    kind = network_class(folder.name)
    with torch.device("meta"):
        if folder.name.startswith("text_encoder"):
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(config)


def load_network(checkpoint: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Load a network of a single file, which `read_network` has read."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    kind, tensors, configs = network_class(folder.name), load_file(checkpoint), str(folder.parent)
    if folder.name.startswith("text_encoder"):
        return create_diffusers_clip_model_from_ldm(
            kind, tensors, folder.name, configs, torch_dtype=dtype, local_files_only=True
        )
    return kind.from_single_file(
        tensors, config=configs, subfolder=folder.name, dtype=dtype, local_files_only=True
    )
