"""Inspect a Stable Diffusion model by its headers: is it whole, and of the kind that we run?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rebeca_ray.decoder.headers import Part, find_weights, read_json_file, read_part
from rebeca_ray.decoder.single_file.kinds import SIGLIP
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject

# The parts that a family runs; `family_of` names the families.
USED_PARTS = {
    "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TIME_IDS = 6  # of SDXL: two each of original size, cut and target size
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # a model may have them
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
EXPECTED = "expected a StableDiffusionPipeline or a StableDiffusionXLPipeline"
REMEDY = "bundled, module:function, or none"  # where a model has no safety checker
GIVE = "give a text-to-image model of Stable Diffusion 1.x, 2.x or XL"
# Models that one pooled embedding cannot steer, by the start of their class.
UNREADABLE = {
    "Flux": SIGLIP,
    "StableDiffusion3": SIGLIP,
    "Kolors": "its image adapters read patch tokens of CLIP",
}
VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
# Settings of a UNet that need inputs we do not have.
FOREIGN = {
    "addition_embed_type": "SDXL",
    "class_embed_type": "an upscaler or unCLIP",
    "encoder_hid_dim_type": "a model with other conditioning",
    "time_cond_proj_dim": "a distilled model with an embedded guidance",
}


def family_of(name: str, folder: Path) -> Literal["sd", "sdxl"]:
    """Return the family of a model by the class and the parts that it lists.

    `name` is `decoder.model` in errors. Raises InputError without a list of parts.
    """
    index = read_json_file(f"decoder.model {name}", folder / "model_index.json")
    is_xl = class_of(index).startswith("StableDiffusionXL") or "text_encoder_2" in listed_parts(index)
    return "sdxl" if is_xl else "sd"


def zeroes_negative(folder: Path) -> bool:
    """Return whether a model of SDXL reads zeros in place of an empty negative prompt; most do."""
    index = read_json_file("decoder.model", folder / "model_index.json")
    return bool(index.get("force_zeros_for_empty_prompt", True))


def inspect_model(
    name: str, folder: Path, *, own_vae: bool, checkpoint: Path | None = None
) -> dict[str, Part]:
    """Return the UNet and the text encoders of a model by name. `own_vae` inspects its autoencoder too.

    The weights of a single file lie in `checkpoint`, and its configs in `folder`. `name` is `decoder.model`
    in errors. Raises InputError for a model that is not whole, or of another kind.
    """
    what = f"decoder.model {name}"

    def read(part: str) -> Part:
        path = folder / part
        if checkpoint is None:
            return read_part(what, path)
        from rebeca_ray.decoder.single_file.networks import read_network  # it loads torch

        return read_network(what, checkpoint, path)

    index, family = read_json_file(what, folder / "model_index.json"), family_of(name, folder)
    kind = class_of(index)
    needed = tuple(part for part in USED_PARTS[family] if own_vae or part != "vae")
    check_kind(what, index, needed)
    check_parts(what, folder, index, needed)
    networks = {part: read(part) for part in ("unet", *TEXT_ENCODERS) if part in needed}
    unet = networks["unet"]
    check_unet(what, unet, kind, family)
    check_text_encoders(what, {part: networks[part] for part in TEXT_ENCODERS if part in needed}, unet)
    if family == "sdxl":
        check_added_inputs(what, unet, networks["text_encoder_2"])
    check_scheduler(what, read_json_file(what, folder / "scheduler" / "scheduler_config.json"))
    for part in ("tokenizer", "tokenizer_2"):
        if part in needed:
            check_tokenizer(what, folder / part)
    if own_vae:
        check_vae(what, read("vae"), unet)
    return networks


def listed_parts(index: JsonObject) -> set[str]:
    """Return the parts in a `model_index.json`: [library, class], or [null, null] for a part left out."""
    return {key for key, value in index.items() if isinstance(value, list) and value and value[0]}


def check_kind(what: str, index: JsonObject, needed: tuple[str, ...]) -> None:
    """Raise InputError for a model that is no Stable Diffusion, or has other parts than ours."""
    kind = class_of(index)
    for start, reason in UNREADABLE.items():
        if kind.startswith(start):
            raise InputError(f"{what}: is a {kind}: {reason}, an item has one embedding; {EXPECTED}; {GIVE}")
    if index.get("requires_aesthetics_score"):
        raise InputError(
            f"{what}: is the SDXL refiner, which reads an aesthetics score; {EXPECTED}; give its base model"
        )
    if others := sorted(listed_parts(index) - {*needed, "vae", *UNUSED_PARTS}):
        raise InputError(f"{what}: is a {kind} with {', '.join(others)}; {EXPECTED}; {GIVE}")


def check_parts(what: str, folder: Path, index: JsonObject, needed: tuple[str, ...]) -> None:
    """Raise InputError for a model without one of its parts."""
    kind = class_of(index)
    for part in needed:
        if not (folder / part).is_dir():
            near = sorted(path.name for path in folder.glob(f"{part}*") if path.is_dir())
            remedy = f"rename {near[0]}, or copy the whole model" if near else "copy the whole model"
            raise InputError(f"{what}: is a {kind} without {part}; expected {', '.join(needed)}; {remedy}")


def class_of(index: JsonObject) -> str:
    """Return the class that a `model_index.json` names."""
    return str(index.get("_class_name", "pipeline without a class"))


def check_unet(what: str, unet: Part, kind: str, family: str) -> None:
    """Raise InputError for a UNet that needs other inputs than those of its family."""
    config = unet.config
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise InputError(
            f"{what}: unet is a {config['_class_name']}; expected a UNet2DConditionModel; {GIVE}"
        )
    for key, base in FOREIGN.items():
        if config.get(key) is not None and not (family == "sdxl" and key == "addition_embed_type"):
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


def check_text_encoders(what: str, encoders: Mapping[str, Part], unet: Part) -> None:
    """Raise InputError for a text encoder other than CLIP's, or encoders of another width than the UNet."""
    widths: list[int | None] = []
    for part, encoder in encoders.items():
        kind = str(encoder.config.get("model_type", "clip_text_model"))
        if not kind.startswith("clip"):
            raise InputError(f"{what}: {part} is a {kind}; expected a CLIP text model; {GIVE}")
        ends = "token_embedding.weight"
        tokens = next((shape for name, shape in encoder.shapes.items() if name.endswith(ends)), ())
        widths.append(tokens[1] if len(tokens) == 2 else None)
    width = cross_width(unet)
    if None in widths or sum(actual or 0 for actual in widths) != width:
        actual = " + ".join(str(actual or "unknown") for actual in widths)
        raise InputError(
            f"{what}: {' + '.join(encoders)} has the width {actual}, the unet reads {width}{base_of(width)}; "
            "expected the same; copy all of them from one model"
        )


def check_added_inputs(what: str, unet: Part, text_encoder: Part) -> None:
    """Raise InputError for a UNet that reads other things beside its tokens than pooled text and time ids."""
    kind, size = unet.config.get("addition_embed_type"), unet.config.get("addition_time_embed_dim")
    if kind != "text_time" or type(size) is not int:
        raise InputError(
            f"{what}: unet has addition_embed_type {kind} and addition_time_embed_dim {size}; expected "
            "text_time and a whole number, as SDXL has; copy the whole model"
        )
    require_tensor(what, text_encoder, "text_projection.weight", {})
    pooled = next(iter(text_encoder.shapes["text_projection.weight"]), 0)
    require_tensor(what, unet, "add_embedding.linear_1.weight", {})
    read = unet.shapes["add_embedding.linear_1.weight"][1:]
    if read != (pooled + TIME_IDS * size,):
        raise InputError(
            f"{what}: unet reads {', '.join(map(str, read)) or 'no'} numbers beside its tokens; expected "
            f"{pooled} of text_encoder_2 and {TIME_IDS} time ids of {size} each; {GIVE}"
        )


def check_scheduler(what: str, config: JsonObject) -> None:
    """Raise InputError for the scheduler of a model that counts noise in sigmas alone."""
    if (kind := str(config.get("_class_name"))).startswith("EDM"):
        raise InputError(
            f"{what}: scheduler is a {kind}, as Playground v2.5 has; expected one with timesteps; {GIVE}"
        )


def check_tokenizer(what: str, folder: Path) -> None:
    """Raise InputError for a tokenizer without its words."""
    names = {path.name for path in folder.glob("*")}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(
            f"{what}: {folder.name} has {', '.join(sorted(names)) or 'no files'}; expected tokenizer.json, "
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
            "give the autoencoder of a Stable Diffusion 1.x, 2.x or XL"
        )
    if vae.config.get("latents_mean") is not None:
        raise InputError(
            f"{what}: the autoencoder has latents_mean {vae.config['latents_mean']}, as Playground v2.5 has; "
            "expected none; give the autoencoder of a Stable Diffusion 1.x, 2.x or XL"
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
            raise InputError(f"{what}: {name} has no {part}/{file}; give {REMEDY}")
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
