"""A prior directory: everything needed to sample, described by itself, in safetensors, JSON and Parquet.

config.json         network, diffusion, scaler, versions, sha256 of the weights and of the users
model.safetensors   the averaged weights
users.parquet       user_id, user_index, num_likes, history_digest
training.csv        the loss curve
README.md           the model card

torch loads with the first network, not with this module: processes that only read its tables start in half the time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

import rebeca_ray
from rebeca_ray.config import DiffusionSettings, NetworkSettings, parse_config
from rebeca_ray.errors import UserError
from rebeca_ray.storage import UNREACHABLE, describe, join, open_filesystem, read_json, require_writable, write_json

if TYPE_CHECKING:
    import torch

    from rebeca_ray.embeds import EmbedScaler
    from rebeca_ray.prior import Prior

FORMAT = 3
UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class TrainedPrior:
    """A prior ready to sample: the network in eval mode, its process, its scaler and its users."""

    network: Prior
    diffusion: DiffusionSettings
    scaler: EmbedScaler
    users: pa.Table
    fingerprint: str  # of config, weights and users
    clip: str | None  # fingerprint of the CLIP that made the training embeddings, if the items told


def build_network(settings: NetworkSettings, *, embed_dim: int, num_users: int) -> Prior:
    from rebeca_ray.prior import Prior

    return Prior(embed_dim=embed_dim, num_users=num_users, **settings.model_dump())


def save_prior(
    out: str,
    *,
    weights: dict[str, torch.Tensor],
    network: NetworkSettings,
    diffusion: DiffusionSettings,
    condition_dropout: float,
    scaler: EmbedScaler,
    users: pa.Table,
    clip: str | None,
    curve: str,
    metrics: dict[str, float],
) -> None:
    """Write the directory `out` (local or `s3://`); `config.json` goes last, so a half-written prior cannot be loaded.

    `condition_dropout` is the smaller of the user's and the rating's in training: at 0 there is nothing to guide away from.
    """
    from safetensors.torch import save_file

    require_writable(out, "prior")
    filesystem, path = open_filesystem(out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
        pq.write_table(users, folder / "users.parquet", compression="zstd")
        (folder / "training.csv").write_text(curve)
        config = {
            "format": FORMAT,
            "rebeca_ray": rebeca_ray.__version__,
            "network": network.model_dump(),
            "diffusion": diffusion.model_dump(),
            "condition_dropout": condition_dropout,
            "scaler": scaler.to_dict(),
            "num_users": users.num_rows,
            "clip": clip,
            "metrics": metrics,
            "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "users.parquet")},
        }
        (folder / "README.md").write_text(model_card(config))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        names = ["model.safetensors", "users.parquet", "training.csv", "README.md", "config.json"]
        write_json({"format": UNFINISHED}, join(out, "config.json"))
        for name in names:
            filesystem.put_file(str(folder / name), f"{path}/{name}")


def load_prior(uri: str, device: str = "cpu") -> TrainedPrior:
    """Load a prior directory. Raises UserError if it is missing, incomplete, of another format, or altered."""
    from safetensors.torch import load

    from rebeca_ray.embeds import EmbedScaler

    config = read_prior_config(uri)
    weights = load(verified_file(uri, "model.safetensors", config))
    users = read_prior_users(uri, config)
    scaler = EmbedScaler(**config["scaler"])
    settings = parse_config(NetworkSettings, config["network"], where=f"prior {uri}: config.json: network")
    network = build_network(settings, embed_dim=scaler.embed_dim, num_users=users.num_rows)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"prior {uri}: weights do not fit config.json ({' '.join(str(error).split())[:200]})") from None
    return TrainedPrior(
        network=network.eval().to(device),
        diffusion=parse_config(DiffusionSettings, config["diffusion"], where=f"prior {uri}: config.json: diffusion"),
        scaler=scaler,
        users=users,
        fingerprint=fingerprint(config),
        clip=config["clip"],
    )


def read_prior_users(uri: str, config: dict[str, Any]) -> pa.Table:
    """The `users.parquet` that belongs to the weights of `config`: another night's would give users each other's taste."""
    return pq.read_table(pa.BufferReader(verified_file(uri, "users.parquet", config)))


def verified_file(uri: str, name: str, config: dict[str, Any]) -> bytes:
    """The bytes of one file of a prior. Raises UserError if it is missing or not the one `config` describes."""
    filesystem, path = open_filesystem(uri)
    try:
        data: bytes = filesystem.cat_file(f"{path}/{name}")
    except UNREACHABLE as error:
        raise UserError(f"prior {uri}: {name} cannot be read ({describe(error)}); copy the whole directory again") from None
    if hashlib.sha256(data).hexdigest() != config["sha256"][name]:
        raise UserError(f"prior {uri}: {name} is not the file config.json describes (sha256 differs); copy the whole directory again")
    return data


def read_prior_config(uri: str) -> dict[str, Any]:
    """The `config.json` of a prior. Raises UserError if there is none or it is of another format."""
    config = read_json(join(uri, "config.json"))
    if config is None:
        raise UserError(f"prior {uri}: no config.json there; train one with `rebeca train`, or give its directory")
    if config.get("format") == UNFINISHED:
        raise UserError(f"prior {uri}: was not written to its end; train it again")
    if config.get("format") != FORMAT:
        raise UserError(f"prior {uri}: format {config.get('format')!r}, this version reads {FORMAT}; upgrade rebeca-ray or train again")
    return config


def fingerprint(config: dict[str, Any]) -> str:
    """16 hex digits that change whenever the prior would sample something else."""
    told = {name: config[name] for name in ("network", "diffusion", "scaler", "sha256")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def model_card(config: dict[str, Any]) -> str:
    """A short README for the directory."""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in config["metrics"].items())
    return f"""# REBECA prior

Draws CLIP image embeddings a user would like, from the user's past ratings alone.

Made by rebeca-ray {config["rebeca_ray"]}: {config["num_users"]} users, D = {config["scaler"]["embed_dim"]},
network {json.dumps(config["network"])}, diffusion {json.dumps(config["diffusion"])}.

| figure | value |
|---|---|
{rows}

Load it with `rebeca_ray.checkpoint.load_prior(directory)`. The users table holds outside user ids: treat the
directory as personal data.
"""
