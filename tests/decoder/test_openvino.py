"""OpenVINO draws what torch draws, in float32 and in bfloat16, and refuses what it cannot run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.exported.openvino_engine import OpenVinoNetwork
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from tests.decoder.test_denoising import loop_for, psnr, rows_for


@pytest.fixture(scope="module")
def openvino_decoder(
    tiny_decoder: DecoderSettings, tmp_path_factory: pytest.TempPathFactory
) -> DecoderSettings:
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export_decoder(tiny_decoder, folder)
    return tiny_decoder.model_copy(update={"engine": "openvino", "engine_dir": str(folder)})


def draw(settings: DecoderSettings) -> np.ndarray:
    images, finite = DenoisingLoop(load_networks(settings), settings).draw(rows_for(settings))
    assert finite.all()
    return images / 255.0


def test_it_draws_what_torch_draws(tiny_decoder: DecoderSettings, openvino_decoder: DecoderSettings) -> None:
    exact = loop_for(tiny_decoder).draw(rows_for(tiny_decoder))[0] / 255.0
    assert psnr(draw(openvino_decoder), exact) >= 45
    rounded = draw(openvino_decoder.model_copy(update={"dtype": "bfloat16"}))
    assert psnr(rounded, exact) >= 20
    assert not np.array_equal(rounded, exact)


def test_an_item_does_not_depend_on_its_batch(openvino_decoder: DecoderSettings) -> None:
    rows = rows_for(openvino_decoder)
    loop = DenoisingLoop(load_networks(openvino_decoder), openvino_decoder)
    whole, _ = loop.draw(rows)
    others = rows.take([0, 2, 2, 2, 2][: len(rows)])
    assert np.array_equal(loop.draw(others)[0][0], whole[0])


def test_a_graph_of_latents_is_compiled_once_for_each_batch_size(openvino_decoder: DecoderSettings) -> None:
    networks = load_networks(openvino_decoder)
    loop = DenoisingLoop(networks, openvino_decoder)
    rows = rows_for(openvino_decoder)
    for _ in range(2):
        loop.draw(rows)
    assert isinstance(networks.unet, OpenVinoNetwork)
    assert list(networks.unet.requests) == [2 * len(rows)]
    assert isinstance(networks.encoders["text_encoder"], OpenVinoNetwork)
    assert list(networks.encoders["text_encoder"].requests) == [0]


def test_the_identity_is_that_of_torch_in_the_same_number_format(
    tiny_decoder: DecoderSettings, openvino_decoder: DecoderSettings
) -> None:
    identity = identify_decoder(openvino_decoder)
    assert identity == identify_decoder(tiny_decoder)
    assert identity.fingerprint(openvino_decoder) == identity.fingerprint(tiny_decoder)
    rounded = openvino_decoder.model_copy(update={"dtype": "bfloat16"})
    assert identity.fingerprint(rounded) != identity.fingerprint(tiny_decoder)


def test_a_graph_of_float16_and_other_devices_are_refused(
    openvino_decoder: DecoderSettings, tmp_path: Path
) -> None:
    shutil.copytree(str(openvino_decoder.engine_dir), tmp_path / "half")
    path = tmp_path / "half" / "decoder.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    half = openvino_decoder.model_copy(update={"engine_dir": str(tmp_path / "half"), "dtype": "bfloat16"})
    with pytest.raises(InputError, match="exported with dtype float16, decoder.dtype is float32"):
        load_networks(half)
    for values, message in (
        ({"device": "cuda"}, "engine openvino runs on the cpu in float32, bfloat16 or int8, this is cuda"),
        ({"dtype": "float16"}, "this is cpu and float16; set device=cpu and dtype=auto"),
        ({"engine": "torch", "engine_dir": None, "dtype": "int8"}, "dtype int8 is for the engines onnx and"),
    ):
        with pytest.raises(ValidationError, match=message):
            DecoderSettings.model_validate({**half.model_dump(), **values})
