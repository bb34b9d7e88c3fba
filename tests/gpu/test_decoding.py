"""On an NVIDIA GPU: the exact configuration of Stable Diffusion 1.5 in float16, by torch and TensorRT."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.interface import Rows
from tests.gpu.sd15 import EMBED_DIM, write_sd15

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
SERVING = Path(__file__).parents[2] / "serving"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> DecoderSettings:
    model = write_sd15(tmp_path_factory.mktemp("sd15"))
    return DecoderSettings(
        model=str(model), num_inference_steps=4, device="cuda", dtype="float16", batch_size=4
    )


def loop_for(settings: DecoderSettings) -> DenoisingLoop:
    return DenoisingLoop(load_networks(settings), settings)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((one - other) ** 2) + 1e-12))


def rows_of(settings: DecoderSettings) -> Rows:
    embeds = np.random.default_rng(0).standard_normal((4, EMBED_DIM)).astype(np.float32)
    return Rows.of(settings, embeds, range(4))


def test_a_row_in_a_batch_equals_the_same_item_alone(sd15: DecoderSettings) -> None:
    loop, rows = loop_for(sd15), rows_of(sd15)
    together, finite = loop.draw(rows)
    assert finite.all()
    for row in range(4):
        # In half precision, rounding depends on the batch size.
        assert psnr(together[row] / 255.0, loop.draw(rows.take([row]))[0][0] / 255.0) >= 30


def test_float16_on_the_gpu_equals_float32_on_the_cpu(sd15: DecoderSettings) -> None:
    small = sd15.model_copy(update={"image_size": 64})
    exact = small.model_copy(update={"device": "cpu", "dtype": "float32"})
    rows = rows_of(small)
    assert psnr(loop_for(small).draw(rows)[0] / 255.0, loop_for(exact).draw(rows)[0] / 255.0) >= 30


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None, reason="the package tensorrt is not installed"
)
@pytest.mark.parametrize("cache_interval", [1, 2])
def test_tensorrt_equals_torch(sd15: DecoderSettings, tmp_path: Path, cache_interval: int) -> None:
    sd15 = sd15.model_copy(update={"cache_interval": cache_interval})
    export_decoder(sd15, tmp_path / "engines")
    command = [
        sys.executable,
        str(SERVING / "build_engines.py"),
        str(tmp_path / "engines"),
        "--batch-size",
        "4",
    ]
    subprocess.run(command, check=True)
    built = sd15.model_copy(update={"engine": "tensorrt", "engine_dir": str(tmp_path / "engines")})
    rows = rows_of(sd15)
    assert psnr(loop_for(built).draw(rows)[0] / 255.0, loop_for(sd15).draw(rows)[0] / 255.0) >= 30
