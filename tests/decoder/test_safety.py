"""The safety checker: the bundled one equals the original network, and the choice is part of the identity."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.decoder.build import check_decoder, needs_check
from rebeca_ray.decoder.files import find_model, hash_file, identify_decoder, with_checker
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.safety import load_checker
from rebeca_ray.decoder.safety_model import CONFIG, WEIGHTS
from rebeca_ray.decoder.safety_model.convert import convert
from rebeca_ray.decoder.safety_model.network import BundledChecker, load_weights
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import DECODER
from tests.conftest import D
from tests.decoder.safety_reference.images import pictures

REFERENCE = Path(__file__).parent / "safety_reference" / "expected.json"
CLASSES = json.loads(CONFIG.read_text())["classes"]


@pytest.fixture(scope="module")
def checker() -> BundledChecker:
    return BundledChecker("cpu")


def with_safety(settings: DecoderSettings, **values: object) -> DecoderSettings:
    return settings.model_copy(update={"safety": SafetySettings(**values)})


def with_model_checker(settings: DecoderSettings, folder: Path) -> DecoderSettings:
    """The same model with files of a safety checker of its own, by default the checker."""
    shutil.copytree(settings.model, folder)
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    unet = Path(settings.model) / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, folder / "safety_checker" / "model.safetensors")
    return with_safety(settings.model_copy(update={"model": str(folder)}))


def test_the_network_equals_the_one_of_nsfwjs(checker: BundledChecker) -> None:
    """`expected.json` is the output of the npm package itself; `safety_reference/images.py` says how."""
    expected = json.loads(REFERENCE.read_text())
    images = pictures()
    assert list(images) == list(expected)
    for name, image in images.items():
        probabilities = checker.classify(image[None])
        np.testing.assert_allclose(
            probabilities[0], [expected[name][kind] for kind in CLASSES], atol=1e-5, err_msg=name
        )
        unsafe = sum(expected[name][kind] for kind in ("Hentai", "Porn", "Sexy"))
        np.testing.assert_allclose(checker(image[None]), [unsafe], atol=1e-5, err_msg=name)
    assert max(expected[name]["Porn"] for name in expected) > 0.8  # not all of them are harmless to it


def test_a_package_becomes_the_shipped_weights(tmp_path: Path) -> None:
    """A package of two weights in the layout of nsfwjs: names, shapes, bytes and ranges are kept."""
    models = tmp_path / "dist" / "models" / "mobilenet_v2"
    models.mkdir(parents=True)
    (models / "model.min.js").write_text(
        '{name:"b/kernel",shape:[1,2],dtype:"float32",quantization:{min:-.5,scale:.25,dtype:"uint8"}},'
        '{name:"a/bias",shape:[2],dtype:"float32",quantization:{min:1,scale:2e-3,dtype:"uint8"}}'
    )
    (models / "group1-shard1of1.min.js").write_text('e.exports="AQID/w=="')
    convert(tmp_path, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["b/kernel"].tolist() == [[1, 2]]
    assert weights["a/bias"].tolist() == [3, 255]
    assert weights["quantization"].tolist() == [[0.002, 1.0], [0.25, -0.5]]
    (models / "group1-shard1of1.min.js").write_text('e.exports="AQID"')
    with pytest.raises(InputError, match="2 weights of 4 bytes are described, 3 bytes are held"):
        convert(tmp_path, tmp_path / "model.safetensors")
    assert len(load_weights()) == 266
    assert WEIGHTS.stat().st_size < 2_700_000


def test_a_probability_does_not_depend_on_other_images(checker: BundledChecker) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    images[1], images[2], images[3] = 0, 255, images[0]
    probabilities = checker(images)
    assert probabilities.shape == (5,)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert probabilities[3] == probabilities[0]
    assert [float(checker(image[None])[0]) for image in images] == probabilities.tolist()
    tiled = BundledChecker("cpu")
    tiled.tile = 4  # the last tile is padded, as on a GPU
    np.testing.assert_allclose(tiled(images), probabilities, atol=1e-6)


def test_only_drawn_images_of_a_batch_with_bad_values_are_checked(tiny_decoder: DecoderSettings) -> None:
    embeds = np.random.default_rng(0).standard_normal((3, D)).astype(np.float32)
    embeds[1, 0] = np.nan
    decoder = LocalDecoder(with_safety(tiny_decoder, policy="flag"))
    rows = Rows.of(tiny_decoder, embeds, range(3))
    first, failed, last = decoder.decode(rows)
    assert failed == replace(failed, error="image_embeds is not finite", safety_probability=None, image=None)
    assert None not in (first.safety_probability, last.safety_probability)
    assert decoder.decode(rows.take([2])) == [last]
    unchecked = LocalDecoder(tiny_decoder).decode(rows.take([2]))[0]
    assert unchecked == replace(last, safety_probability=None)


def test_the_default_is_the_checker_of_the_model_or_the_bundled_one(
    tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    for settings in (DecoderSettings(model=str(DECODER)), with_safety(tiny_decoder)):
        assert settings.safety.checker is None
        assert with_checker(settings).safety.checker == "bundled"
        assert isinstance(load_checker(settings), BundledChecker)
        assert not needs_check(settings)
    model = with_model_checker(tiny_decoder, tmp_path / "sd")
    assert with_checker(model).safety.checker == "stable-diffusion"
    assert needs_check(model)
    with pytest.raises(InputError, match="has none that loads .*; give bundled, module:function, or none"):
        check_decoder(model)
    # One that comes as a pickle alone is not chosen.
    weights = tmp_path / "sd" / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert with_checker(model).safety.checker == "bundled"


def test_the_default_of_an_exported_decoder_follows_its_origin(
    tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    names = ["safety_checker/config.json", "feature_extractor/preprocessor_config.json", "unet/a.safetensors"]
    exported = with_safety(tiny_decoder, max_attempts=2).model_copy(
        update={"engine": "onnx", "engine_dir": str(tmp_path), "model": "gone"}
    )
    for weights, checker in (
        (names, "bundled"),
        ([*names, "safety_checker/b.safetensors"], "stable-diffusion"),
    ):
        (tmp_path / "decoder.json").write_text(json.dumps({"weights": dict.fromkeys(weights, "0")}))
        assert with_checker(exported).safety == SafetySettings(checker=checker, max_attempts=2)
    with pytest.raises(InputError, match="; or give bundled, module:function, or none as the checker"):
        load_checker(exported.model_copy(update={"model": str(tmp_path / "gone")}))


def test_a_hub_model_is_fetched_with_its_checker_if_that_may_be_used(
    tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def download(model: str, **options: object) -> str:
        fetched.append("safety_checker" not in options)
        return tiny_decoder.model

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    for checker in (None, "stable-diffusion", "bundled", "none", "json:dumps"):
        hub = with_safety(tiny_decoder, checker=checker).model_copy(update={"model": "owner/model"})
        assert find_model(hub) == Path(tiny_decoder.model)
    assert fetched == [True, True, False, False, False]
    assert with_checker(with_safety(hub)).safety.checker == "bundled"


def test_none_checks_no_image(tiny_decoder: DecoderSettings) -> None:
    settings = with_safety(tiny_decoder, checker="none")
    assert load_checker(settings) is None
    assert not needs_check(settings)
    (drawn,) = LocalDecoder(settings).decode(Rows.of(settings, np.ones((1, D), np.float32), [0]))
    assert drawn.image
    assert drawn.safety_probability is None


def test_the_identity_changes_with_the_checker(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    fingerprints = {}
    for name in (None, "bundled", "none", "json:dumps"):
        settings = with_safety(tiny_decoder, checker=name)
        identity = identify_decoder(settings)
        fingerprints[name] = identity.fingerprint(settings)
        assert identity.checker == (name or "bundled")
        hashes = {key: sha for key, sha in identity.weights.items() if key.startswith("bundled_checker/")}
        files = (CONFIG, WEIGHTS) if identity.checker == "bundled" else ()
        assert hashes == {f"bundled_checker/{file.name}": hash_file(file) for file in files}
    assert fingerprints[None] == fingerprints["bundled"]
    assert len(set(fingerprints.values())) == 3
    # The files of the model's checker count only where it is used.
    model = with_model_checker(tiny_decoder, tmp_path / "sd")
    identity = identify_decoder(model)
    assert identity.checker == "stable-diffusion"
    assert "safety_checker/model.safetensors" in identity.weights
    assert identity.fingerprint(model) not in fingerprints.values()
    for name in ("bundled", "none"):
        settings = with_safety(model, checker=name)
        assert identify_decoder(settings).fingerprint(settings) == fingerprints[name]


def test_the_licence_of_the_weights_is_beside_them() -> None:
    notice = (WEIGHTS.parent / "NOTICE").read_text()
    for words in ("nsfwjs 4.3.0", "MIT License", "Copyright (c) 2019 Infinite Red, Inc."):
        assert words in notice
    assert "rebeca_ray/decoder/safety_model/NOTICE" in (WEIGHTS.parents[3] / "pyproject.toml").read_text()
