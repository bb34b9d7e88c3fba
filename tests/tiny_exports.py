"""Exports of the tiny decoders, as fixtures. The processes of a test run share their files."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.export import export_decoder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


def write_once(shared: Path, name: str, write: Callable[[Path], DecoderSettings]) -> DecoderSettings:
    """Return the settings of a decoder in the shared folder; the first process to need it writes it."""
    settings = shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not settings.exists():
            (shared / name).mkdir(exist_ok=True)
            settings.write_text(write(shared / name).model_dump_json())
    return DecoderSettings.model_validate_json(settings.read_text())


def export(settings: DecoderSettings, folder: Path) -> DecoderSettings:
    export_decoder(settings, folder / "onnx")
    return settings.model_copy(update={"engine": "onnx", "engine_dir": str(folder / "onnx")})


@pytest.fixture(scope="session")
def exported(tiny_decoder: DecoderSettings, shared: Path) -> DecoderSettings:
    return write_once(shared, "exported", lambda folder: export(tiny_decoder, folder))


CACHE = {"cache_interval": 2, "num_inference_steps": 5}


@pytest.fixture(scope="session")
def cached_sd(tiny_decoder: DecoderSettings, shared: Path) -> DecoderSettings:
    """An export with a shallow UNet."""
    settings = tiny_decoder.model_copy(update=CACHE)
    return write_once(shared, "cached_sd", lambda folder: export(settings, folder))


@pytest.fixture(scope="session")
def cached_sdxl(tiny_sdxl: DecoderSettings, shared: Path) -> DecoderSettings:
    """An export with a shallow UNet."""
    settings = tiny_sdxl.model_copy(update=CACHE)
    return write_once(shared, "cached_sdxl", lambda folder: export(settings, folder))
