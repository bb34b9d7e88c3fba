"""A LoRA of SDXL: every spelling is merged as diffusers merges it, and one of another base is refused."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.families.sdxl import load_pipeline
from rebeca_ray.decoder.files import find_decoder, identify_decoder
from rebeca_ray.errors import InputError
from tests.decoder.test_lora import Weights, kohya, pair, spelled, with_lora

QUERY = "encoder.layers.0.self_attn.q_proj"
# Layers of the tiny UNet: in diffusers, in the code of SDXL's authors, and their sizes.
LAYERS = [
    ("down_blocks.0.resnets.0.conv1", "input_blocks_1_0_in_layers_2", (16, 16, 3, 3)),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks_2_0_op", (16, 16, 3, 3)),
    (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "input_blocks_3_1_transformer_blocks_0_attn2_to_k",
        (32, 40),
    ),
    (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "middle_block_1_transformer_blocks_0_attn1_to_out_0",
        (32, 32),
    ),
    ("mid_block.resnets.1.conv2", "middle_block_2_out_layers_3", (32, 32, 3, 3)),
    (
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
        "output_blocks_1_1_transformer_blocks_0_ff_net_2",
        (32, 128),
    ),
    ("up_blocks.1.resnets.1.conv_shortcut", "output_blocks_3_0_skip_connection", (16, 32, 1, 1)),
]


@pytest.mark.parametrize("names", ["diffusers", "authors"])
def test_a_lora_is_merged_as_diffusers_merges_it(
    tiny_sdxl: DecoderSettings, tmp_path: Path, names: str
) -> None:
    weights: Weights = {}
    for layer, ldm, (outputs, inputs, *kernel) in LAYERS:
        down, up = pair(outputs, inputs, *kernel)
        weights |= kohya("lora_unet_", layer if names == "diffusers" else ldm, down, up, alpha=1.7)
    for prefix, width in (("lora_te1_text_model_", 16), ("lora_te2_text_model_", 24)):
        for layer in (QUERY, QUERY.replace("q_proj", "out_proj")):  # diffusers needs the latter
            weights |= kohya(prefix, layer, *pair(width, width), alpha=1.7)
    settings = with_lora(tiny_sdxl, tmp_path, weights)
    assert "lora/lora.safetensors" in identify_decoder(settings).weights
    ours = load_pipeline(settings, find_decoder(settings), torch.float32)
    before = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl.model, add_watermarker=False)
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl.model, add_watermarker=False)
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    changed = []
    for part in ("unet", "text_encoder", "text_encoder_2"):
        merged = dict(getattr(ours, part).named_parameters())
        old = dict(getattr(before, part).named_parameters())
        for name, value in getattr(theirs, part).named_parameters():
            torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)
            if not torch.equal(merged[name], old[name]):
                changed.append(f"{part}.{name.removeprefix('text_model.').removesuffix('.weight')}")
    expected = [f"unet.{layer}" for layer, _, _ in LAYERS]
    expected += [f"{part}.{QUERY}" for part in ("text_encoder", "text_encoder_2")]
    expected += [layer.replace("q_proj", "out_proj") for layer in expected[-2:]]
    assert sorted(changed) == sorted(expected)


@pytest.mark.parametrize(
    ("part", "width", "weights"),
    [
        ("text_encoder", 16, kohya("lora_te1_", QUERY, *pair(16, 16))),
        (
            "text_encoder",
            16,
            spelled(".lora_A.weight", ".lora_B.weight", f"text_encoder.text_model.{QUERY}", *pair(16, 16)),
        ),
        ("text_encoder_2", 24, kohya("lora_te2_", QUERY, *pair(24, 24))),
        (
            "text_encoder_2",
            24,
            spelled(".lora_A.weight", ".lora_B.weight", f"text_encoder_2.text_model.{QUERY}", *pair(24, 24)),
        ),
        (
            "text_encoder_2",
            24,
            spelled(
                ".lora_linear_layer.down.weight",
                ".lora_linear_layer.up.weight",
                f"text_encoder_2.text_model.{QUERY}",
                *pair(24, 24),
            ),
        ),
    ],
)
def test_a_lora_changes_the_text_encoder_that_it_names(
    tiny_sdxl: DecoderSettings, tmp_path: Path, part: str, width: int, weights: Weights
) -> None:
    settings = with_lora(tiny_sdxl, tmp_path, weights)
    identify_decoder(settings)
    before, after = (load_pipeline(s, find_decoder(s), torch.float32) for s in (tiny_sdxl, settings))
    down, up = pair(width, width)
    for network in ("unet", "text_encoder", "text_encoder_2"):
        old = dict(getattr(before, network).named_parameters())
        for name, value in getattr(after, network).named_parameters():
            if network == part and name.removeprefix("text_model.") == f"{QUERY}.weight":
                torch.testing.assert_close(value - old[name], up @ down, atol=1e-5, rtol=1e-4)
            else:
                assert torch.equal(value, old[name]), name


def test_a_lora_of_another_base_is_refused(
    tiny_sdxl: DecoderSettings, tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    for settings, weights, message in (
        (
            tiny_decoder,
            kohya("lora_te2_", QUERY, *pair(24, 24)),
            "lora_te2_.*, which is no layer of the model",
        ),
        (
            tiny_sdxl,
            kohya("lora_te2_", QUERY, *pair(16, 16)),
            "the model's weight is 24 x 24; give a plain LoRA",
        ),
        (
            tiny_sdxl,
            kohya("lora_unet_", "input_blocks_8_1_proj_in", *pair(32, 32)),
            "changes lora_unet_input_blocks_8_1_proj_in, which is no layer of the model",
        ),
        (tiny_sdxl, {"lora_te2_text.dora_scale": torch.ones(1)}, "is no part of a plain LoRA"),
    ):
        with pytest.raises(InputError, match=message):
            identify_decoder(with_lora(settings, tmp_path, weights))
