"""Write and read a prior directory: self-describing, and complete for sampling.

A job publishes each prior as a new version of its folder (catalog/versions.py). Readers take a folder with
versions, one version, or a plain copy of one.

config.json            network, diffusion, scaler, sampling, versions, sha256 of the other files
model.safetensors      the averaged weights, and the user table of an `id` prior
selector.safetensors   the selector, if the ratings had likes
users.parquet          only for an `id` prior: user_id, user_index, num_likes, history_digest
training.csv           the loss curve
README.md              the model card

This module imports torch late: a process that only reads a prior's tables starts in half the time.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field

import rebeca_ray
from rebeca_ray.catalog.versions import NewVersion, current_version
from rebeca_ray.config.fields import Fraction, Settings, Size
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.sections import DiffusionSettings, NetworkSettings, PriorSampling
from rebeca_ray.errors import Failure, InputError, StorageError, UserError, describe
from rebeca_ray.storage.filesystem import join, open_filesystem, storage_errors
from rebeca_ray.storage.objects import JsonObject, read_json, write_json
from rebeca_ray.storage.store import classify, failure_types, open_store
from rebeca_ray.storage.writable import require_writable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rebeca_ray.prior.denoisers import Prior
    from rebeca_ray.prior.scaler import EmbedScaler
    from rebeca_ray.prior.selector import Selector
    from rebeca_ray.prior.users import History


FORMAT = 6
UNFINISHED = "unfinished"
USER_ROWS = "user_rows"  # the table's name among the weights
MARKERS = {"prior.json": "fencing_token", "config.json": "format"}  # of a folder that a job may replace


class ScalerSettings(Settings):
    """An EmbedScaler in config.json."""

    embed_dim: Size
    norm: Annotated[float, Field(gt=0, le=1e6)]
    normalise: bool
    clamp: Annotated[float | None, Field(gt=0, le=1000)]
    scale_factor: Annotated[float, Field(gt=0, le=1000)]
    clip: Annotated[float | None, Field(gt=0, le=1e6)]
    deviation: Annotated[float, Field(gt=0, le=1e6)]


class PriorConfig(Settings):
    """The required part of a prior's config.json."""

    model_config = ConfigDict(extra="ignore")  # the file holds more than is read

    network: NetworkSettings
    diffusion: DiffusionSettings
    sampling: PriorSampling
    condition_dropout: Fraction
    scaler: ScalerSettings
    clip: str | None
    metrics: JsonObject
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainedPrior:
    """A prior ready to sample: network in eval mode, process, scaler, and the users of an `id` prior."""

    network: Prior
    settings: NetworkSettings
    diffusion: DiffusionSettings
    scaler: EmbedScaler
    sampling: PriorSampling
    condition_dropout: float  # how often training hid both user and rating; guidance needs it above 0
    clip: str | None  # fingerprint of the CLIP that made the training embeddings, if known
    user_key: str | None = None  # fingerprint of the key of the pseudonyms in `users`
    user_rows: torch.Tensor | None = None  # [V, U, H]
    users: pa.Table | None = None
    selector: Selector | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curve: str = ""
    fingerprint: str = ""  # covers config, weights, selector and users; set by load_prior

    def user_tokens(self, user_index_G: np.ndarray, history: History | None) -> torch.Tensor:
        """Return user tokens [G, U, H]: from the history or from the index, as the prior encodes users.

        An index below 0, an empty history, and a prior without users give the tokens of the null user: the
        population.
        """
        import torch

        null_GUH = self.network.null_user_UH.detach().expand(len(user_index_G), -1, -1)
        if self.settings.user_encoder == "history":
            assert history is not None
            with torch.inference_mode():
                return self.network.encode(history)
        if self.user_rows is None:
            return null_GUH
        index_G = torch.from_numpy(user_index_G).to(null_GUH.device)
        return torch.where((index_G < 0)[:, None, None], null_GUH, self.user_rows[index_G.clamp(min=0)])


def publish_prior(prior: TrainedPrior, version: NewVersion, run_date: datetime.date | None) -> None:
    """Write the prior as a new version, named by its fingerprint, and publish it.

    The pointer records `run_date`, by default today in UTC. Raises LeaseHeldError if another writer holds the
    lease by now, and StorageError if the store fails. Either leaves the published prior as it was.
    """
    run_date = run_date or datetime.datetime.now(datetime.UTC).date()
    with tempfile.TemporaryDirectory() as scratch:
        config = write_files(prior, Path(scratch))
        upload(Path(scratch), version.begin(fingerprint(config)))
        version.publish(run_date)


def save_prior(prior: TrainedPrior, out: str) -> None:
    """Write the prior's files into the folder `out`; `config.json` comes last, so no half of it loads."""
    require_writable(out, "prior")
    with tempfile.TemporaryDirectory() as scratch:
        write_files(prior, Path(scratch))
        write_json({"format": UNFINISHED}, join(out, "config.json"))
        upload(Path(scratch), out)


def upload(folder: Path, uri: str) -> None:
    """Copy the files of a folder below `uri`. `config.json` comes last."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        with storage_errors(join(uri, file.name)):
            open_store(join(uri, file.name)).put(file.read_bytes())


def write_files(prior: TrainedPrior, folder: Path) -> JsonObject:
    """Write the files of a prior into a local folder; return its config."""
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in prior.network.state_dict().items()}
    if prior.user_rows is not None:
        weights[USER_ROWS] = prior.user_rows.contiguous()
    # The weights' metadata repeat scaler and CLIP, because a wrong config.json could lie beside them.
    data = save(weights, metadata=trained_with(prior.scaler.to_dict(), prior.clip))
    (folder / "model.safetensors").write_bytes(with_sorted_metadata(data))
    if prior.selector is not None:
        selector = {name: tensor.contiguous() for name, tensor in prior.selector.state_dict().items()}
        (folder / "selector.safetensors").write_bytes(save(selector))
    if prior.users is not None:
        pq.write_table(prior.users, folder / "users.parquet", compression="zstd")
    hashed = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    (folder / "training.csv").write_text(prior.curve)
    config = {
        "format": FORMAT,
        "rebeca_ray": rebeca_ray.__version__,
        "network": prior.settings.model_dump(),
        "diffusion": prior.diffusion.model_dump(),
        "sampling": prior.sampling.model_dump(),
        "condition_dropout": prior.condition_dropout,
        "scaler": prior.scaler.to_dict(),
        "num_users": 0 if prior.users is None else prior.users.num_rows,
        "clip": prior.clip,
        "user_key": prior.user_key,
        "metrics": prior.metrics,
        "sha256": hashed,
    }
    (folder / "README.md").write_text(model_card(config))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def with_sorted_metadata(safetensors: bytes) -> bytes:
    """Return the same file with its metadata in order of its keys.

    The library writes them in random order. A prior's fingerprint includes the file's hash, so the same
    weights would get another fingerprint each time.
    """
    size = int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + safetensors[8 + size :]


def trained_with(scaler: JsonObject, clip: str | None) -> dict[str, str]:
    """Return the metadata of the weights."""
    return {"scaler": json.dumps(scaler, sort_keys=True), "clip": json.dumps(clip)}


def load_prior(uri: str, device: str = "cpu") -> TrainedPrior:
    """Load the published prior of a folder. Raises InputError unless it is complete and of this format."""
    from safetensors.torch import load

    from rebeca_ray.prior.denoisers import Prior
    from rebeca_ray.prior.scaler import EmbedScaler
    from rebeca_ray.prior.selector import Selector

    uri = current_version(uri, "prior")
    config = read_config(uri)
    data = verified_file(uri, "model.safetensors", config)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    for name, expected in trained_with(config["scaler"], config["clip"]).items():
        if metadata[name] != expected:
            raise InputError(
                f"prior {uri}: config.json has {name} {expected}, its weights were trained with "
                f"{metadata[name]}; copy the whole directory again"
            )
    weights = load(data)
    scaler = EmbedScaler(**config["scaler"])
    settings = parse_config(NetworkSettings, config["network"], where=f"prior {uri}: config.json: network")
    network = Prior(settings, scaler.embed_dim)
    user_rows = weights.pop(USER_ROWS, None)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"prior {uri}: weights do not fit config.json ({' '.join(str(error).split())[:200]})"
        ) from None
    selector = None
    if "selector.safetensors" in config["sha256"]:
        tensors = load(verified_file(uri, "selector.safetensors", config))
        selector = Selector(scaler.embed_dim, len(tensors["factors.weight"]), tensors.get("rows_VF"))
        selector.load_state_dict(tensors)
        selector = selector.eval().to(device)
    return TrainedPrior(
        network=network.eval().to(device),
        settings=settings,
        diffusion=parse_config(
            DiffusionSettings, config["diffusion"], where=f"prior {uri}: config.json: diffusion"
        ),
        scaler=scaler,
        sampling=parse_config(PriorSampling, config["sampling"], where=f"prior {uri}: config.json: sampling"),
        condition_dropout=config["condition_dropout"],
        clip=config["clip"],
        user_key=config.get("user_key"),
        user_rows=None if user_rows is None else user_rows.to(device),
        users=read_prior_users(uri, config) if "users.parquet" in config["sha256"] else None,
        selector=selector,
        metrics=config["metrics"],
        fingerprint=fingerprint(config),
    )


def read_prior_users(uri: str, config: JsonObject) -> pa.Table:
    """Return the `users.parquet` that belongs to the weights of `config`.

    Raises InputError for another run's file, which would give users each other's taste.
    """
    return pq.read_table(pa.BufferReader(verified_file(uri, "users.parquet", config)))


def verified_file(uri: str, name: str, config: JsonObject) -> bytes:
    """Return the bytes of one file of a prior. Raises InputError if it is missing or has another hash."""
    filesystem, path = open_filesystem(uri)
    try:
        data: bytes = filesystem.cat_file(f"{path}/{name}")
    except failure_types() as error:
        kind = StorageError if classify(error) is Failure.UNREACHABLE else InputError
        raise kind(
            f"prior {uri}: {name} cannot be read ({describe(error)}); copy the whole directory again"
        ) from None
    if hashlib.sha256(data).hexdigest() != config["sha256"].get(name):
        raise InputError(
            f"prior {uri}: {name} is not the file config.json describes (sha256 differs); "
            "copy the whole directory again"
        )
    return data


def read_prior_config(uri: str) -> JsonObject:
    """Return the `config.json` of the published prior of a folder. Raises InputError as `load_prior` does."""
    return read_config(current_version(uri, "prior"))


def read_config(uri: str) -> JsonObject:
    """Return the `config.json` in a folder. Raises InputError if it is missing or has another format."""
    config = read_json(join(uri, "config.json"))
    if config is None:
        raise InputError(
            f"prior {uri}: no config.json there; train one with `rebeca train`, or give its directory"
        )
    if config.get("format") == UNFINISHED:
        raise InputError(f"prior {uri}: was not written completely; train it again")
    if config.get("format") != FORMAT:
        raise InputError(
            f"prior {uri}: format {config.get('format')!r}, this version reads {FORMAT}; "
            "train it again, or upgrade rebeca-ray if the prior is newer"
        )
    try:
        parse_config(PriorConfig, config, where=f"prior {uri}: config.json")
    except UserError as error:
        raise InputError(
            f"{error}; the file was changed: copy the whole directory again, or train again"
        ) from None
    return config


def fingerprint(config: JsonObject) -> str:
    """Return 16 hex digits that change whenever the prior would sample something else."""
    sampled_from = {name: config[name] for name in ("network", "diffusion", "sampling", "scaler", "sha256")}
    return hashlib.sha256(json.dumps(sampled_from, sort_keys=True).encode()).hexdigest()[:16]


def model_card(config: JsonObject) -> str:
    """Return a short README for the directory."""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in config["metrics"].items())
    users = {
        "history": "anyone with a history",
        "id": f"{config['num_users']} users by id",
        "none": "no users (NoUE)",
    }[config["network"]["user_encoder"]]
    return f"""# REBECA prior

Samples CLIP image embeddings that a user would like, from the user's past ratings alone.

Made by rebeca-ray {config["rebeca_ray"]}: {users}, D = {config["scaler"]["embed_dim"]},
network {json.dumps(config["network"])}, diffusion {json.dumps(config["diffusion"])},
sampling {json.dumps(config["sampling"])}.

| figure | value |
|---|---|
{rows}

Load it with `rebeca_ray.prior.checkpoint.load_prior(directory)`. A users table holds outside user ids and
tastes: treat such a directory as personal data.
"""
