"""The files of Stable Diffusion XL: its layout passes, and other kinds are refused by name."""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_unet_lora_key,
    _maybe_map_sgm_blocks_to_diffusers,
)
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder import files as files_module
from rebeca_ray.decoder.adapters import read_embed_dim
from rebeca_ray.decoder.families.sd import ImageAttention
from rebeca_ray.decoder.families.sdxl import ConditionedUNet
from rebeca_ray.decoder.files import DecoderFiles, find_decoder, inspect_files
from rebeca_ray.decoder.lora import from_ldm
from rebeca_ray.errors import InputError
from tests.conftest import D
from tests.decoder.spoiled import ADAPTER, Spoil, check_refusal, copied, in_json, in_weights, removed
from tests.decoder.test_lora import Weights
from tests.gpu.sdxl import sdxl_parts, sdxl_unet

Shapes = Mapping[str, tuple[int, ...]]


def adapter_shapes(width: int, embed_dim: int, outputs: list[int]) -> Shapes:
    """An IP-Adapter, given by the sizes of the attentions in the order of its file."""
    return {
        "image_proj.proj.weight": (4 * width, embed_dim),
        "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    } | {
        f"ip_adapter.{2 * index + 1}.to_{key}_ip.weight": (size, width)
        for index, size in enumerate(outputs)
        for key in "kv"
    }


# The official adapters: 640 or 1280 outputs each in SDXL, down, up and middle.
SDXL = [*[640] * 4, *[1280] * 20, *[1280] * 30, *[640] * 6, *[1280] * 10]
SD15 = [*[320] * 2, *[640] * 2, *[1280] * 2, *[1280] * 3, *[640] * 3, *[320] * 3, 1280]


def write_hollow(file: Path, shapes: Shapes) -> None:
    """Write safetensors whose data is a hole in the file: gigabytes of zeros that take no space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def hollow_sdxl(tmp_path_factory: pytest.TempPathFactory) -> DecoderSettings:
    """The exact layout of SDXL and of `ip-adapter_sdxl_vit-h`: configurations, names and shapes."""
    folder = tmp_path_factory.mktemp("hollow")
    for part, network in sdxl_parts("meta").items():
        is_encoder = part.startswith("text_encoder")
        name = "model" if is_encoder else "diffusion_pytorch_model"
        write_hollow(folder / part / f"{name}.fp16.safetensors", shapes_of(network))
        config = network.config.to_dict() if is_encoder else dict(network.config)
        (folder / part / "config.json").write_text(json.dumps(config, default=str))
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part).mkdir()
        for name in ("vocab.json", "merges.txt"):
            (folder / part / name).write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    write_hollow(folder / "ip-adapter_sdxl_vit-h.safetensors", adapter_shapes(2048, 1024, SDXL))
    write_hollow(folder / "ip-adapter_sdxl.safetensors", adapter_shapes(2048, 1280, SDXL))
    write_hollow(folder / "ip-adapter_sd15.safetensors", adapter_shapes(768, 1024, SD15))
    write_hollow(folder / "smaller.safetensors", adapter_shapes(2048, 1024, SDXL[:36]))
    return DecoderSettings(model=str(folder), ip_adapter="ip-adapter_sdxl_vit-h.safetensors")


MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def test_the_exact_layout_of_sdxl_and_its_adapters_passes(hollow_sdxl: DecoderSettings) -> None:
    for name, embed_dim in (
        ("ip-adapter_sdxl_vit-h.safetensors", 1024),
        ("ip-adapter_sdxl.safetensors", 1280),
    ):
        settings = hollow_sdxl.model_copy(update={"ip_adapter": name})
        files = find_decoder(settings)
        inspect_files(settings, files)
        assert read_embed_dim(files.ip_adapter) == embed_dim


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            "ip-adapter_sd15.safetensors",
            r"tokens of width 768 \(Stable Diffusion 1.x\), the model reads 2048 \(SDXL\); expected the same",
        ),
        (
            "smaller.safetensors",
            r"ip_adapter.101.to_k_ip.weight is no tensor; expected 1280 x 2048, as the model's unet reads it "
            r"\(it adapts 36 attentions of 70\); give a plain adapter",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    hollow_sdxl: DecoderSettings, adapter: str, message: str
) -> None:
    settings = hollow_sdxl.model_copy(update={"ip_adapter": adapter})
    with pytest.raises(InputError, match=message):
        inspect_files(settings, find_decoder(settings))


def test_an_adapter_of_sdxl_is_refused_by_a_smaller_model(
    hollow_sdxl: DecoderSettings, tiny_decoder: DecoderSettings
) -> None:
    folder = Path(hollow_sdxl.model)
    files = DecoderFiles(model=Path(tiny_decoder.model), ip_adapter=folder / hollow_sdxl.ip_adapter)
    with pytest.raises(
        InputError, match=r"image tokens of width 2048 \(SDXL\), the model reads 16; expected"
    ):
        inspect_files(tiny_decoder, files)


def test_the_exact_unet_reads_what_the_family_gives_it() -> None:
    unet = sdxl_unet("meta")
    processors = dict(unet.attn_processors)
    crossing = [name for name in processors if name.endswith("attn2.processor")]
    assert len(crossing) == 70
    with torch.device("meta"):
        for name, size in zip(crossing, SDXL, strict=True):
            assert unet.get_submodule(name.removesuffix(".processor")).to_k.out_features == size
            processors[name] = ImageAttention(
                nn.Linear(2048, size, bias=False), nn.Linear(2048, size, bias=False)
            )
        unet.set_attn_processor(processors)
        inputs = (
            torch.empty(2, 4, 128, 128),
            torch.ones(2),
            torch.empty(2, 77, 2048),
            torch.empty(2, 1280),
            torch.empty(2, 6),
            torch.empty(2, 4, 2048),
            torch.empty(2),
        )
        assert ConditionedUNet(unet)(*inputs).shape == (2, 4, 128, 128)


def test_every_layer_in_the_authors_names_is_the_layer_that_diffusers_takes() -> None:
    names = {name.replace(".", "_") for name, _ in sdxl_unet("meta").named_modules()}
    resnet = ["in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection"]
    attention = ["proj_in", "proj_out", *(f"transformer_blocks_{i}_attn2_to_k" for i in range(10))]
    possible = ["input_blocks_0_0", "out_2"]
    possible += [f"{name}_{i}" for name in ("time_embed", "label_emb_0") for i in (0, 2)]
    for way, change in (("input", "0_op"), ("output", "2_conv")):
        rests = [*(f"0_{rest}" for rest in resnet), *(f"1_{rest}" for rest in attention), change]
        possible += [f"{way}_blocks_{i}_{rest}" for i in range(9) for rest in rests]
    possible += [f"middle_block_{i}_{rest}" for i in (0, 2) for rest in resnet]
    possible += [f"middle_block_1_{rest}" for rest in attention]
    present = {name: from_ldm(name, 2) for name in possible if from_ldm(name, 2) in names}
    assert set(possible[:6]) <= set(present)
    assert len([name for name in present if "attn2" in name]) == 70
    assert len([name for name in present if name.endswith("in_layers_2")]) == 17
    assert [name for name in present if name.endswith(("_op", "_2_conv"))] == [
        *("input_blocks_3_0_op", "input_blocks_6_0_op"),
        *("output_blocks_2_2_conv", "output_blocks_5_2_conv"),
    ]
    for name, layer in present.items():
        keys = {f"lora_unet_{name}.lora_down.weight": 0}
        (key,) = _maybe_map_sgm_blocks_to_diffusers(keys, SimpleNamespace(layers_per_block=2))
        theirs = _convert_unet_lora_key(key).replace(".processor", "").removesuffix(".weight")
        assert re.sub(r"[._]lora\.down$", "", theirs).replace(".", "_") == layer, name


WRONG: list[tuple[str, Spoil, str]] = [
    (
        "FLUX",
        in_json(
            "model_index.json",
            _class_name="FluxPipeline",
            transformer=["diffusers", "FluxTransformer2DModel"],
        ),
        "is a FluxPipeline: its image adapters read patch tokens of SigLIP, an item has one embedding; "
        "expected a StableDiffusionPipeline or a StableDiffusionXLPipeline; give a text-to-image model",
    ),
    (
        "SD3",
        in_json("model_index.json", _class_name="StableDiffusion3Pipeline"),
        "is a StableDiffusion3Pipeline: its image adapters read patch tokens of SigLIP",
    ),
    (
        "a transformer",
        in_json("model_index.json", transformer=["diffusers", "SomeTransformer2DModel"]),
        "is a StableDiffusionXLPipeline with transformer; expected a StableDiffusionPipeline or",
    ),
    (
        "refiner",
        in_json("model_index.json", requires_aesthetics_score=True, text_encoder=[None, None]),
        "is the SDXL refiner, which reads an aesthetics score; expected .*; give its base model",
    ),
    (
        "inpainting",
        in_json("unet/config.json", in_channels=9),
        "unet has in_channels 9 and out_channels 4, it is of a StableDiffusionXLPipeline; expected 4",
    ),
    ("distilled", in_json("unet/config.json", time_cond_proj_dim=256), "unet has time_cond_proj_dim 256"),
    (
        "a unet of another base",
        in_json("unet/config.json", addition_embed_type=None),
        "unet has addition_embed_type None and .*; expected text_time and a whole number, as SDXL has",
    ),
    (
        "five time ids",
        in_weights(
            "unet/diffusion_pytorch_model.safetensors",
            lambda w: {**w, "add_embedding.linear_1.weight": torch.zeros(64, 20 + 5 * 8)},
        ),
        "unet reads 60 numbers beside its tokens; expected 20 of text_encoder_2 and 6 time ids of 8 each",
    ),
    (
        "no projection",
        in_weights(
            "text_encoder_2/model.safetensors",
            lambda w: {name: value for name, value in w.items() if name != "text_projection.weight"},
        ),
        "text_encoder_2 has no text_projection.weight",
    ),
    ("no second encoder", removed("text_encoder_2"), "without text_encoder_2; expected unet, vae, text_enc"),
    ("no second tokenizer", removed("tokenizer_2"), "without tokenizer_2"),
    (
        "no second words",
        lambda model: [
            path.unlink() for path in (model / "tokenizer_2").glob("*") if "config" not in path.name
        ],
        "tokenizer_2 has .*; expected tokenizer.json, or vocab.json and merges.txt",
    ),
    (
        "another second encoder",
        in_json("text_encoder_2/config.json", model_type="t5"),
        "text_encoder_2 is a t5; expected a CLIP text model",
    ),
    (
        "a wide second encoder",
        in_weights(
            "text_encoder_2/model.safetensors",
            lambda w: {k: torch.zeros(len(v), 32) if "token_embedding" in k else v for k, v in w.items()},
        ),
        r"text_encoder \+ text_encoder_2 has the width 16 \+ 32, the unet reads 40; expected the same",
    ),
    (
        "Playground's scheduler",
        in_json("scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler"),
        "scheduler is a EDMDPMSolverMultistepScheduler, as Playground v2.5 has; expected one with timesteps",
    ),
    (
        "Playground's autoencoder",
        in_json("vae/config.json", latents_mean=[0.0, 0.0, 0.0, 0.0]),
        r"the autoencoder has latents_mean \[.*, as Playground v2.5 has; expected none",
    ),
    (
        "plus",
        in_weights(ADAPTER, lambda w: other_adapter(w, "image_proj.latents")),
        r"no image_proj.proj.weight to read \(it is called plus and reads patch tokens\); expected",
    ),
    (
        "full",
        in_weights(
            ADAPTER, lambda w: other_adapter(w, "image_proj.proj.0.weight", "image_proj.proj.3.weight")
        ),
        r"no image_proj.proj.weight to read \(it is called full and reads patch tokens\); expected",
    ),
    (
        "Face ID",
        in_weights(ADAPTER, lambda w: other_adapter(w, "image_proj.proj.0.weight")),
        r"no image_proj.proj.weight to read \(it is a FaceID, which reads a face embedding\); expected",
    ),
    (
        "Face ID plus",
        in_weights(
            ADAPTER,
            lambda w: other_adapter(
                w, "image_proj.proj.0.weight", "image_proj.perceiver_resampler.proj_in.weight"
            ),
        ),
        r"it is a FaceID plus, which reads a face embedding and patch tokens\); expected .*sdxl_vit-h",
    ),
]


def other_adapter(weights: Weights, *names: str) -> Weights:
    return {
        **{name: value for name, value in weights.items() if not name.startswith("image_proj.proj")},
        **{name: torch.zeros(1, 16, D) for name in names},
    }


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG, ids=[name for name, _, _ in WRONG])
def test_a_model_of_another_kind_is_refused_by_name(
    tiny_sdxl: DecoderSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Spoil,
    message: str,
) -> None:
    settings = copied(tiny_sdxl, tmp_path)
    spoil(Path(settings.model))
    monkeypatch.setattr(files_module, "hash_weights", lambda files: pytest.fail(f"{name} was accepted"))
    check_refusal(settings, message)
