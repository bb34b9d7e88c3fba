"""Inspect a Stable Diffusion model by its headers: is it whole, and of the kind that we run?"""

from pathlib import Path
from typing import Any

from rebeca_ray.decoder.headers import Part, find_weights, read_json_file, read_part
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject

USED_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # a model may have them
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
GIVE = "give a text-to-image model of Stable Diffusion 1.x or 2.x"
VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
# Settings of a UNet that need inputs we do not have.
FOREIGN = {
    "addition_embed_type": "SDXL",
    "class_embed_type": "an upscaler or unCLIP",
    "encoder_hid_dim_type": "a model with other conditioning",
    "time_cond_proj_dim": "a distilled model with an embedded guidance",
}


def inspect_model(name: str, folder: Path, *, own_vae: bool) -> tuple[Part, Part]:
    """Return the UNet and the text encoder of a model. With `own_vae`, its autoencoder is inspected too.

    `name` is `decoder.model` in errors. Raises InputError for a model that is not whole, or of another kind.
    """
    what = f"decoder.model {name}"
    index = read_json_file(what, folder / "model_index.json")
    kind = class_of(index)
    check_parts(what, folder, index, USED_PARTS if own_vae else tuple(p for p in USED_PARTS if p != "vae"))
    unet, text_encoder = read_part(what, folder / "unet"), read_part(what, folder / "text_encoder")
    check_unet(what, unet, kind)
    check_text_encoder(what, text_encoder, unet)
    read_json_file(what, folder / "scheduler" / "scheduler_config.json")
    check_tokenizer(what, folder / "tokenizer")
    if own_vae:
        check_vae(what, read_part(what, folder / "vae"), unet)
    return unet, text_encoder


def check_parts(what: str, folder: Path, index: JsonObject, needed: tuple[str, ...]) -> None:
    """Raise InputError for a model with other parts than ours, or without one of ours."""
    kind = class_of(index)
    # A part is listed as [library, class], and as [null, null] if it is left out.
    parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    if others := sorted(parts - {*USED_PARTS, *UNUSED_PARTS}):
        raise InputError(
            f"{what}: is a {kind} with {', '.join(others)}; expected a StableDiffusionPipeline; {GIVE}"
        )
    for part in needed:
        if not (folder / part).is_dir():
            near = sorted(path.name for path in folder.glob(f"{part}*") if path.is_dir())
            remedy = f"rename {near[0]}, or copy the whole model" if near else "copy the whole model"
            raise InputError(f"{what}: is a {kind} without {part}; expected {', '.join(needed)}; {remedy}")


def class_of(index: JsonObject) -> str:
    """Return the class that a `model_index.json` names."""
    return str(index.get("_class_name", "pipeline without a class"))


def check_unet(what: str, unet: Part, kind: str) -> None:
    """Raise InputError for a UNet that needs other inputs than latents, timestep, text and image tokens."""
    config = unet.config
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise InputError(
            f"{what}: unet is a {config['_class_name']}; expected a UNet2DConditionModel; {GIVE}"
        )
    for key, base in FOREIGN.items():
        if config.get(key) is not None:
            raise InputError(f"{what}: unet has {key} {config[key]}, as {base} has; expected none; {GIVE}")
    latents = config.get("in_channels", 4), config.get("out_channels", 4)
    if latents != (4, 4):
        raise InputError(
            f"{what}: unet has in_channels {latents[0]} and out_channels {latents[1]}, it is of a {kind}; "
            f"expected 4 of each: models for inpainting, depth or editing read more; {GIVE}"
        )
    require_tensor(what, unet, "conv_in.weight", {1: 4})
    require_tensor(what, unet, "conv_out.weight", {0: 4})
    width = cross_width(unet)
    if type(width) is not int:
        raise InputError(
            f"{what}: unet has cross_attention_dim {width}; expected a whole number; copy the whole model"
        )
    for name in cross_attentions(unet):
        require_tensor(what, unet, f"{name}.to_k.weight", {1: width})


def check_text_encoder(what: str, text_encoder: Part, unet: Part) -> None:
    """Raise InputError for a text encoder other than CLIP's, or of another width than the UNet."""
    kind = str(text_encoder.config.get("model_type", "clip_text_model"))
    if not kind.startswith("clip"):
        raise InputError(f"{what}: text_encoder is a {kind}; expected a CLIP text model; {GIVE}")
    ends = "token_embedding.weight"
    tokens = next((shape for name, shape in text_encoder.shapes.items() if name.endswith(ends)), ())
    width = cross_width(unet)
    if tokens[1:] != (width,):
        actual = tokens[1] if len(tokens) == 2 else "unknown"
        raise InputError(
            f"{what}: text_encoder has the width {actual}, the unet reads {width}{base_of(width)}; "
            "expected the same; copy both from one model"
        )


def check_tokenizer(what: str, folder: Path) -> None:
    """Raise InputError for a tokenizer without its words."""
    names = {path.name for path in folder.glob("*")}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(
            f"{what}: tokenizer has {', '.join(sorted(names)) or 'no files'}; expected tokenizer.json, "
            "or vocab.json and merges.txt; copy the whole model"
        )


def check_vae(what: str, vae: Part, unet: Part) -> None:
    """Raise InputError for an autoencoder that does not read the UNet's latents."""
    kind, channels = vae.config.get("_class_name", VAES[0]), vae.config.get("latent_channels", 4)
    if kind not in VAES:
        raise InputError(f"{what}: the autoencoder is a {kind}; expected {' or '.join(VAES)}; {GIVE}")
    expected = unet.config.get("in_channels", 4)
    if channels != expected:
        raise InputError(
            f"{what}: the autoencoder has {channels} latent channels; expected {expected}, as the unet has; "
            "give the autoencoder of a Stable Diffusion 1.x or 2.x"
        )
    if not any(name.startswith("decoder.") for name in vae.shapes):
        raise InputError(
            f"{what}: the autoencoder's weights have no decoder; expected those of a {kind}; copy it again"
        )


def inspect_vae(name: str, folder: Path, model: Path, unet: Part) -> None:
    """Raise InputError for a replacement of the autoencoder that does not fit the model."""
    what = f"decoder.vae {name}"
    if (folder / "model_index.json").is_file():
        raise InputError(f"{what}: is a whole model; expected an autoencoder; give {name}/vae")
    if not folder.is_dir():
        raise InputError(
            f"{what}: no such folder; expected an autoencoder in diffusers' layout; give another path"
        )
    vae = read_part(what, folder)
    check_vae(what, vae, unet)
    # Latents of another base have another scale: the autoencoder would draw nonsense of them.
    replaced = model / "vae" / "config.json"
    scales = [scale_of(vae.config), scale_of(read_json_file(what, replaced)) if replaced.is_file() else None]
    if None not in scales and scales[0] != scales[1]:
        raise InputError(
            f"{what}: has the scaling_factor {scales[0]}, the model's autoencoder has {scales[1]}; "
            "expected the same; give an autoencoder of the same base as the model"
        )


def scale_of(config: JsonObject) -> float | None:
    """Return the scale of an autoencoder's latents; None for a small one, which scales them itself."""
    return config.get("scaling_factor", 0.18215) if config.get("_class_name", VAES[0]) == VAES[0] else None


def inspect_safety_checker(name: str, folder: Path) -> None:
    """Raise InputError for a model without its safety checker."""
    what = "decoder.safety.checker stable-diffusion"
    for part, file in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        if not (folder / part / file).is_file():
            raise InputError(f"{what}: {name} has no {part}/{file}; give module:function, or set it to null")
    find_weights(what, folder / "safety_checker")


def cross_width(unet: Part) -> int:
    """Return the width of the text and image tokens that a UNet reads."""
    width: Any = unet.config.get("cross_attention_dim", 1280)
    return width[0] if isinstance(width, list) and width else width


def base_of(width: int) -> str:
    """Return the base with tokens of a width, in parentheses; "" for a base without a name."""
    return f" ({BASES[width]})" if width in BASES else ""


def cross_attentions(unet: Part) -> list[str]:
    """Return the names of the attentions that read tokens, in the order of IP-Adapter: down, up, middle."""
    blocks, ends = ("down_blocks", "up_blocks", "mid_block"), ".attn2.to_k.weight"
    names = [name.removesuffix(".to_k.weight") for name in unet.shapes if name.endswith(ends)]

    def order(name: str) -> tuple[int, list[int]]:
        return blocks.index(name.partition(".")[0]), [int(part) for part in name.split(".") if part.isdigit()]

    return sorted((name for name in names if name.startswith(blocks)), key=order)


def require_tensor(what: str, part: Part, name: str, sizes: dict[int, int]) -> None:
    """Raise InputError if a part has no such tensor, or one of other sizes than its config says."""
    shape = part.shapes.get(name)
    if shape is None:
        first = ", ".join(sorted(part.shapes)[:2])
        raise InputError(
            f"{what}: {part.folder.name} has no {name}, it has {first or 'no tensors'} …; expected the "
            "weights of a diffusers model; save them again with diffusers"
        )
    if any(shape[axis : axis + 1] != (size,) for axis, size in sizes.items()):
        raise InputError(
            f"{what}: {part.folder.name} has {name} of shape {list(shape)}, its config.json says "
            f"{', '.join(str(size) for size in sizes.values())}; expected weights and config of one model; "
            "copy the whole model"
        )
