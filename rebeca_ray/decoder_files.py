"""The files of a decoder, read without loading it: where its IP-Adapter is, which D that reads, a fingerprint of all."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from rebeca_ray.config import DecoderSettings
from rebeca_ray.errors import UserError


def adapter_location(settings: DecoderSettings) -> tuple[str, str, str]:
    """`(repository, subfolder, file)` of the IP-Adapter. Raises UserError for a pickle or a file that is not there."""
    repo = settings.ip_adapter_repo or settings.model
    folder, _, file = settings.ip_adapter.rpartition("/")
    if not file.endswith(".safetensors"):
        raise UserError(f"decoder.ip_adapter {settings.ip_adapter}: a pickle can run code when loaded; give the .safetensors file")
    if settings.model.startswith(("/", ".")) and not (Path(settings.model) / "model_index.json").is_file():
        raise UserError(
            f"decoder.model {settings.model}: no model_index.json there; give a diffusers directory, or a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    if Path(repo).is_dir() and not (Path(repo) / folder / file).is_file():
        raise UserError(
            f"decoder.ip_adapter {settings.ip_adapter}: no such file in {repo}; set decoder.ip_adapter or decoder.ip_adapter_repo"
        )
    return repo, folder, file


def decoder_embed_dim(settings: DecoderSettings) -> int:
    """D of the IP-Adapter, read from its header; from a hub the file is fetched once, before every actor asks for it.

    Raises UserError if it is not there, damaged, or an adapter that reads more than one global embedding.
    """
    repo, folder, file = adapter_location(settings)
    path = Path(repo) / folder / file
    if not path.is_file():
        try:
            path = Path(hf_hub_download(repo, file, subfolder=folder or None))
        except (OSError, ValueError) as error:  # what the hub's client raises derives from one or the other
            raise UserError(
                f"decoder.ip_adapter {settings.ip_adapter}: cannot be fetched from {repo} ({' '.join(str(error).split())[:200]}); "
                f"run `hf download {repo} {settings.ip_adapter}` where there is a network, or set ip_adapter_repo to a local directory"
            ) from None
    try:
        with safe_open(path, framework="numpy") as weights:
            return int(weights.get_slice("image_proj.proj.weight").get_shape()[1])
    except SafetensorError as error:
        raise UserError(
            f"decoder.ip_adapter {settings.ip_adapter}: no image_proj.proj.weight to read ({error}); give a plain adapter such as "
            "ip-adapter_sd15.safetensors: those called plus, full or faceid read other embeddings"
        ) from None


def decoder_fingerprint(settings: DecoderSettings) -> str:
    """16 hex digits that change whenever the decoder would draw something else: settings, and weights if local."""
    told = settings.model_dump(
        exclude={"batch_size", "num_actors", "cpus_per_actor", "device", "thumbnail_size", "model", "ip_adapter_repo"}
    )
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for repo in (settings.model, settings.ip_adapter_repo):
        folder = Path(repo) if repo else None
        if folder is None or not folder.is_dir():
            digest.update((repo or "").encode())
            continue
        for file in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
            digest.update(str(file.relative_to(folder)).encode())
            with file.open("rb") as weights:
                digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:16]
