"""The decoder: each row of a batch equals that item alone, and equals StableDiffusionPipeline called for it alone."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from rebeca_ray.config import DecoderSettings
from rebeca_ray.decoder_files import adapter_location, decoder_embed_dim, decoder_fingerprint
from rebeca_ray.decoding import DiffusersDecoder, encode_image
from rebeca_ray.errors import UserError
from rebeca_ray.sampling import item_noise
from tests.conftest import D

SEEDS = [5, 6, 7, 8, 9]
PROMPTS = ["", "noto food pizza", "", "flat animal cat", ""]


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, D)).astype(np.float32) * 3


def test_every_row_of_a_batch_equals_that_item_alone(tiny_decoder: DecoderSettings, embeds: np.ndarray) -> None:
    decoder = DiffusersDecoder(tiny_decoder)
    together = decoder.decode(embeds, SEEDS, PROMPTS)
    assert together.shape == (5, 16, 16, 3)
    for row in range(5):
        alone = decoder.decode(embeds[row : row + 1], SEEDS[row : row + 1], PROMPTS[row : row + 1])[0]
        assert np.array_equal(together[row], alone)
    assert not np.array_equal(together[0], together[2])


@pytest.mark.parametrize(("scheduler", "guidance"), [("dpm_solver", 1.0), ("dpm_solver", 4.0), ("ddim", 4.0)])
def test_it_equals_the_pipeline_called_for_one_item(
    tiny_decoder: DecoderSettings, embeds: np.ndarray, scheduler: str, guidance: float
) -> None:
    settings = tiny_decoder.model_copy(update={"scheduler": scheduler, "decoder_guidance_scale": guidance})
    ours = DiffusersDecoder(settings).decode(embeds, SEEDS, PROMPTS)
    pipeline = StableDiffusionPipeline.from_pretrained(settings.model, safety_checker=None)
    if scheduler == "ddim":  # as Stable Diffusion's own DDIM configuration has it
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    else:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(settings.model, subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    pipeline.set_progress_bar_config(disable=True)
    for row in range(5):
        image = torch.from_numpy(embeds[row])[None, None]
        theirs = pipeline(
            prompt=PROMPTS[row],
            ip_adapter_image_embeds=[torch.cat([torch.zeros_like(image), image]) if guidance > 1 else image],
            latents=next(item_noise(SEEDS[row : row + 1], 4 * 8 * 8)).view(1, 4, 8, 8),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=guidance,
            output_type="np",
        ).images[0]
        error = ((ours[row] / 255.0 - theirs) ** 2).mean()
        assert -10 * np.log10(error + 1e-12) >= 45


def test_embedding_prompt_seed_and_scale_each_change_the_image(tiny_decoder: DecoderSettings, embeds: np.ndarray) -> None:
    decoder = DiffusersDecoder(tiny_decoder)
    base = decoder.decode(embeds[:1], [1], [""])
    assert not np.array_equal(base, decoder.decode(embeds[1:2], [1], [""]))
    assert not np.array_equal(base, decoder.decode(embeds[:1], [1], ["noto food pizza"]))
    assert not np.array_equal(base, decoder.decode(embeds[:1], [2], [""]))
    weaker = DiffusersDecoder(tiny_decoder.model_copy(update={"ip_adapter_scale": 0.2}))
    assert not np.array_equal(base, weaker.decode(embeds[:1], [1], [""]))


def test_embed_dim_is_read_from_the_adapters_header(tiny_decoder: DecoderSettings) -> None:
    assert decoder_embed_dim(tiny_decoder) == D


def test_adapters_that_read_something_else_are_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    save_file({"image_proj.latents": torch.zeros(1, 16, 768)}, tmp_path / "ip-adapter-plus_sd15.safetensors")
    plus = tiny_decoder.model_copy(update={"ip_adapter_repo": str(tmp_path), "ip_adapter": "ip-adapter-plus_sd15.safetensors"})
    with pytest.raises(UserError, match=r"no image_proj.proj.weight to read .*; give a plain adapter such as ip-adapter_sd15"):
        decoder_embed_dim(plus)
    (tmp_path / "ip-adapter-plus_sd15.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no image_proj.proj.weight to read"):
        decoder_embed_dim(plus)


def test_a_hub_that_cannot_be_reached_is_one_line(tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = tiny_decoder.model_copy(update={"ip_adapter_repo": "h94/IP-Adapter", "ip_adapter": "models/ip-adapter_sd15.safetensors"})
    with pytest.raises(
        UserError, match=r"cannot be fetched from h94/IP-Adapter .*run `hf download h94/IP-Adapter models/ip-adapter_sd15"
    ) as caught:
        decoder_embed_dim(hub)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_what_is_drawn(tiny_decoder: DecoderSettings) -> None:
    same = decoder_fingerprint(tiny_decoder)
    assert decoder_fingerprint(tiny_decoder.model_copy(update={"batch_size": 9, "num_actors": 3})) == same
    assert decoder_fingerprint(tiny_decoder.model_copy(update={"num_inference_steps": 4})) != same


def test_missing_weights_and_pickles_are_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model_index.json there; give a diffusers directory"):
        DiffusersDecoder(tiny_decoder.model_copy(update={"model": str(tmp_path), "ip_adapter_repo": tiny_decoder.model}))
    with pytest.raises(UserError, match="no such file"):
        adapter_location(tiny_decoder.model_copy(update={"ip_adapter": "other/ip-adapter.safetensors"}))
    with pytest.raises(UserError, match="a pickle can run code"):
        adapter_location(tiny_decoder.model_copy(update={"ip_adapter": "ip_adapter/ip-adapter.bin"}))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_encoding(image_format: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    opened = Image.open(io.BytesIO(encode_image(image, image_format, 100)))
    assert (opened.format, opened.size) == (image_format, (48, 32))
    if image_format != "JPEG":
        assert np.array_equal(np.asarray(opened.convert("RGB")), image)
    assert Image.open(io.BytesIO(encode_image(image, image_format, 90, max_size=16))).size == (16, 11)
