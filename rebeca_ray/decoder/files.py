"""The files of a decoder: found on disk or fetched from a hub, read without loading them, hashed. Never a pickle."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import Effect, fields_with
from rebeca_ray.errors import InputError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SAFETY_PARTS = ("safety_checker", "feature_extractor")
# A fingerprint hashes the weights at these locations instead.
LOCATIONS = fields_with(DecoderSettings, {Effect.CONTENT})
# These leave an image alike, but for rounding.
NOT_IN_FINGERPRINT = fields_with(DecoderSettings, set(Effect) - {Effect.ITEM, Effect.CONTENT})


@dataclass(frozen=True, kw_only=True)
class DecoderFiles:
    """Where everything is that a decoder is loaded from: directories in diffusers' layout, and single safetensors files."""

    model: Path
    ip_adapter: Path
    vae: Path | None = None
    lora: Path | None = None


def find_decoder(settings: DecoderSettings) -> DecoderFiles:
    """Find a decoder's files; those of a hub are fetched into its cache, once a machine.

    Raises UserError, with the command that fetches, for what is missing, and for pickles.
    """
    for key in ("ip_adapter", "lora"):
        file = getattr(settings, key)
        if file and file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            raise InputError(
                f"decoder.{key} {file}: a pickle can run code when loaded; give the .safetensors file, or make one of it: "
                f"rebeca convert {file} {file.rpartition('.')[0]}.safetensors"
            )
    return DecoderFiles(
        model=find_model(settings),
        ip_adapter=find_adapter(settings),
        vae=Path(settings.vae) if settings.vae and is_local(settings.vae) else fetch_vae(settings),
        lora=find_lora(settings),
    )


def find_model(settings: DecoderSettings) -> Path:
    """The folder in diffusers' layout."""
    if is_local(settings.model):
        if not (Path(settings.model) / "model_index.json").is_file():
            raise InputError(
                f"decoder.model {settings.model}: no model_index.json there; give a diffusers directory, or a hub id such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        return Path(settings.model)

    def fetch() -> str:
        from diffusers import StableDiffusionPipeline

        without = {} if settings.safety.checker == "stable-diffusion" else {"safety_checker": None}
        return StableDiffusionPipeline.download(
            settings.model, revision=settings.revision, use_safetensors=True, **without
        )

    return fetched("model", settings.model, settings.model, fetch)


def find_adapter(settings: DecoderSettings) -> Path:
    repo = settings.ip_adapter_repo or settings.model
    if is_local(repo):
        if not (Path(repo) / settings.ip_adapter).is_file():
            raise InputError(
                f"decoder.ip_adapter {settings.ip_adapter}: no such file in {repo}; set decoder.ip_adapter or decoder.ip_adapter_repo"
            )
        return Path(repo) / settings.ip_adapter
    return fetched(
        "ip_adapter",
        settings.ip_adapter,
        f"{repo} {settings.ip_adapter}",
        lambda: hf_hub_download(repo, settings.ip_adapter, revision=settings.ip_adapter_revision),
    )


def fetch_vae(settings: DecoderSettings) -> Path | None:
    if settings.vae is None:
        return None
    repo = settings.vae

    def fetch() -> str:
        hf_hub_download(repo, "diffusion_pytorch_model.safetensors")
        return str(Path(hf_hub_download(repo, "config.json")).parent)

    return fetched("vae", repo, repo, fetch)


def find_lora(settings: DecoderSettings) -> Path | None:
    lora = settings.lora
    if lora is None:
        return None
    if Path(lora).is_file() and lora.endswith(".safetensors"):
        return Path(lora)
    owner, _, rest = lora.partition("/")
    name, _, file = rest.partition("/")
    if is_local(lora) or not file.endswith(".safetensors"):
        raise InputError(
            f"decoder.lora {lora}: no such .safetensors file; give a path, or owner/name/file.safetensors of a hub"
        )
    return fetched("lora", lora, f"{owner}/{name} {file}", lambda: hf_hub_download(f"{owner}/{name}", file))


def is_local(name: str) -> bool:
    """Whether a model's name is a folder on this machine, there or not, rather than a hub's."""
    return name.startswith(("/", ".")) or Path(name).is_dir()


def fetched(key: str, value: str, download: str, fetch: Callable[[], str]) -> Path:
    """The path that `fetch` gives. Raises UserError where there is no network and nothing in the cache."""
    try:
        return Path(fetch())
    except (OSError, ValueError) as error:  # what the hub's client raises derives from one or the other
        raise InputError(
            f"decoder.{key} {value}: cannot be fetched ({' '.join(str(error).split())[:200]}); run `hf download {download}` where there "
            f"is a network and copy the folder, then give its path; or take the bundled one, package:stickers/assets/decoder"
        ) from None


@dataclass(frozen=True, kw_only=True)
class DecoderIdentity:
    """What must be known of a decoder before it is loaded: D of the embeddings it reads, and the sha256 of each weight file."""

    embed_dim: int
    weights: dict[str, str]

    def fingerprint(self, settings: DecoderSettings) -> str:
        """16 hex digits that change whenever the decoder would draw something else: settings, and weights wherever they lie."""
        told = settings.model_dump(exclude=NOT_IN_FINGERPRINT | LOCATIONS)
        return hashlib.sha256(json.dumps([told, self.weights], sort_keys=True).encode()).hexdigest()[:16]


def identify_decoder(settings: DecoderSettings) -> DecoderIdentity:
    """Read headers and hash files; an exported decoder remembers what it was made of. Raises UserError for what is missing or unfit."""
    if settings.engine_dir:
        told = read_export(settings)
        return DecoderIdentity(embed_dim=told["embed_dim"], weights=told["weights"])
    files = find_decoder(settings)
    return DecoderIdentity(embed_dim=read_embed_dim(files.ip_adapter), weights=hash_weights(files))


def read_export(settings: DecoderSettings) -> dict[str, Any]:
    """The description in `settings.engine_dir`. Raises UserError if it is none, or of another model, precision or size."""
    folder = Path(str(settings.engine_dir))
    try:
        told: dict[str, Any] = json.loads((folder / "decoder.json").read_text())
    except (OSError, ValueError):
        raise InputError(
            f"decoder.engine_dir {folder}: no decoder.json there; write it with `rebeca export --config … --out {folder}`"
        ) from None
    for key in ("model", "ip_adapter", "vae", "lora", "dtype", "image_size"):
        wanted = getattr(settings, key) or (told[key] if key == "image_size" else None)
        if (
            Path(str(wanted)).name != Path(str(told[key])).name
        ):  # the same folder may lie elsewhere on another machine
            raise InputError(
                f"decoder.engine_dir {folder}: exported with {key} {told[key]}, decoder.{key} is {wanted}; export it again"
            )
    for name, size in told["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise InputError(
                f"decoder.engine_dir {folder}: {name} has {found} bytes, {size} were exported; copy the folder again, whole"
            )
    return told


def read_embed_dim(ip_adapter: Path) -> int:
    """D of an IP-Adapter, read from its header. Raises UserError if it is damaged, or reads more than one global embedding."""
    try:
        with safe_open(ip_adapter, framework="numpy") as weights:
            return int(weights.get_slice("image_proj.proj.weight").get_shape()[1])
    except SafetensorError as error:
        raise InputError(
            f"decoder.ip_adapter {ip_adapter}: no image_proj.proj.weight to read ({error}); give a plain adapter such as "
            "ip-adapter_sd15.safetensors: those called plus, full or faceid read other embeddings"
        ) from None


def hash_weights(files: DecoderFiles) -> dict[str, str]:
    """The sha256 of every file that decides what is drawn, by what it is for and not by where it lies."""
    found = {
        f"{part}/{file.name}": file
        for part in (*PARTS, *SAFETY_PARTS)
        for file in (files.model / part).glob("*")
    }
    found |= {
        f"{role}/{file.name}": file
        for role, file in (("ip_adapter", files.ip_adapter), ("lora", files.lora))
        if file
    }
    found |= {f"other_vae/{file.name}": file for file in files.vae.glob("*")} if files.vae else {}
    weights = {}
    for name, file in found.items():
        if file.suffix in (".safetensors", ".json", ".txt"):  # merges.txt is half of a tokenizer
            with file.open("rb") as opened:
                weights[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return dict(sorted(weights.items()))


def convert_pickle(pickle: Path, out: Path) -> int:
    """Write the tensors of a `.bin` file as safetensors, names joined by dots; returns how many there are.

    Raises UserError if it holds anything but tensors in dicts (`weights_only` runs no code of the file's), or `out` is there.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: what is written are safetensors; call it {out.stem}.safetensors")
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or give another name")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} is not there; make it first")
    import torch
    from safetensors.torch import save_file

    try:
        told = torch.load(pickle, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{pickle}: cannot be read ({error.strerror}); nothing is written") from None
    except UnpicklingError:  # its text advises to load the file all the same
        raise InputError(
            f"{pickle}: holds something else than tensors, which might be code; nothing of it was run or written"
        ) from None
    except Exception as error:  # junk makes the unpickler stumble in many ways
        raise InputError(
            f"{pickle}: is not a file torch saved ({type(error).__name__}); nothing is written"
        ) from None
    tensors = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.contiguous().clone()
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{name}.{key}" if name else str(key))
        else:
            raise InputError(
                f"{pickle}: {name or 'the file'} is a {type(value).__name__}, expected tensors; nothing is written"
            )

    collect(told, "")
    save_file(tensors, out)
    return len(tensors)
