"""Find the files of a decoder on disk or in a hub, and hash them without loading."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import Effect, fields_with
from rebeca_ray.decoder.adapters import inspect_ip_adapter, read_embed_dim
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.inspection import (
    REMEDY,
    family_of,
    inspect_model,
    inspect_safety_checker,
    inspect_vae,
    zeroes_negative,
)
from rebeca_ray.decoder.safety_model import CONFIG, WEIGHTS
from rebeca_ray.decoder.single_file.kinds import CONFIGS, kind_of
from rebeca_ray.decoder.single_file.pickles import refuse_pickle
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject

# Folders of a model, of any family; those that exist are hashed.
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
SAFETY_PARTS = ("safety_checker", "feature_extractor")  # hashed if the model's checker is used
# A fingerprint hashes the weights at these locations instead.
LOCATIONS = fields_with(DecoderSettings, {Effect.CONTENT})
# These leave an image alike, but for rounding.
NOT_IN_FINGERPRINT = fields_with(DecoderSettings, set(Effect) - {Effect.ITEM, Effect.CONTENT})


@dataclass(frozen=True, kw_only=True)
class DecoderFiles:
    """The paths of a decoder's weights: folders in diffusers' layout, and single safetensors files.

    If a model is a single file, that is its `checkpoint`, and `model` is the folder of its configs.
    """

    model: Path
    ip_adapter: Path
    vae: Path | None = None
    lora: Path | None = None
    checkpoint: Path | None = None


def find_decoder(settings: DecoderSettings) -> DecoderFiles:
    """Return a decoder's files. Files of a hub are fetched into its cache, once per machine.

    Raises InputError for pickles, and for missing files with the command that fetches them.
    """
    return DecoderFiles(
        model=find_model(settings),
        ip_adapter=find_adapter(settings),
        vae=Path(settings.vae) if settings.vae and is_local(settings.vae) else fetch_vae(settings),
        lora=find_lora(settings),
        checkpoint=find_checkpoint(settings),
    )


def find_checkpoint(settings: DecoderSettings) -> Path | None:
    """Return the model's single file, or None if it is a folder or a hub id."""
    file = Path(settings.model).absolute()
    if file.is_dir():
        return None
    refuse_pickle("model", settings.model)
    if file.suffix != ".safetensors":
        return None
    if not file.is_file():
        raise InputError(
            f"decoder.model {file}: no such file; give the path of a single file, a diffusers directory, "
            "or a hub id"
        )
    return file


def find_configs(settings: DecoderSettings, checkpoint: Path) -> Path:
    """Return the folder with the configs of a single file: the one beside it, or its base's of a hub."""
    what, beside = f"decoder.model {checkpoint}", checkpoint.with_suffix("")
    kind = kind_of(what, checkpoint)
    if (beside / "model_index.json").is_file():
        if (family := family_of(settings.model, beside)) != kind:
            raise InputError(
                f"{what}: is of the family {kind}, {beside / 'model_index.json'} of {family}; expected the "
                "same; put the configs of this model beside it"
            )
        return beside
    names = [f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt")]
    return fetched(
        "model",
        f"{checkpoint}: has no configs in {beside}, and those of {CONFIGS[kind]}",
        f"{CONFIGS[kind]} --include '*.json' --include '*.txt' --local-dir {beside}",
        lambda: snapshot_download(
            CONFIGS[kind], revision=settings.revision, allow_patterns=["model_index.json", *names]
        ),
        remedy="copy the folder beside the file",
    )


def find_model(settings: DecoderSettings) -> Path:
    """Return the model's folder in diffusers' layout; that of a single file holds configs alone."""
    if checkpoint := find_checkpoint(settings):
        return find_configs(settings, checkpoint)
    if is_local(settings.model):
        if not (Path(settings.model) / "model_index.json").is_file():
            raise InputError(
                f"decoder.model {settings.model}: no model_index.json there; give a diffusers directory, "
                "or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        return Path(settings.model)

    def fetch() -> str:
        from diffusers import DiffusionPipeline

        may_check = settings.safety.checker in (None, "stable-diffusion")
        without = {} if may_check else {"safety_checker": None}
        return DiffusionPipeline.download(
            settings.model, revision=settings.revision, use_safetensors=True, **without
        )

    return fetched("model", settings.model, settings.model, fetch)


def find_adapter(settings: DecoderSettings) -> Path:
    """Return the IP-Adapter's file."""
    refuse_pickle("ip_adapter", settings.ip_adapter)
    repo = settings.ip_adapter_repo or settings.model
    if settings.ip_adapter_repo is None and (checkpoint := find_checkpoint(settings)):
        repo = str(checkpoint.with_suffix(""))
    if is_local(repo):
        if not (Path(repo) / settings.ip_adapter).is_file():
            raise InputError(
                f"decoder.ip_adapter {settings.ip_adapter}: no such file in {repo}; set decoder.ip_adapter "
                "or decoder.ip_adapter_repo"
            )
        return Path(repo) / settings.ip_adapter
    return fetched(
        "ip_adapter",
        settings.ip_adapter,
        f"{repo} {settings.ip_adapter}",
        lambda: hf_hub_download(repo, settings.ip_adapter, revision=settings.ip_adapter_revision),
    )


def fetch_vae(settings: DecoderSettings) -> Path | None:
    """Fetch the autoencoder that replaces the model's; return its folder, or None if none is set."""
    if settings.vae is None:
        return None
    repo = settings.vae

    def fetch() -> str:
        hf_hub_download(repo, "diffusion_pytorch_model.safetensors")
        return str(Path(hf_hub_download(repo, "config.json")).parent)

    return fetched("vae", repo, repo, fetch)


def find_lora(settings: DecoderSettings) -> Path | None:
    """Return the LoRA's file, or None if none is set."""
    lora = settings.lora
    if lora is None:
        return None
    refuse_pickle("lora", lora)
    if Path(lora).is_file() and lora.endswith(".safetensors"):
        return Path(lora)
    owner, _, rest = lora.partition("/")
    name, _, file = rest.partition("/")
    if is_local(lora) or not file.endswith(".safetensors"):
        raise InputError(
            f"decoder.lora {lora}: no such .safetensors file; give a path, "
            "or owner/name/file.safetensors of a hub"
        )
    return fetched("lora", lora, f"{owner}/{name} {file}", lambda: hf_hub_download(f"{owner}/{name}", file))


def is_local(name: str) -> bool:
    """Return whether a model's name means a folder on this machine, even a missing one, and not a hub id."""
    return name.startswith(("/", ".")) or Path(name).is_dir()


def fetched(
    key: str,
    value: str,
    download: str,
    fetch: Callable[[], str],
    remedy: str = "copy the folder and give its path",
) -> Path:
    """Return the path from `fetch`. Raises InputError if neither the network nor the cache has the file."""
    try:
        return Path(fetch())
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        raise InputError(
            f"decoder.{key} {value}: cannot be fetched ({' '.join(str(error).split())[:200]}); "
            f"run `hf download {download}` on a machine with a network, {remedy}; "
            "or use the bundled decoder, package:stickers/assets/decoder"
        ) from None


def with_checker(settings: DecoderSettings) -> DecoderSettings:
    """Return the settings with the name of their safety checker.

    By default, it is the model's own checker where the model has one, and the bundled one elsewhere.
    """
    if settings.safety.checker is not None:
        return settings
    if settings.engine_dir:
        names: Collection[str] = read_description(Path(settings.engine_dir)).get("weights", {})
    elif find_checkpoint(settings):
        names = []  # a checker beside its configs is of another model
    else:
        folder = find_model(settings)
        names = [f"{part}/{file.name}" for part in SAFETY_PARTS for file in (folder / part).glob("*")]
    name = "stable-diffusion" if has_checker(names) else "bundled"
    return settings.model_copy(update={"safety": settings.safety.model_copy(update={"checker": name})})


def has_checker(names: Collection[str]) -> bool:
    """Return whether the files of a model hold a safety checker that loads without a pickle."""
    configs = {"safety_checker/config.json", "feature_extractor/preprocessor_config.json"}
    weights = [name for name in names if name.startswith("safety_checker/") and name.endswith(".safetensors")]
    return bool(weights) and configs <= set(names)


@dataclass(frozen=True, kw_only=True)
class DecoderIdentity:
    """D of a decoder's embeddings, the sha256 of each weight file, and the name of its safety checker.

    All are known without loading.
    """

    embed_dim: int
    weights: dict[str, str]
    checker: str = "none"

    def fingerprint(self, settings: DecoderSettings) -> str:
        """Return 16 hex digits that change with every setting and weight that changes an image.

        The location of the weights does not matter. A checker that is chosen by default counts like one that
        is named.
        """
        values = choose(settings).model_dump(exclude=NOT_IN_FINGERPRINT | LOCATIONS)
        checker = settings.safety.checker or self.checker
        # No check is null here: items from before the bundled checker keep their identity under `none`.
        values["safety"]["checker"] = None if checker == "none" else checker
        return hashlib.sha256(json.dumps([values, self.weights], sort_keys=True).encode()).hexdigest()[:16]


def identify_decoder(settings: DecoderSettings) -> DecoderIdentity:
    """Read headers and hash files; an exported decoder has the hashes of its origin in `decoder.json`.

    Of the safety checkers, only the files of the one that is used are listed. Raises InputError for files
    that are missing or do not fit.
    """
    settings = with_checker(choose(settings))
    embed_dim, weights = read_weights(settings)
    checker = settings.safety.checker or "none"
    if checker != "stable-diffusion":
        weights = {name: sha for name, sha in weights.items() if not name.startswith(SAFETY_PARTS)}
    if checker == "bundled":
        weights |= {f"bundled_checker/{file.name}": hash_file(file) for file in (CONFIG, WEIGHTS)}
    return DecoderIdentity(embed_dim=embed_dim, weights=dict(sorted(weights.items())), checker=checker)


def read_weights(settings: DecoderSettings) -> tuple[int, dict[str, str]]:
    """Return D and the sha256 of every file of the model, its safety checker among them.

    Raises InputError for files that are missing or do not fit.
    """
    if settings.engine_dir:
        description = read_export(settings)
        return description["embed_dim"], description["weights"]
    files = find_decoder(settings)
    embed_dim = read_embed_dim(files.ip_adapter)
    inspect_files(settings, files)
    weights = hash_weights(files)
    if family_of(settings.model, files.model) == "sdxl":
        # A setting of the model itself, in no file that is hashed.
        value = str(zeroes_negative(files.model)).encode()
        weights["force_zeros_for_empty_prompt"] = hashlib.sha256(value).hexdigest()
    return embed_dim, weights


def inspect_files(settings: DecoderSettings, files: DecoderFiles) -> None:
    """Raise InputError for files that are not whole, of another kind, or would have no effect."""
    networks = inspect_model(
        settings.model, files.model, own_vae=files.vae is None, checkpoint=files.checkpoint
    )
    unet = networks["unet"]
    if settings.image_size is None and not isinstance(unet.config.get("sample_size"), int):
        raise InputError(
            f"decoder.model {settings.model}: unet has sample_size {unet.config.get('sample_size')}; "
            "expected one number; set decoder.image_size"
        )
    inspect_ip_adapter(settings.ip_adapter, files.ip_adapter, unet)
    if files.vae:
        inspect_vae(str(settings.vae), files.vae, files.model, unet)
    if files.lora:
        from rebeca_ray.decoder.lora import inspect_lora  # it loads torch

        shapes = {part: network.shapes for part, network in networks.items()}
        inspect_lora(f"decoder.lora {settings.lora}", files.lora, shapes)
    if settings.safety.checker == "stable-diffusion":
        if files.checkpoint:
            raise InputError(
                f"decoder.safety.checker stable-diffusion: {files.checkpoint} is a single file without one; "
                f"expected a diffusers directory; give {REMEDY}"
            )
        inspect_safety_checker(settings.model, files.model)


def read_export(settings: DecoderSettings) -> JsonObject:
    """Return the description in `settings.engine_dir`.

    Raises InputError if it is no export, or an export of another model, precision or size.
    """
    folder = Path(str(settings.engine_dir))
    description = read_description(folder)
    for key in ("model", "ip_adapter", "vae", "lora", "dtype", "image_size"):
        exported = description[key]
        expected = getattr(settings, key)
        if (settings.engine, key, expected) == ("openvino", "dtype", "bfloat16"):
            expected = "float32"  # OpenVINO converts when it compiles the graph
        if key == "image_size" and expected is None:
            continue
        # Only names are compared: the same folder may have another path on another machine.
        if Path(str(expected)).name != Path(str(exported)).name:
            raise InputError(
                f"decoder.engine_dir {folder}: exported with {key} {exported}, "
                f"decoder.{key} is {expected}; export it again"
            )
    if settings.cache_interval > 1 and not description["deep_cache"]:
        raise InputError(
            f"decoder.engine_dir {folder}: exported with cache_interval 1, "
            f"decoder.cache_interval is {settings.cache_interval}; export it again with that value, "
            "or set decoder.cache_interval=1"
        )
    for name, size in description["files"].items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if actual != size:
            raise InputError(
                f"decoder.engine_dir {folder}: {name} has {actual} bytes, {size} were exported; "
                "copy the whole folder again"
            )
    return description


def read_description(folder: Path) -> JsonObject:
    """Return the `decoder.json` of an export, with defaults for older ones. Raises InputError without one."""
    try:
        return {"family": "sd", "deep_cache": False, **json.loads((folder / "decoder.json").read_text())}
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"decoder.engine_dir {folder}: no decoder.json there; "
            f"write it with `rebeca export --config … --out {folder}`"
        ) from None


def hash_weights(files: DecoderFiles) -> dict[str, str]:
    """Return the sha256 of every file that changes an image, by its role and not by its location."""
    parts = PARTS if files.checkpoint else (*PARTS, *SAFETY_PARTS)
    by_role = {f"{part}/{file.name}": file for part in parts for file in (files.model / part).glob("*")}
    if files.checkpoint:  # its configs may lie in a whole model, in the cache of a hub
        by_role = {name: file for name, file in by_role.items() if file.suffix != ".safetensors"}
    singles = {"checkpoint": files.checkpoint, "ip_adapter": files.ip_adapter, "lora": files.lora}
    by_role |= {f"{role}/{file.name}": file for role, file in singles.items() if file}
    by_role |= {f"other_vae/{file.name}": file for file in files.vae.glob("*")} if files.vae else {}
    weights = {}
    for name, file in by_role.items():
        if file.suffix in (".safetensors", ".json", ".txt"):  # merges.txt is half of a tokenizer
            weights[name] = hash_file(file)
    return dict(sorted(weights.items()))


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
