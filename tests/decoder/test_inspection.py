"""A decoder that cannot be run is refused by its headers; spellings that can be run draw the same images."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.decoder import files as files_module
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from tests.conftest import D
from tests.decoder.test_denoising import loop_for, rows_for

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


def wider(weights: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """An adapter whose tokens have another width."""
    return {
        name: torch.zeros(4 * width, D)
        if name == "image_proj.proj.weight"
        else torch.zeros(4 * width)
        if name == "image_proj.proj.bias"
        else torch.zeros(width)
        if "norm" in name
        else torch.zeros(len(value), width)
        for name, value in weights.items()
    }


def flattened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.flatten() for name, value in weights.items()}


WRONG: list[tuple[str, Spoil, str]] = [
    (
        "SDXL",
        in_json(
            "model_index.json",
            _class_name="StableDiffusionXLPipeline",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
            tokenizer_2=["transformers", "CLIPTokenizer"],
        ),
        "is a StableDiffusionXLPipeline with text_encoder_2, tokenizer_2; expected a StableDiffusionPipeline",
    ),
    (
        "SDXL unet",
        in_json("unet/config.json", addition_embed_type="text_time"),
        "unet has addition_embed_type text_time, as SDXL has; expected none",
    ),
    (
        "ControlNet",
        in_json(
            "model_index.json",
            _class_name="StableDiffusionControlNetPipeline",
            controlnet=["diffusers", "ControlNetModel"],
        ),
        "is a StableDiffusionControlNetPipeline with controlnet; expected a StableDiffusionPipeline",
    ),
    (
        "a transformer",
        in_json(
            "model_index.json",
            _class_name="PixArtAlphaPipeline",
            unet=[None, None],
            transformer=["diffusers", "PixArtTransformer2DModel"],
        ),
        "is a PixArtAlphaPipeline with transformer",
    ),
    (
        "inpainting",
        lambda model: (
            in_json("model_index.json", _class_name="StableDiffusionInpaintPipeline")(model),
            in_json("unet/config.json", in_channels=9)(model),
        ),
        "unet has in_channels 9 and out_channels 4, it is of a StableDiffusionInpaintPipeline; expected 4",
    ),
    (
        "unclip",
        in_json("unet/config.json", class_embed_type="projection"),
        "unet has class_embed_type projection",
    ),
    ("distilled", in_json("unet/config.json", time_cond_proj_dim=256), "unet has time_cond_proj_dim 256"),
    (
        "another unet",
        in_json("unet/config.json", _class_name="UNet3DConditionModel"),
        "unet is a UNet3DConditionModel; expected a UNet2DConditionModel",
    ),
    (
        "config of another unet",
        in_json("unet/config.json", cross_attention_dim=768),
        "to_k.weight of shape .*, its config.json says 768|text_encoder has the width 16",
    ),
    ("no width", in_json("unet/config.json", cross_attention_dim=None), "unet has cross_attention_dim None"),
    ("no widths", in_json("unet/config.json", cross_attention_dim=[]), r"unet has cross_attention_dim \[\]"),
    ("flat weights", in_weights(UNET, flattened), "conv_in.weight of shape"),
    ("flat words", in_weights(TEXT, flattened), "has the width unknown"),
    ("a flat adapter", in_weights(ADAPTER, flattened), "no image_proj.proj.weight to read"),
    (
        "EMA keys",
        in_weights(UNET, lambda w: {f"model_ema.{k.replace('.', '')}": v for k, v in w.items()}),
        "unet has no conv_in.weight, it has model_ema",
    ),
    (
        "EMA folder",
        renamed("unet", "unet_ema"),
        "without unet; expected unet, vae, text_encoder, tokenizer, scheduler; rename unet_ema",
    ),
    (
        "no unet",
        removed("unet"),
        "is a StableDiffusionPipeline without unet; expected .*; copy the whole model",
    ),
    ("no text encoder", removed("text_encoder"), "without text_encoder"),
    ("no tokenizer", removed("tokenizer"), "without tokenizer"),
    ("no scheduler", removed("scheduler"), "without scheduler"),
    ("no vae", removed("vae"), "without vae"),
    (
        "no words",
        lambda model: [
            path.unlink() for path in (model / "tokenizer").glob("*") if "config" not in path.name
        ],
        "tokenizer has .*; expected tokenizer.json, or vocab.json and merges.txt",
    ),
    ("no config", removed("unet/config.json"), "has no unet/config.json; expected a whole diffusers model"),
    (
        "broken config",
        lambda model: (model / "vae/config.json").write_text("{"),
        "vae/config.json is damaged",
    ),
    (
        "a list",
        lambda model: (model / "scheduler/scheduler_config.json").write_text("[]"),
        "scheduler/scheduler_config.json is damaged; expected a JSON object",
    ),
    (
        "broken index",
        lambda model: (model / "model_index.json").write_bytes(b"\xff\xfe"),
        "model_index.json is damaged",
    ),
    ("no weights", removed(UNET), "unet has no weights; expected a .safetensors file"),
    ("cut weights", cut(UNET), f"{UNET} is damaged or missing; expected a whole safetensors file"),
    ("cut text encoder", cut(TEXT), f"{TEXT} is damaged or missing"),
    ("cut vae", cut(VAE), f"{VAE} is damaged or missing"),
    ("Git LFS", pointer(UNET), f"{UNET} is damaged or missing"),
    (
        "pickles",
        renamed(UNET, "unet/diffusion_pytorch_model.bin"),
        r"unet has pickles alone .* rebeca convert .*\.bin .*/unet/diffusion_pytorch_model.safetensors",
    ),
    (
        "pickled text encoder",
        renamed(TEXT, "text_encoder/pytorch_model.bin"),
        r"text_encoder has pickles alone .* /?.*text_encoder/model.safetensors",
    ),
    (
        "two variants",
        lambda model: (
            [
                shutil.copy(model / UNET, model / f"unet/diffusion_pytorch_model.{name}.safetensors")
                for name in ("fp16", "non_ema")
            ]
            and (model / UNET).unlink()
        ),
        "unet has the variants fp16, non_ema; expected one, or plain weights",
    ),
    (
        "no shard",
        lambda model: (
            (model / UNET).unlink(),
            (model / f"{UNET}.index.json").write_text(
                json.dumps(
                    {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
                )
            ),
        ),
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors is damaged or missing",
    ),
    (
        "broken shards",
        lambda model: ((model / UNET).unlink(), (model / f"{UNET}.index.json").write_text("{}")),
        "diffusion_pytorch_model.safetensors.index.json is damaged; expected a weight_map",
    ),
    (
        "another text encoder",
        in_json("text_encoder/config.json", model_type="t5"),
        "text_encoder is a t5; expected a CLIP text model",
    ),
    (
        "a wide text encoder",
        in_weights(
            TEXT,
            lambda w: {k: torch.zeros(len(v), 1024) if "token_embedding" in k else v for k, v in w.items()},
        ),
        "text_encoder has the width 1024, the unet reads 16; expected the same",
    ),
    (
        "16 latents",
        in_json("vae/config.json", latent_channels=16),
        "the autoencoder has 16 latent channels; expected 4",
    ),
    ("a VQ model", in_json("vae/config.json", _class_name="VQModel"), "the autoencoder is a VQModel"),
    (
        "an encoder alone",
        in_weights(VAE, lambda w: {k: v for k, v in w.items() if not k.startswith("decoder.")}),
        "the autoencoder's weights have no decoder",
    ),
    (
        "an oblong model",
        in_json("unet/config.json", sample_size=[8, 16]),
        r"sample_size \[8, 16\]; expected one number",
    ),
    (
        "adapter of SDXL",
        in_weights(ADAPTER, lambda w: wider(w, 2048)),
        r"ip_adapter .*: makes image tokens of width 2048 \(SDXL\), the model reads 16; expected the same",
    ),
    ("adapter of 2.x", in_weights(ADAPTER, lambda w: wider(w, 1024)), r"width 1024 \(Stable Diffusion 2.x\)"),
    (
        "half an adapter",
        in_weights(ADAPTER, lambda w: {k: v for k, v in w.items() if ".1." not in k}),
        "ip_adapter.1.to_k_ip.weight is no tensor; expected 32 x 16, as the model's unet reads it",
    ),
    (
        "too much adapter",
        in_weights(ADAPTER, lambda w: {**w, "ip_adapter.99.to_k_ip.weight": torch.zeros(1, 1)}),
        "ip_adapter.99.to_k_ip.weight is 1 x 1; expected no tensor",
    ),
    (
        "Face ID",
        in_weights(ADAPTER, lambda w: {**w, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(1, 1)}),
        "ip_adapter.0.to_q_lora.down.weight is 1 x 1",
    ),
    (
        "16 image tokens",
        in_weights(
            ADAPTER,
            lambda w: {
                **w,
                "image_proj.proj.weight": torch.zeros(16 * 16, D),
                "image_proj.proj.bias": torch.zeros(16 * 16),
            },
        ),
        "image_proj.proj.bias is 256; expected 64",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG, ids=[name for name, _, _ in WRONG])
def test_a_model_of_another_kind_is_refused_by_name(
    tiny_decoder: DecoderSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Spoil,
    message: str,
) -> None:
    settings = copied(tiny_decoder, tmp_path)
    spoil(Path(settings.model))
    monkeypatch.setattr(files_module, "hash_weights", lambda files: pytest.fail(f"{name} was accepted"))
    with pytest.raises(InputError, match=message) as caught:
        identify_decoder(settings)
    text = str(caught.value)
    assert text.startswith("decoder.")
    assert text.count("; ") >= 2
    assert len(text.splitlines()) == 1
    assert re.search("expected", text)


def fp16_alone(model: Path) -> None:
    renamed(UNET, "unet/diffusion_pytorch_model.fp16.safetensors")(model)
    renamed(TEXT, "text_encoder/model.fp16.safetensors")(model)
    renamed(VAE, "vae/diffusion_pytorch_model.fp16.safetensors")(model)


def sharded(model: Path) -> None:
    for name in (UNET, TEXT):
        weights = load_file(model / name)
        keys = sorted(weights)
        stem = name.removesuffix(".safetensors")
        index = {}
        for number, part in enumerate((keys[::2], keys[1::2]), start=1):
            file = f"{stem}-{number:05}-of-00002.safetensors"
            save_file({key: weights[key] for key in part}, model / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, Path(file).name)
        (model / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (model / name).unlink()


def old_class_names(model: Path) -> None:
    in_json(
        "model_index.json",
        _diffusers_version="0.2.2",
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        scheduler=["diffusers", "KarrasVeSchedulerOfOld"],
    )(model)
    in_json("scheduler/scheduler_config.json", _class_name="KarrasVeSchedulerOfOld")(model)


@pytest.mark.parametrize(
    "respell",
    [
        fp16_alone,
        sharded,
        old_class_names,
        in_json("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"),
        in_json("model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
    ],
)
def test_another_spelling_of_a_model_draws_the_same_images(
    tiny_decoder: DecoderSettings, tmp_path: Path, respell: Spoil
) -> None:
    settings = copied(tiny_decoder, tmp_path)
    respell(Path(settings.model))
    assert identify_decoder(settings).embed_dim == D
    rows = rows_for(tiny_decoder).take([0, 1])
    expected, _ = loop_for(tiny_decoder).draw(rows)
    drawn, _ = DenoisingLoop(load_networks(settings), settings).draw(rows)
    assert np.array_equal(drawn, expected)


def test_a_replacement_of_the_autoencoder_must_fit(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(Path(tiny_decoder.model) / "vae", folder)
    settings = tiny_decoder.model_copy(update={"vae": str(folder)})
    assert identify_decoder(settings).weights["other_vae/config.json"]
    in_json("config.json", scaling_factor=0.13025)(folder)
    with pytest.raises(
        InputError,
        match=r"decoder.vae .*: has the scaling_factor 0.13025, the model's autoencoder has 0.18215",
    ):
        identify_decoder(settings)
    in_json("config.json", latent_channels=16)(folder)
    with pytest.raises(
        InputError, match=r"decoder.vae .*: the autoencoder has 16 latent channels; expected 4"
    ):
        identify_decoder(settings)
    for name, message in (
        (tiny_decoder.model, rf"is a whole model; expected an autoencoder; give {tiny_decoder.model}/vae"),
        (str(tmp_path / "none"), "no such folder; expected an autoencoder"),
    ):
        with pytest.raises(InputError, match=f"decoder.vae {name}: {message}"):
            identify_decoder(tiny_decoder.model_copy(update={"vae": name}))


def test_a_missing_safety_checker_is_seen(tiny_decoder: DecoderSettings) -> None:
    settings = tiny_decoder.model_copy(update={"safety": SafetySettings(checker="stable-diffusion")})
    with pytest.raises(
        InputError,
        match=r"decoder.safety.checker stable-diffusion: .* has no safety_checker/config.json; "
        "give module:function, or set it to null",
    ):
        identify_decoder(settings)


def test_no_word_of_a_library_reaches_a_user(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    """A model may pass by its headers and still not load."""
    settings = copied(tiny_decoder, tmp_path)
    in_json("unet/config.json", block_out_channels=[16, 64])(Path(settings.model))
    with pytest.raises(InputError) as caught:
        load_networks(settings)
    assert re.fullmatch(
        r"decoder.model .*: cannot be loaded \(\w+\); expected files that diffusers saved; save or copy them "
        r"again \(the log at level debug has the reason\)",
        str(caught.value),
    )
