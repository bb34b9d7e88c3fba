"""Stable Diffusion XL: each row equals the pipeline called for that item, alone, in a batch and exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import find_family, load_networks
from rebeca_ray.decoder.export import example_inputs, export_network
from rebeca_ray.decoder.exported.onnx_engine import OnnxNetwork
from rebeca_ray.decoder.families import sdxl
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.noise import item_noise
from tests.conftest import D, planned_items, prepare
from tests.decoder.spoiled import copied, in_json
from tests.decoder.test_denoising import SCHEDULERS, loop_for, psnr, rows_for

GUIDANCE = np.array([1, 2, 3, 4, 5], np.float32)
SCALE = np.array([1.0, 0.0, 0.5, 0.2, 1.5], np.float32)


def pipeline_of(settings: DecoderSettings) -> Any:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(settings.model, add_watermarker=False)
    changes = {"clip_sample": False} if settings.scheduler == "ddim" else {}
    pipeline.scheduler = SCHEDULERS[settings.scheduler].from_config(pipeline.scheduler.config, **changes)
    pipeline.load_ip_adapter(
        settings.model,
        subfolder="ip_adapter",
        weight_name="ip-adapter.safetensors",
        image_encoder_folder=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_image(pipeline: Any, settings: DecoderSettings, rows: Rows, row: int) -> np.ndarray:
    """Draw one item with diffusers' pipeline, from the same latents and with the same later noise."""
    pipeline.set_ip_adapter_scale(float(rows.ip_adapter_scale_B[row]))
    size = (settings.image_size or 16) // pipeline.vae_scale_factor
    image = torch.from_numpy(rows.image_embeds_BD[row])[None, None]
    guidance = float(rows.guidance_scale_B[row])
    images = pipeline(
        prompt=rows.prompts[row],
        negative_prompt=rows.negative_prompts[row] or None,  # None means an empty one
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(image), image]) if guidance > 1 else image],
        latents=next(item_noise([rows.seeds[row]], 4 * size * size)).view(1, 4, size, size),
        generator=torch.Generator().manual_seed(rows.seeds[row]),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=guidance,
        height=settings.image_size or 16,
        width=settings.image_size or 16,
        eta=0.3 if settings.scheduler == "tcd" else 0.0,
        output_type="np",
    ).images
    return images[0]  # type: ignore[no-any-return]


def mixed_rows(settings: DecoderSettings) -> Rows:
    return replace(rows_for(settings), guidance_scale_B=GUIDANCE, ip_adapter_scale_B=SCALE)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_row_equals_the_pipeline_called_for_that_item(
    tiny_sdxl: DecoderSettings, scheduler: str
) -> None:
    """Prompt, negative prompt, guidance and image weight differ from row to row."""
    settings = tiny_sdxl.model_copy(update={"scheduler": scheduler})
    pipeline, rows = pipeline_of(settings), mixed_rows(settings)
    drawn, finite = loop_for(settings).draw(rows)
    assert finite.all()
    assert drawn.shape == (5, 16, 16, 3)
    for row in range(5):
        assert psnr(drawn[row] / 255.0, pipeline_image(pipeline, settings, rows, row)) >= 45


def test_the_size_of_the_image_is_an_input(tiny_sdxl: DecoderSettings) -> None:
    settings = tiny_sdxl.model_copy(update={"image_size": 32})
    rows = mixed_rows(settings).take([1, 3])
    drawn, _ = loop_for(settings).draw(rows)
    pipeline = pipeline_of(settings)
    for row in range(2):
        assert psnr(drawn[row] / 255.0, pipeline_image(pipeline, settings, rows, row)) >= 45
    networks = load_networks(settings)
    conditioning = networks.condition(rows, guided=True)
    assert conditioning["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert load_networks(tiny_sdxl).condition(rows)["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_each_row_of_a_batch_equals_the_same_item_alone(tiny_sdxl: DecoderSettings) -> None:
    loop, rows = loop_for(tiny_sdxl), rows_for(tiny_sdxl)
    together, _ = loop.draw(rows)
    for row in range(5):
        alone, _ = loop.draw(rows.take([row] * 5))
        assert np.array_equal(together[row], alone[0])
        assert np.array_equal(alone[0], alone[4])
    for change in (
        {"image_embeds_BD": rows.image_embeds_BD + 1},
        {"prompts": ["noto"] * 5},
        {"negative_prompts": ["food"] * 5},
        {"seeds": [1, 2, 3, 4, 10]},
    ):
        changed, _ = loop.draw(replace(rows, **change))
        for row in range(5):
            assert not np.array_equal(together[row], changed[row]), change


@pytest.mark.parametrize("zeroes", [True, False])
def test_an_empty_negative_prompt_has_zeros_if_the_model_says_so(
    tiny_sdxl: DecoderSettings, tmp_path: Path, zeroes: bool
) -> None:
    settings = copied(tiny_sdxl, tmp_path)
    in_json("model_index.json", force_zeros_for_empty_prompt=zeroes)(Path(settings.model))
    rows, networks = rows_for(settings).take([0, 2]), load_networks(settings)
    conditioning = networks.condition(rows, guided=True)
    assert bool(conditioning["text"][2].any()) is bool(conditioning["pooled"][2].any()) is not zeroes
    assert conditioning["text"][3].any()
    assert conditioning["pooled"][3].any()
    assert conditioning["text"][0].any()
    drawn, _ = DenoisingLoop(networks, settings).draw(rows)
    assert psnr(drawn[0] / 255.0, pipeline_image(pipeline_of(settings), settings, rows, 0)) >= 45
    same = identify_decoder(settings).fingerprint(settings) == identify_decoder(tiny_sdxl).fingerprint(
        tiny_sdxl
    )
    assert same is zeroes


def test_the_two_encoders_have_their_tokenizers(tiny_sdxl: DecoderSettings) -> None:
    networks = load_networks(tiny_sdxl)
    assert networks.family is sdxl.FAMILY
    pads = [networks.tokenizers[name].pad_token for name in ("tokenizer", "tokenizer_2")]
    assert pads == ["<|endoftext|>", "!"]
    text, _, pooled, _ = pipeline_of(tiny_sdxl).encode_prompt(
        "noto food", do_classifier_free_guidance=False, num_images_per_prompt=1
    )
    encoded = sdxl.encode_prompts(networks, ["noto food", ""])
    torch.testing.assert_close(encoded["text"][:1], text)
    torch.testing.assert_close(encoded["pooled"][:1], pooled)
    assert not torch.equal(encoded["pooled"][0], encoded["pooled"][1])


def test_an_export_draws_what_torch_draws(tiny_sdxl: DecoderSettings, cached_sdxl: DecoderSettings) -> None:
    signatures = sdxl.FAMILY.signatures(deep_cache=True)
    encoders = ["text_encoder", "text_encoder_2", "image_projection"]
    assert list(signatures) == [*encoders, "unet", "vae_decoder", "shallow_unet"]
    folder = Path(str(cached_sdxl.engine_dir))
    for name, signature in signatures.items():
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        assert [value.name for value in graph.input] == list(signature.inputs)
        assert [value.name for value in graph.output] == list(signature.outputs)
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output])
    description = json.loads((folder / "decoder.json").read_text())
    assert (description["family"], description["zeroes_negative"]) == ("sdxl", True)
    assert find_family(description["family"]) is sdxl.FAMILY
    exported = tiny_sdxl.model_copy(update={"engine": "onnx", "engine_dir": str(folder)})
    assert identify_decoder(exported) == identify_decoder(tiny_sdxl)
    rows = mixed_rows(tiny_sdxl)
    expected, _ = loop_for(tiny_sdxl).draw(rows)
    loop = DenoisingLoop(load_networks(exported), exported)
    for index in ([0, 1, 2, 3, 4], [2], [0, 3]):
        drawn, finite = loop.draw(rows.take(index))
        assert finite.all()
        for row, original in enumerate(index):
            assert psnr(drawn[row] / 255.0, expected[original] / 255.0) >= 40


@pytest.mark.parametrize("name", ["text_encoder_2", "unet", "shallow_unet", "vae_decoder"])
def test_a_graph_in_float16_is_valid_and_draws_the_same(
    tiny_sdxl: DecoderSettings, tmp_path: Path, name: str
) -> None:
    """Within these networks, some numbers are float32."""
    networks = load_networks(tiny_sdxl.model_copy(update={"dtype": "float16", "cache_interval": 2}))
    signature = networks.family.signatures(deep_cache=True)[name]
    inputs = example_inputs(networks)[name]
    export_network(networks.by_name()[name], inputs, signature, tmp_path / "graph.onnx")
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)
    inputs = tuple(torch.rand_like(value) if value.is_floating_point() else value for value in inputs)
    with torch.inference_mode():
        expected = networks.by_name()[name](*inputs)
    outputs = OnnxNetwork(tmp_path / "graph.onnx", signature, "cpu")(*inputs)
    torch.testing.assert_close(outputs, expected, atol=0.02, rtol=0.02)


def test_another_autoencoder_replaces_the_models(tiny_sdxl: DecoderSettings, tmp_path: Path) -> None:
    """A copy that runs in float16, as `sdxl-vae-fp16-fix` does."""
    shutil.copytree(Path(tiny_sdxl.model) / "vae", tmp_path / "vae")
    in_json("config.json", force_upcast=False)(tmp_path / "vae")
    half = tiny_sdxl.model_copy(update={"dtype": "float16"})
    replaced = half.model_copy(update={"vae": str(tmp_path / "vae")})
    assert identify_decoder(replaced).weights["other_vae/config.json"]
    dtypes = {}
    for name, settings in (("model's", half), ("replaced", replaced)):
        networks = load_networks(settings)
        latents = torch.randn(1, 4, 8, 8, dtype=torch.float16)
        with torch.inference_mode():
            dtypes[name] = networks.vae_decoder(latents).dtype
        assert networks.encoders["text_encoder_2"].model.dtype == torch.float16  # type: ignore[attr-defined]
    # The pipeline of diffusers runs an autoencoder that overflows in float32.
    assert dtypes == {"model's": torch.float32, "replaced": torch.float16}


def test_a_prior_serves_both_families(config: GenerateConfig, tiny_sdxl: DecoderSettings) -> None:
    """Another model changes the images and the decoder's version, and nothing else."""
    nights = [
        prepare(config.model_copy(update={"decoder": decoder})) for decoder in (config.decoder, tiny_sdxl)
    ]
    plans = [
        planned_items(night.run).sort_by([("user_id", "ascending"), ("rank", "ascending")])
        for night in nights
    ]
    assert plans[0].num_rows == 16
    for name in ("user_id", "rank", "prompt", "like_probability"):
        assert plans[0][name].equals(plans[1][name]), name
    assert plans[0]["image_embeds"].to_pylist() == plans[1]["image_embeds"].to_pylist()
    assert [sum(file.rows for file in night.rendered.files) for night in nights] == [16, 16]
    one, other = (night.context.models.versions for night in nights)
    assert [name for name in one if one[name] != other[name]] == ["decoder"]


def test_the_decoder_of_this_process_draws_it(tiny_sdxl: DecoderSettings) -> None:
    rows = rows_for(tiny_sdxl)
    outcomes = LocalDecoder(tiny_sdxl).decode(rows)
    assert [outcome.seed for outcome in outcomes] == list(rows.seeds)
    assert all(outcome.image and outcome.thumbnail and outcome.width == 16 for outcome in outcomes)
    assert identify_decoder(tiny_sdxl).embed_dim == D
