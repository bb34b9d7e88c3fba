"""`auto` becomes the device and the number format of the machine that draws, once for a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder import choices
from rebeca_ray.decoder.choices import choose, computes_bfloat16, is_open
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.generation.rendering.checks import with_choices
from tests.conftest import snapshot_of

AUTO = {"device": "auto", "dtype": "auto"}


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "device", "dtype"),
    [
        (False, False, "cpu", "float32"),
        (False, True, "cpu", "bfloat16"),
        (True, True, "cuda", "float16"),
        (True, False, "cuda", "float16"),
    ],
)
def test_the_choice_for_torch(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, bfloat16: bool, device: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(choices, "computes_bfloat16", lambda: bfloat16)
    settings = DecoderSettings.model_validate({"model": "owner/name", **AUTO})
    chosen = choose(settings)
    assert (chosen.device, chosen.dtype) == (device, dtype)
    assert is_open(settings)
    assert not is_open(chosen)
    given = settings.model_copy(update={"dtype": "float32"})
    assert choose(given).dtype == "float32"


@pytest.mark.parametrize(
    ("engine", "exported", "bfloat16", "dtype"),
    [
        ("onnx", "float16", True, "float16"),
        ("openvino", "float32", True, "bfloat16"),
        ("openvino", "float32", False, "float32"),
        ("openvino", "int8", True, "int8"),
        ("openvino", None, False, "float32"),
    ],
)
def test_an_export_decides_for_its_engine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    engine: str,
    exported: str | None,
    bfloat16: bool,
    dtype: str,
) -> None:
    if exported:
        (tmp_path / "decoder.json").write_text(json.dumps({"dtype": exported}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: engine == "openvino")
    monkeypatch.setattr(choices, "computes_bfloat16", lambda: bfloat16)
    values = {"model": "owner/name", "engine": engine, "engine_dir": str(tmp_path), **AUTO}
    chosen = choose(DecoderSettings.model_validate(values))
    assert (chosen.device, chosen.dtype) == ("cpu", dtype)


@pytest.mark.parametrize(
    ("capabilities", "computes"),
    [({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({}, False)],
)
def test_bfloat16_needs_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], computes: bool
) -> None:
    """AVX-512 alone only emulates it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computes_bfloat16() is computes


def test_the_choice_is_logged_and_is_the_identity_of_the_items(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "computes_bfloat16", lambda: True)
    chosen = identify_decoder(config.decoder).fingerprint(
        config.decoder.model_copy(update={"dtype": "bfloat16"})
    )
    open_config = config.model_copy(update={"decoder": config.decoder.model_copy(update=AUTO)})
    with caplog.at_level(logging.INFO, "rebeca_ray"):
        manifest = snapshot_of(open_config)
    assert "decoder: device cpu, dtype bfloat16, chosen on a machine that draws" in caplog.text
    assert manifest.versions["decoder"] == chosen
    assert LocalDecoder(open_config.decoder).settings.dtype == "bfloat16"


@pytest.mark.usefixtures("ray_local")
def test_a_task_with_the_resources_of_a_render_actor_chooses(config: GenerateConfig) -> None:
    expected = "bfloat16" if computes_bfloat16() else "float32"
    open_config = config.model_copy(update={"decoder": config.decoder.model_copy(update=AUTO)})
    decoder = with_choices(open_config, in_process=False).decoder
    assert (decoder.device, decoder.dtype) == ("cpu", expected)
    assert with_choices(config, in_process=False) is config


@pytest.mark.parametrize("values", [{"device": "auto"}, {"dtype": "auto"}])
def test_a_server_has_chosen_already(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="cannot be auto with backend triton, whose server has chosen"):
        DecoderSettings.model_validate({"model": "owner/name", "backend": "triton", **values})
