"""An exported decoder draws the same images by ONNX Runtime and by OpenVINO, at any batch size and weight."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import find_family, load_networks
from rebeca_ray.decoder.export import example_inputs, export_decoder
from rebeca_ray.decoder.exported.openvino_engine import OpenVinoNetwork
from rebeca_ray.decoder.exported.tensorrt_engine import check_engines
from rebeca_ray.decoder.families.sd import FAMILY
from rebeca_ray.decoder.files import hash_file, identify_decoder
from rebeca_ray.decoder.networks import Networks
from rebeca_ray.errors import InputError, UserError
from tests.decoder.test_denoising import loop_for, psnr, rows_for


def test_every_network_is_a_graph_with_the_declared_names_and_a_free_batch(exported: DecoderSettings) -> None:
    assert list(FAMILY.signatures(deep_cache=False)) == [
        "text_encoder",
        "image_projection",
        "unet",
        "vae_decoder",
    ]
    for name, signature in FAMILY.signatures(deep_cache=False).items():
        graph = onnx.load(Path(str(exported.engine_dir)) / f"{name}.onnx", load_external_data=False).graph
        assert [value.name for value in graph.input] == list(signature.inputs)
        assert [value.name for value in graph.output] == list(signature.outputs)
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output])
        assert {"Constant", "CastLike"}.isdisjoint(node.op_type for node in graph.node)  # all are folded


def test_a_graph_takes_more_rows_than_it_was_traced_for(
    exported: DecoderSettings, tiny_decoder: DecoderSettings
) -> None:
    """Of 64 rows, diffusers makes a copy within the UNet."""
    by_onnx, by_torch = load_networks(exported).by_name(), load_networks(tiny_decoder)
    for name, inputs in example_inputs(by_torch).items():
        many = tuple(torch.cat([value] * 32) for value in inputs)
        many = tuple(torch.rand_like(value) if value.is_floating_point() else value for value in many)
        with torch.inference_mode():
            expected = by_torch.by_name()[name](*many)
        torch.testing.assert_close(by_onnx[name](*many), expected, atol=1e-4, rtol=1e-4)


def test_onnx_runtime_draws_what_torch_draws(
    exported: DecoderSettings, tiny_decoder: DecoderSettings
) -> None:
    rows = rows_for(tiny_decoder)
    torch_images, _ = loop_for(tiny_decoder).draw(rows)
    loop = DenoisingLoop(load_networks(exported), exported)
    for batch in (rows, rows.take([0]), rows.take([1, 2])):
        drawn, finite = loop.draw(batch)
        assert finite.all()
        for row, seed in enumerate(batch.seeds):
            assert psnr(drawn[row] / 255.0, torch_images[list(rows.seeds).index(seed)] / 255.0) >= 40


def test_one_graph_serves_every_image_weight(
    exported: DecoderSettings, tiny_decoder: DecoderSettings
) -> None:
    rows = rows_for(tiny_decoder)
    weighted = replace(rows, ip_adapter_scale_B=np.array([0.0, 0.3, 0.6, 1.0, 1.5], np.float32))
    onnx_loop, torch_loop = DenoisingLoop(load_networks(exported), exported), loop_for(tiny_decoder)
    drawn, _ = onnx_loop.draw(weighted)
    assert psnr(drawn / 255.0, torch_loop.draw(weighted)[0] / 255.0) >= 40
    assert not np.array_equal(drawn[0], onnx_loop.draw(rows)[0][0])


@pytest.fixture(scope="module", params=["cached_sd", "cached_sdxl"])
def cached(request: pytest.FixtureRequest) -> DecoderSettings:
    """An export with a shallow UNet, of either family."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def in_torch(exported: DecoderSettings) -> DecoderSettings:
    return exported.model_copy(update={"engine": "torch", "engine_dir": None})


@pytest.fixture(scope="module")
def by_engine(cached: DecoderSettings) -> dict[str, Networks]:
    return {"onnx": load_networks(cached), "torch": load_networks(in_torch(cached))}


def test_a_cache_is_exported_as_an_output_and_a_shallow_graph(cached: DecoderSettings) -> None:
    folder = Path(str(cached.engine_dir))
    description = json.loads((folder / "decoder.json").read_text())
    assert description["deep_cache"] is True
    signatures = find_family(description["family"]).signatures(deep_cache=True)
    assert signatures["unet"].outputs == ("predicted", "deep")
    assert signatures["shallow_unet"].inputs == (*signatures["unet"].inputs, "deep")
    assert {file.stem for file in folder.glob("*.onnx")} == set(signatures)
    shapes = {}
    for name in ("unet", "shallow_unet"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        assert [value.name for value in graph.input] == list(signatures[name].inputs)
        assert [value.name for value in graph.output] == list(signatures[name].outputs)
        (deep,) = [value for value in [*graph.input, *graph.output] if value.name == "deep"]
        free, *shapes[name] = deep.type.tensor_type.shape.dim
        assert free.dim_param
    # TensorRT needs the fixed sizes behind the batch.
    expected = [load_networks(in_torch(cached)).deep_channels, 8, 8]
    assert all([size.dim_value for size in shape] == expected for shape in shapes.values())
    assert identify_decoder(cached) == identify_decoder(in_torch(cached))


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("guided", [(0.0, 1.0), (0.0, 0.4), (0.4, 1.0), (0.0, 0.0)])
def test_onnx_runtime_draws_the_shallow_passes_of_torch(
    cached: DecoderSettings,
    by_engine: dict[str, Networks],
    interval: int,
    guided: tuple[float, float],
) -> None:
    settings = cached.model_copy(update={"cache_interval": interval, "guidance_interval": guided})
    rows = rows_for(settings)
    expected, _ = DenoisingLoop(by_engine["torch"], settings).draw(rows)
    drawn, finite = DenoisingLoop(by_engine["onnx"], settings).draw(rows)
    assert finite.all()
    assert psnr(drawn / 255.0, expected / 255.0) >= 60
    whole, _ = DenoisingLoop(by_engine["onnx"], settings.model_copy(update={"cache_interval": 1})).draw(rows)
    assert psnr(drawn / 255.0, whole / 255.0) < 55


def test_an_export_with_a_cache_draws_whole_passes_too(cached: DecoderSettings) -> None:
    settings = cached.model_copy(update={"cache_interval": 1})
    rows = rows_for(settings)
    expected, _ = loop_for(in_torch(settings)).draw(rows)
    assert psnr(loop_for(settings).draw(rows)[0] / 255.0, expected / 255.0) >= 45


def test_a_cache_needs_an_export_that_has_it(exported: DecoderSettings, tmp_path: Path) -> None:
    settings = exported.model_copy(update={"cache_interval": 3})
    for reads in (identify_decoder, load_networks):
        with pytest.raises(
            InputError,
            match="with cache_interval 1, decoder.cache_interval is 3; export it again with that value, "
            "or set decoder.cache_interval=1",
        ):
            reads(settings)
    # An export from before the cache does not mention it.
    shutil.copytree(str(exported.engine_dir), tmp_path / "export")
    path = tmp_path / "export" / "decoder.json"
    description = json.loads(path.read_text())
    assert description.pop("deep_cache") is False
    path.write_text(json.dumps(description))
    older = exported.model_copy(update={"engine_dir": str(path.parent)})
    assert load_networks(older).shallow_unet is None
    with pytest.raises(InputError, match="exported with cache_interval 1"):
        load_networks(older.model_copy(update={"cache_interval": 3}))


def test_an_export_of_another_decoder_is_refused(
    exported: DecoderSettings, tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    assert identify_decoder(exported) == identify_decoder(tiny_decoder)
    for values, message in (
        ({"dtype": "float16"}, "exported with dtype float32, decoder.dtype is float16; export it again"),
        ({"image_size": 32}, "exported with image_size 16, decoder.image_size is 32"),
        ({"model": "other/model"}, "exported with model .*, decoder.model is other/model"),
        ({"engine_dir": str(tmp_path)}, "no decoder.json there; write it with `rebeca export"),
    ):
        with pytest.raises(UserError, match=message):
            load_networks(exported.model_copy(update=values))
    with pytest.raises(UserError, match="already exists; remove it"):
        export_decoder(tiny_decoder, Path(str(exported.engine_dir)))
    shutil.copytree(str(exported.engine_dir), tmp_path / "half")
    (tmp_path / "half" / "unet.onnx").write_bytes(b"half")
    with pytest.raises(
        UserError, match=r"half: unet.onnx has 4 bytes, \d+ were exported; copy the whole folder again"
    ):
        identify_decoder(exported.model_copy(update={"engine_dir": str(tmp_path / "half")}))


def test_a_graph_that_was_replaced_is_refused(exported: DecoderSettings, tmp_path: Path) -> None:
    """Of the same size, so that only its checksum differs."""
    for name in ("unet.onnx", "vae_decoder.onnx", "tokenizer/tokenizer.json"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(str(exported.engine_dir), folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        replaced = exported.model_copy(update={"engine_dir": str(folder)})
        assert identify_decoder(replaced) == identify_decoder(exported)  # reads no graph
        with pytest.raises(
            InputError, match=f"{name} is not the file that was exported, its sha256 differs; copy"
        ):
            load_networks(replaced)
    # An export from before checksums is loaded.
    path = tmp_path / "unet.onnx" / "decoder.json"
    shutil.copy(Path(str(exported.engine_dir)) / "unet.onnx", tmp_path / "unet.onnx")
    description = json.loads(path.read_text())
    assert description["sha256"].keys() == description["files"].keys()
    path.write_text(json.dumps({key: value for key, value in description.items() if key != "sha256"}))
    load_networks(exported.model_copy(update={"engine_dir": str(path.parent)}))


def test_an_export_of_an_unknown_family_is_refused(exported: DecoderSettings, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="decoder family pooled: unknown; expected sd or sdxl; export the decoder again"
    ):
        find_family("pooled")
    shutil.copytree(str(exported.engine_dir), tmp_path / "export")
    copied = exported.model_copy(update={"engine_dir": str(tmp_path / "export")})
    path = tmp_path / "export" / "decoder.json"
    description = json.loads(path.read_text())
    assert description["family"] == "sd"
    path.write_text(json.dumps({**description, "family": "pooled"}))
    with pytest.raises(InputError, match="decoder family pooled: unknown"):
        load_networks(copied)
    # An export from before families had names is of Stable Diffusion.
    del description["family"]
    path.write_text(json.dumps(description))
    assert load_networks(copied).family is FAMILY


@pytest.fixture
def engines(exported: DecoderSettings, tmp_path: Path) -> Path:
    """A folder as `serving/build_engines.py` writes it, with other bytes in the plans."""
    folder = tmp_path / "engines"
    shutil.copytree(str(exported.engine_dir), folder)
    for name in FAMILY.signatures(deep_cache=False):
        (folder / f"{name}.plan").write_bytes(name.encode())
    sidecar = {
        "machine": {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "tensorrt": "10.14.1"},
        "batch_size": 16,
        "onnx": {"unet.onnx": hash_file(folder / "unet.onnx")},
        "plans": {
            f"{name}.plan": hash_file(folder / f"{name}.plan") for name in FAMILY.signatures(deep_cache=False)
        },
    }
    (folder / "engines.json").write_text(json.dumps(sidecar))
    return folder


H100 = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "tensorrt": "10.14.1"}


def test_engines_of_another_machine_are_refused_before_they_are_loaded(engines: Path) -> None:
    rebuild = "build them here: python serving/build_engines.py .* --batch-size 16"
    check_engines(engines, H100, 16)
    for machine, message in (
        ({"gpu": "NVIDIA L4"}, "built for gpu NVIDIA H100 80GB HBM3, this machine has NVIDIA L4; "),
        ({"compute_capability": "8.9"}, "built for compute_capability 9.0, this machine has 8.9; "),
        ({"tensorrt": "10.15.0"}, "built for tensorrt 10.14.1, this machine has 10.15.0; "),
    ):
        with pytest.raises(UserError, match=message + rebuild):
            check_engines(engines, H100 | machine, 16)
    with pytest.raises(UserError, match=r"built for at most 16 images, decoder.batch_size is 32"):
        check_engines(engines, H100, 32)
    (engines / "unet.plan").write_bytes(b"cut")
    with pytest.raises(UserError, match=f"unet.plan is missing or damaged; {rebuild}"):
        check_engines(engines, H100, 16)
    (engines / "unet.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match=f"unet.onnx has changed since they were built from it; {rebuild}"):
        check_engines(engines, H100, 16)
    (engines / "engines.json").unlink()
    with pytest.raises(UserError, match=f"no engines.json there; {rebuild}"):
        check_engines(engines, H100, 16)


def test_tensorrt_without_a_gpu_is_refused(exported: DecoderSettings) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"torch sees no GPU here; set decoder.engine to torch or onnx"):
        load_networks(exported.model_copy(update={"engine": "tensorrt", "device": "cuda"}))


@pytest.fixture
def by_openvino(exported: DecoderSettings) -> DecoderSettings:
    return exported.model_copy(update={"engine": "openvino"})


def drawn(settings: DecoderSettings) -> np.ndarray:
    images, finite = DenoisingLoop(load_networks(settings), settings).draw(rows_for(settings))
    assert finite.all()
    return images / 255.0


def test_openvino_draws_what_torch_draws(tiny_decoder: DecoderSettings, by_openvino: DecoderSettings) -> None:
    exact = loop_for(tiny_decoder).draw(rows_for(tiny_decoder))[0] / 255.0
    assert psnr(drawn(by_openvino), exact) >= 45
    rounded = drawn(by_openvino.model_copy(update={"dtype": "bfloat16"}))
    assert psnr(rounded, exact) >= 20
    assert not np.array_equal(rounded, exact)


def test_an_item_does_not_depend_on_its_batch_in_openvino(by_openvino: DecoderSettings) -> None:
    rows = rows_for(by_openvino)
    loop = DenoisingLoop(load_networks(by_openvino), by_openvino)
    whole, _ = loop.draw(rows)
    others = rows.take([0, 2, 2, 2, 2][: len(rows)])
    assert np.array_equal(loop.draw(others)[0][0], whole[0])


def test_openvino_compiles_a_graph_of_latents_once_for_each_batch_size(by_openvino: DecoderSettings) -> None:
    networks = load_networks(by_openvino)
    loop = DenoisingLoop(networks, by_openvino)
    rows = rows_for(by_openvino)
    for _ in range(2):
        loop.draw(rows)
    assert isinstance(networks.unet, OpenVinoNetwork)
    assert list(networks.unet.requests) == [2 * len(rows)]
    assert isinstance(networks.encoders["text_encoder"], OpenVinoNetwork)
    assert list(networks.encoders["text_encoder"].requests) == [0]


def test_the_identity_is_that_of_torch_in_the_same_number_format(
    tiny_decoder: DecoderSettings, by_openvino: DecoderSettings
) -> None:
    identity = identify_decoder(by_openvino)
    assert identity == identify_decoder(tiny_decoder)
    assert identity.fingerprint(by_openvino) == identity.fingerprint(tiny_decoder)
    rounded = by_openvino.model_copy(update={"dtype": "bfloat16"})
    assert identity.fingerprint(rounded) != identity.fingerprint(tiny_decoder)


def test_openvino_refuses_a_graph_of_float16_and_other_devices(
    by_openvino: DecoderSettings, tmp_path: Path
) -> None:
    shutil.copytree(str(by_openvino.engine_dir), tmp_path / "half")
    path = tmp_path / "half" / "decoder.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    half = by_openvino.model_copy(update={"engine_dir": str(tmp_path / "half"), "dtype": "bfloat16"})
    with pytest.raises(InputError, match="exported with dtype float16, decoder.dtype is float32"):
        load_networks(half)
    for values, message in (
        ({"device": "cuda"}, "engine openvino runs on the cpu in float32, bfloat16 or int8, this is cuda"),
        ({"dtype": "float16"}, "this is cpu and float16; set device=cpu and dtype=auto"),
        ({"engine": "torch", "engine_dir": None, "dtype": "int8"}, "dtype int8 is for the engines onnx and"),
    ):
        with pytest.raises(ValidationError, match=message):
            DecoderSettings.model_validate({**half.model_dump(), **values})
