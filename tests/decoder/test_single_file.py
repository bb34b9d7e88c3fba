"""A single file draws the images of its diffusers directory; files of other models are refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.decoder.files import (
    find_decoder,
    find_model,
    hash_file,
    identify_decoder,
    inspect_files,
    with_checker,
)
from rebeca_ray.decoder.headers import read_shapes
from rebeca_ray.errors import InputError
from tests.conftest import D
from tests.decoder.spoiled import UNET, check_refusal, in_json, removed
from tests.decoder.test_denoising import loop_for, rows_for
from tests.decoder.test_lora import KEY, kohya, pair, with_lora
from tests.decoder.test_sdxl_files import hollow_sdxl as hollow_sdxl  # a fixture
from tests.decoder.test_sdxl_files import write_hollow
from tests.single_file import Tensors, authors_layout, write_single_file

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module", params=["tiny_decoder", "tiny_sdxl"])
def directory(request: pytest.FixtureRequest) -> DecoderSettings:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def single(directory: DecoderSettings, tmp_path_factory: pytest.TempPathFactory) -> DecoderSettings:
    return write_single_file(directory, tmp_path_factory.mktemp("single"))


@pytest.fixture
def sd(tiny_decoder: DecoderSettings, tmp_path: Path) -> DecoderSettings:
    return write_single_file(tiny_decoder, tmp_path)


def rewrite(settings: DecoderSettings, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(settings.model)), settings.model)


def test_a_single_file_draws_the_images_of_its_directory(
    directory: DecoderSettings, single: DecoderSettings, tmp_path: Path
) -> None:
    rows = rows_for(directory)
    before = hash_file(Path(single.model))
    for settings in (
        directory,
        directory.model_copy(update={"cache_interval": 2}),
        directory.model_copy(update={"dtype": "bfloat16"}),
        with_lora(directory, tmp_path, kohya("lora_unet_", KEY, *pair(32, text_width(directory)))),
    ):
        expected, _ = loop_for(settings).draw(rows)
        drawn, finite = loop_for(settings.model_copy(update={"model": single.model})).draw(rows)
        assert finite.all()
        assert np.array_equal(drawn, expected)
        assert len({image.tobytes() for image in drawn}) == len(drawn)
    assert hash_file(Path(single.model)) == before  # the LoRA is merged in memory alone


def text_width(settings: DecoderSettings) -> int:
    """The width of the tokens that the UNet reads."""
    return read_shapes("", Path(settings.model) / UNET)[f"{KEY}.weight"][1]


def test_another_autoencoder_replaces_that_of_a_single_file(
    tiny_decoder: DecoderSettings, sd: DecoderSettings, tmp_path: Path
) -> None:
    weights = Path(tiny_decoder.model) / "vae"
    shutil.copytree(weights, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)
    rewrite(sd, lambda w: {name: value for name, value in w.items() if "first_stage_model" not in name})
    vae = {"vae": str(tmp_path / "vae")}
    assert "other_vae/config.json" in identify_decoder(sd.model_copy(update=vae)).weights
    rows = rows_for(sd).take([0, 1])
    expected, _ = loop_for(tiny_decoder.model_copy(update=vae)).draw(rows)
    assert np.array_equal(loop_for(sd.model_copy(update=vae)).draw(rows)[0], expected)
    assert not np.array_equal(loop_for(tiny_decoder).draw(rows)[0], expected)


def test_the_identity_is_of_the_file_and_its_configs(directory: DecoderSettings, tmp_path: Path) -> None:
    settings = write_single_file(directory, tmp_path)
    identity = identify_decoder(settings)
    assert identity.embed_dim == D
    folder = identify_decoder(directory)
    configs = {name: sha for name, sha in folder.weights.items() if not name.endswith("model.safetensors")}
    file = {"checkpoint/tiny.safetensors": hash_file(tmp_path / "tiny.safetensors")}
    assert identity.weights == configs | file
    (tmp_path / "elsewhere").mkdir()
    for name in ("tiny", "tiny.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = settings.model_copy(update={"model": str(tmp_path / "elsewhere" / "tiny.safetensors")})
    assert identify_decoder(moved).fingerprint(moved) == identity.fingerprint(settings)
    in_json("scheduler/scheduler_config.json", beta_end=0.02)(tmp_path / "elsewhere" / "tiny")
    assert identify_decoder(moved).fingerprint(moved) != identity.fingerprint(settings)


def test_a_single_file_has_no_safety_checker(sd: DecoderSettings, tmp_path: Path) -> None:
    for name in ("safety_checker/config.json", "safety_checker/model.safetensors"):
        (tmp_path / "tiny" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tiny" / name).write_text("{}")
    (tmp_path / "tiny" / "feature_extractor").mkdir()
    (tmp_path / "tiny" / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    default = sd.model_copy(update={"safety": SafetySettings()})
    assert with_checker(default).safety.checker == "bundled"
    identity = identify_decoder(default)
    assert identity.checker == "bundled"
    assert not [name for name in identity.weights if name.startswith(("safety_checker", "feature_extract"))]
    with pytest.raises(
        InputError, match="is a single file without one; expected a diffusers directory; give"
    ):
        identify_decoder(sd.model_copy(update={"safety": SafetySettings(checker="stable-diffusion")}))


def test_configs_come_from_the_base_in_a_hub_or_the_error_names_the_folder(
    tiny_decoder: DecoderSettings, sd: DecoderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    beside = identify_decoder(sd)
    base = tmp_path / "cache" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.move(tmp_path / "tiny" / "ip_adapter", tmp_path / "ip_adapter")
    sd = sd.model_copy(update={"ip_adapter_repo": str(tmp_path)})
    shutil.move(tmp_path / "tiny", tmp_path / "configs")
    text = check_refusal(sd, "has no configs in .*tiny, and those of stable-diffusion-v1-5/")
    assert f"--include '*.json' --include '*.txt' --local-dir {tmp_path}/tiny` on a machine with" in text
    revision = "0123456789abcdef0123456789abcdef01234567"
    sd = sd.model_copy(update={"revision": revision})
    shutil.move(tmp_path / "configs", base / "snapshots" / revision)
    assert find_model(sd) == base / "snapshots" / revision
    assert identify_decoder(sd) == beside
    # The cache may hold the whole base, whose weights are not those of the file.
    shutil.copytree(tiny_decoder.model, base / "snapshots" / revision, dirs_exist_ok=True)
    assert identify_decoder(sd) == beside
    rows = rows_for(sd).take([0])
    assert np.array_equal(loop_for(sd).draw(rows)[0], loop_for(tiny_decoder).draw(rows)[0])


def adds(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {**weights, **{name: torch.zeros(1) for name in names}}


def renames(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(text: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {name: value for name, value in weights.items() if text not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renames("cond_stage_model.transformer", "cond_stage_model.model.transformer"),
            "is a Stable Diffusion 2.x, and single files of it do not tell .* noise or velocity; "
            "expected a single file of Stable Diffusion 1.x or SDXL; give its diffusers directory",
        ),
        (adds("v_pred"), "predicts velocity, .*; give its diffusers directory"),
        (
            lambda _: {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(1)},
            "is a Stable Diffusion 3: its image adapters read patch tokens of SigLIP, an item has one embed",
        ),
        (
            lambda _: {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)},
            "is a FLUX: its image adapters read patch tokens of SigLIP",
        ),
        (
            renames("cond_stage_model", "conditioner.embedders.0.model"),
            "is the SDXL refiner, which reads an aesthetics score; .*; give its base model",
        ),
        (adds("edm_mean"), "is a Playground v2.5: its scheduler has no timesteps"),
        (
            lambda w: {**w, CONV_IN: torch.zeros(16, 9, 3, 3)},
            "its UNet reads 9 channels; expected 4: models for inpainting, depth or editing read more; give",
        ),
        (without("cond_stage_model"), r"holds alphas_cumprod, .* …, without a UNet .*or one text encoder"),
        (without("model.diffusion_model"), "without a UNet"),
        (
            without("middle_block.1.proj_in.bias"),
            r"unet has mid_block.attentions.0.proj_in.bias as no tensor, and not 32; expected the network of "
            r".*/tiny/unet/config.json; put the configs of this model beside it",
        ),
        (without("first_stage_model.decoder"), "vae has decoder.* as no tensor"),
        (without("token_embedding"), "text_encoder has .*token_embedding.weight as no tensor, and not"),
        (
            lambda w: {name: value[:3] if "layer_norm1.bias" in name else value for name, value in w.items()},
            "text_encoder has encoder.layers.0.layer_norm1.bias as 3, and not 16",
        ),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_by_its_header(
    sd: DecoderSettings, change: Callable[[Tensors], Tensors], message: str
) -> None:
    rewrite(sd, change)
    check_refusal(sd, message)


def test_configs_that_do_not_fit_are_refused(
    sd: DecoderSettings, tiny_sdxl: DecoderSettings, tmp_path: Path
) -> None:
    in_json("unet/config.json", layers_per_block=2)(tmp_path / "tiny")
    check_refusal(sd, "unet .*; expected the network of .*tiny/unet/config.json; put the configs of this")
    in_json("vae/config.json", down_block_types=None)(tmp_path / "tiny")
    in_json("unet/config.json", layers_per_block=1)(tmp_path / "tiny")
    check_refusal(sd, r"vae does not fit it \(TypeError\); expected the network of")
    removed("vae/config.json")(tmp_path / "tiny")
    check_refusal(sd, "has no vae/config.json")
    shutil.copy(Path(tiny_sdxl.model) / "model_index.json", tmp_path / "tiny")
    check_refusal(sd, "is of the family sd, .*tiny/model_index.json of sdxl; expected the same; put the conf")


def test_pickles_and_missing_files_are_refused(sd: DecoderSettings, tmp_path: Path) -> None:
    for name, message in (
        ("old.ckpt", "a pickle can run code when loaded; .*: rebeca convert .*old.ckpt .*/old.safetensors$"),
        ("absent.safetensors", "no such file; give the path of a single file, a diffusers directory, or a"),
    ):
        default = sd.model_copy(update={"model": str(tmp_path / name), "safety": SafetySettings()})
        for settings in (default, sd.model_copy(update={"model": str(tmp_path / name)})):
            with pytest.raises(InputError, match=message):
                identify_decoder(settings)
    Path(sd.model).write_bytes(Path(sd.model).read_bytes()[:-10])
    check_refusal(sd, "tiny.safetensors is damaged or missing; expected a whole safetensors file")


def test_the_exact_layout_of_sdxl_passes(hollow_sdxl: DecoderSettings, tmp_path: Path) -> None:
    model = Path(hollow_sdxl.model)
    files = {path.parent.name: path for path in model.glob("*/*.safetensors")}
    tensors = authors_layout({part: on_meta(path) for part, path in files.items()})
    assert infer_diffusers_model_type(tensors) == "xl_base"
    write_hollow(tmp_path / "xl.safetensors", {name: tuple(value.shape) for name, value in tensors.items()})
    shutil.copytree(model, tmp_path / "xl", ignore=shutil.ignore_patterns("*.fp16.safetensors"))
    settings = hollow_sdxl.model_copy(update={"model": str(tmp_path / "xl.safetensors")})
    inspect_files(settings, find_decoder(settings))


def on_meta(file: Path) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in read_shapes("", file).items()}
