"""The networks of an exported decoder, run by another engine than PyTorch."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import hash_file
from rebeca_ray.decoder.networks import DTYPES, Family, Network, Networks, Signature
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject


def exported_networks(
    settings: DecoderSettings,
    family: Family,
    description: JsonObject,
    load: Callable[[Path, str, Signature], Network],
) -> Networks:
    """Return the networks in `settings.engine_dir`; `load(folder, name, signature)` loads each.

    `description` is the folder's `decoder.json`, as `files.read_export` returns it. Raises InputError for a
    file that is not the exported one.
    """
    folder = Path(str(settings.engine_dir))
    # Exports from before checksums have none.
    for name, sha256 in description.get("sha256", {}).items():
        if hash_file(folder / name) != sha256:
            raise InputError(
                f"decoder.engine_dir {folder}: {name} is not the file that was exported, its sha256 differs; "
                "copy the whole folder again"
            )
    signatures = family.signatures(deep_cache=description["deep_cache"])
    networks = {name: load(folder, name, signature) for name, signature in signatures.items()}
    return Networks(
        family=family,
        encoders={name: networks[name] for name in family.encoders},
        unet=networks["unet"],
        shallow_unet=networks.get("shallow_unet"),
        vae_decoder=networks["vae_decoder"],
        tokenizers=family.load_tokenizers(folder),
        scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        embed_dim=description["embed_dim"],
        latent_channels=description["latent_channels"],
        image_size=description["image_size"],
        vae_scale_factor=description["vae_scale_factor"],
        device=settings.device,
        dtype=DTYPES[description["dtype"]],
        zeroes_negative=description.get("zeroes_negative", False),
    )


def check_names(path: Path, signature: Signature, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise InputError if a graph or an engine has other inputs or outputs than its network declares."""
    for kind, names, declared in (
        ("inputs", inputs, signature.inputs),
        ("outputs", outputs, signature.outputs),
    ):
        if set(names) != set(declared):
            raise InputError(
                f"{path}: {kind} {', '.join(sorted(names))}; expected {', '.join(sorted(declared))}; "
                "export it again"
            )
