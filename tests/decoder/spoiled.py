"""Ways to spoil the files of a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError

UNET = "unet/diffusion_pytorch_model.safetensors"


VAE = "vae/diffusion_pytorch_model.safetensors"


TEXT = "text_encoder/model.safetensors"


ADAPTER = "ip_adapter/ip-adapter.safetensors"


Spoil = Callable[[Path], Any]


def copied(settings: DecoderSettings, folder: Path) -> DecoderSettings:
    shutil.copytree(settings.model, folder / "copy")
    return settings.model_copy(update={"model": str(folder / "copy")})


def in_json(name: str, **values: Any) -> Spoil:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def in_weights(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    return lambda model: save_file(change(load_file(model / name)), model / name)


def removed(name: str) -> Spoil:
    def change(model: Path) -> None:
        shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return change


def renamed(name: str, other: str) -> Spoil:
    return lambda model: (model / name).rename(model / other)


def cut(name: str) -> Spoil:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-10])


def pointer(name: str) -> Spoil:
    """What a clone without Git LFS has."""
    return lambda model: (model / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )


def check_refusal(settings: DecoderSettings, message: str) -> str:
    """Assert that a model is refused in one line with `message` and a remedy; return the line."""
    with pytest.raises(InputError, match=message) as caught:
        identify_decoder(settings)
    text = str(caught.value)
    assert text.startswith("decoder.")
    assert text.count("; ") >= 2
    assert len(text.splitlines()) == 1
    return text
