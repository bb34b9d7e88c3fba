"""A LoRA is merged whole, in any spelling, or refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.families.sd import load_pipeline
from rebeca_ray.decoder.files import find_decoder, identify_decoder
from rebeca_ray.errors import InputError

Weights = dict[str, torch.Tensor]
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 32 x 16
CONV = "down_blocks.0.resnets.0.conv1"  # 16 x 16 x 3 x 3
QUERY = "encoder.layers.0.self_attn.q_proj"  # of the text encoder, 16 x 16


def pair(outputs: int, inputs: int, *kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs + inputs)
    down = torch.randn(3, inputs, *kernel, generator=generator)
    return down, torch.randn(outputs, 3, *([1] * len(kernel)), generator=generator)


def kohya(prefix: str, layer: str, down: torch.Tensor, up: torch.Tensor, alpha: float = 3.0) -> Weights:
    name = f"{prefix}{layer.replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(alpha),
    }


def spelled(down_end: str, up_end: str, layer: str, down: torch.Tensor, up: torch.Tensor) -> Weights:
    return {f"{layer}{down_end}": down, f"{layer}{up_end}": up}


def with_lora(settings: DecoderSettings, folder: Path, weights: Weights) -> DecoderSettings:
    save_file(weights, folder / "lora.safetensors")
    return settings.model_copy(update={"lora": str(folder / "lora.safetensors")})


def pipeline_of(settings: DecoderSettings) -> Any:
    return load_pipeline(settings, find_decoder(settings), torch.float32)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (KEY, kohya("lora_unet_", KEY, *pair(32, 16))),
        (KEY, spelled(".lora_A.weight", ".lora_B.weight", f"unet.{KEY}", *pair(32, 16))),
        (KEY, spelled(".lora_A.default.weight", ".lora_B.default.weight", f"unet.{KEY}", *pair(32, 16))),
        (KEY, spelled(".lora_A.weight", ".lora_B.weight", f"base_model.model.{KEY}", *pair(32, 16))),
        (KEY, spelled(".lora.down.weight", ".lora.up.weight", f"unet.{KEY}", *pair(32, 16))),
        (
            KEY,
            spelled(
                "_lora.down.weight", "_lora.up.weight", KEY.replace(".to", ".processor.to"), *pair(32, 16)
            ),
        ),
        (CONV, kohya("lora_unet_", CONV, *pair(16, 16, 3, 3))),
        (
            KEY.replace("to_k", "to_out.0"),
            spelled(
                "_lora.down.weight", "_lora.up.weight", KEY.replace("to_k", "processor.to_out"), *pair(32, 32)
            ),
        ),
        (QUERY, kohya("lora_te_text_model_", QUERY, *pair(16, 16))),
        (QUERY, kohya("lora_te_", QUERY, *pair(16, 16))),
        (
            QUERY,
            spelled(".lora_A.weight", ".lora_B.weight", f"text_encoder.text_model.{QUERY}", *pair(16, 16)),
        ),
        (
            QUERY,
            spelled(
                ".lora_linear_layer.down.weight",
                ".lora_linear_layer.up.weight",
                f"text_encoder.{QUERY}",
                *pair(16, 16),
            ),
        ),
    ],
)
def test_every_spelling_changes_its_layer_alone(
    tiny_decoder: DecoderSettings, tmp_path: Path, layer: str, weights: Weights
) -> None:
    settings = with_lora(tiny_decoder, tmp_path, weights)
    assert "lora/lora.safetensors" in identify_decoder(settings).weights
    before, after = pipeline_of(tiny_decoder), pipeline_of(settings)
    (down,) = (value for key, value in weights.items() if re.search(r"[._]down\.|lora_A", key))
    (up,) = (value for key, value in weights.items() if re.search(r"[._]up\.|lora_B", key))
    for part in ("unet", "text_encoder"):
        old = dict(getattr(before, part).named_parameters())
        for name, value in getattr(after, part).named_parameters():
            if name.removesuffix(".weight").removeprefix("text_model.") == layer and name.endswith(".weight"):
                delta = torch.einsum("ri...,or->oi...", down, up.flatten(1))
                torch.testing.assert_close(value - old[name], delta, atol=1e-5, rtol=1e-4)
                assert delta.abs().max() > 0.1
            else:
                assert torch.equal(value, old[name]), name


def test_a_lora_is_merged_as_diffusers_merges_it(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    """With one alpha and rank, that is. Of several, diffusers confuses those of attentions."""
    weights = {
        **kohya("lora_unet_", KEY, *pair(32, 16), alpha=1.7),
        **kohya("lora_unet_", CONV, *pair(16, 16, 3, 3), alpha=1.7),
    }
    settings = with_lora(tiny_decoder, tmp_path, weights)
    ours = pipeline_of(settings)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_decoder.model, safety_checker=None)
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    expected = dict(theirs.unet.named_parameters())
    for name in (f"{KEY}.weight", f"{CONV}.weight"):
        value = dict(ours.unet.named_parameters())[name]
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


def test_a_lora_without_effect_is_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    good = kohya("lora_unet_", KEY, *pair(32, 16))
    wrong: list[tuple[Weights, str]] = [
        (
            kohya("lora_unet_", KEY, *pair(640, 2048)),
            r"has a down of 3 x 2048 and an up of 640 x 3; the model's weight is 32 x 16",
        ),
        (
            kohya("lora_unet_", "input_blocks.4.1.proj_in", *pair(32, 16)),
            "changes lora_unet_input_blocks_4_1_proj_in, which is no layer of the model",
        ),
        (kohya("lora_te2_", QUERY, *pair(16, 16)), "changes lora_te2_.*, which is no layer of the model"),
        (kohya("lora_unet_", "double_blocks.0.img_attn", *pair(16, 16)), "which is no layer of the model"),
        (kohya("lora_transformer_", KEY, *pair(32, 16)), "which is no layer of the model"),
        (
            {**good, **kohya("lora_unet_", KEY.replace("mid_block", "up_blocks.7"), *pair(32, 16))},
            "up_blocks_7_.*, which is no layer of the model",
        ),
        (
            {key: value for key, value in good.items() if "up" not in key},
            "has alpha and down alone; expected",
        ),
        (
            {**good, f"lora_unet_{KEY.replace('.', '_')}.dora_scale": torch.ones(1, 16)},
            "dora_scale is no part of a plain LoRA, perhaps of a DoRA",
        ),
        ({"lora_unet_a.hada_w1_a": torch.ones(1)}, "hada_w1_a is no part of a plain LoRA"),
        ({"conv_in.weight": torch.ones(1)}, "conv_in.weight is no part of a plain LoRA"),
        ({}, "holds no tensors"),
        (
            {key: value.repeat(2) if "alpha" in key else value for key, value in good.items()},
            "several alphas",
        ),
        (kohya("lora_unet_", KEY, torch.zeros(0, 16), torch.zeros(32, 0)), "a down of 0 x 16"),
        (
            kohya("lora_unet_", CONV, *pair(16, 16, 1, 1)),
            "a down of 3 x 16 x 1 x 1 .* the model's weight is 16 x 16 x 3 x 3",
        ),
    ]
    for weights, message in wrong:
        settings = with_lora(tiny_decoder, tmp_path, weights)
        with pytest.raises(InputError) as caught:
            identify_decoder(settings)
        assert re.search(message, str(caught.value)), str(caught.value)
        assert str(caught.value).startswith(f"decoder.lora {settings.lora}: ")
        assert str(caught.value).endswith("give a plain LoRA of the model's base") or "copy the file" in str(
            caught.value
        )
    (tmp_path / "lora.safetensors").write_bytes(b"junk")
    with pytest.raises(
        InputError, match=r"lora.safetensors is damaged or missing; expected a whole safetensors"
    ):
        identify_decoder(settings)
