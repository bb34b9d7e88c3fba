"""Read the JSON of a decoder's folders, and the headers of its safetensors. No weight is loaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject

Shapes = dict[str, tuple[int, ...]]  # of every tensor, by name
SHARD = r"-\d{5}-of-\d{5}"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a model: its `config.json`, and the names and shapes of its weights."""

    folder: Path
    config: JsonObject
    shapes: Shapes


def read_part(what: str, folder: Path) -> Part:
    """Return a network's part. Raises InputError, naming `what`, for files that are missing or damaged."""
    config = read_json_file(what, folder / "config.json")
    shapes: Shapes = {}
    for file in find_weights(what, folder)[0]:
        shapes |= read_shapes(what, file)
    return Part(folder=folder, config=config, shapes=shapes)


def read_json_file(what: str, path: Path) -> JsonObject:
    """Return a JSON object. Raises InputError, naming `what`, if there is none."""
    name = f"{path.parent.name}/{path.name}"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{what}: has no {name}; expected a whole diffusers model; copy it again") from None
    except (OSError, ValueError):  # text that is not UTF-8 is a ValueError
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{what}: {name} is damaged; expected a JSON object; copy it again")
    return values


def read_shapes(what: str, path: Path) -> Shapes:
    """Return the shape of every tensor of a file. Raises InputError, naming `what`, for a damaged file."""
    try:
        with safe_open(path, framework="numpy") as weights:
            names = weights.keys()
            return {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError):
        raise InputError(
            f"{what}: {path.parent.name}/{path.name} is damaged or missing; expected a whole safetensors "
            "file; copy it again"
        ) from None


def find_weights(what: str, folder: Path) -> tuple[list[Path], str | None]:
    """Return the weight files of a part, and their variant, such as `fp16`; None for the plain one.

    Raises InputError, naming `what`, for weights that are missing, pickles alone, or of several variants.
    """
    names = sorted(path.name for path in folder.glob("*"))
    stem = next((name for name in names if re.match(r"(diffusion_pytorch_)?model\b", name)), "model")
    stem = stem.partition(".")[0].partition("-")[0]
    # Variants by name; the plain weights are the variant "".
    variants: dict[str, list[str]] = {}
    for name in names:
        if match := re.fullmatch(rf"{stem}(?:\.([^.]+))?\.safetensors", name):
            if not re.search(rf"{SHARD}$", name.removesuffix(".safetensors")):
                variants[match[1] or ""] = [name]
        elif match := re.fullmatch(rf"{stem}\.safetensors\.index(?:\.([^.]+))?\.json", name):
            variants.setdefault(match[1] or "", shards_of(what, folder / name))
    if not variants:
        raise missing_weights(what, folder, names)
    chosen = "" if "" in variants else next(iter(variants))
    if chosen and len(variants) > 1:
        raise InputError(
            f"{what}: {folder.name} has the variants {', '.join(variants)}; expected one, or plain weights; "
            "remove the others"
        )
    return [folder / name for name in variants[chosen]], chosen or None


def shards_of(what: str, index: Path) -> list[str]:
    """Return the file names in the index of a sharded part."""
    files = read_json_file(what, index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(
            f"{what}: {index.parent.name}/{index.name} is damaged; expected a weight_map; copy it again"
        )
    return sorted(set(files.values()))


def missing_weights(what: str, folder: Path, names: list[str]) -> InputError:
    """Return the error for a part without safetensors."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        path = folder / pickles[0]
        return InputError(
            f"{what}: {folder.name} has pickles alone ({pickles[0]}), which can run code; "
            "expected safetensors; "
            f"convert it: rebeca convert {path} {path.with_name(safetensors_name(pickles[0]))}"
        )
    return InputError(
        f"{what}: {folder.name} has no weights; expected a .safetensors file; copy the whole model"
    )


def safetensors_name(pickle: str) -> str:
    """Return the name of a part's weights as safetensors: `pytorch_model.bin` becomes `model.safetensors`."""
    stem = pickle.rpartition(".")[0]
    return f"{'model' if stem == 'pytorch_model' else stem}.safetensors"
