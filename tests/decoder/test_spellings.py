"""Models in other spellings draw the same images, and replacements must fit."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from tests.conftest import D
from tests.decoder.spoiled import TEXT, UNET, VAE, Spoil, copied, in_json, renamed
from tests.decoder.test_denoising import loop_for, rows_for


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
        "give bundled, module:function, or none",
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
