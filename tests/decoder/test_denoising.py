"""The denoising loop: each row of a batch equals the same item alone, also by diffusers' pipeline."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.errors import UserError
from rebeca_ray.noise import item_noise
from rebeca_ray.stickers import DECODER
from tests.conftest import D

SEEDS = [5, 6, 7, 8, 9]
PROMPTS = ["", "noto food pizza", "", "flat animal cat", ""]
NEGATIVE = ["", "", "flat animal cat", "noto", ""]
SCHEDULERS = {
    "dpm_solver": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((one - other) ** 2) + 1e-12))


def rows_for(settings: DecoderSettings, embed_dim: int = D) -> Rows:
    embeds = np.random.default_rng(0).standard_normal((5, embed_dim)).astype(np.float32) * 3
    return Rows.of(settings, embeds, SEEDS, PROMPTS, NEGATIVE)


def loop_for(settings: DecoderSettings) -> DenoisingLoop:
    return DenoisingLoop(load_networks(settings), settings)


def pipeline_image(
    settings: DecoderSettings, rows: Rows, row: int, ip_adapter_scale: float = 1.0
) -> np.ndarray:
    """Draw one item with diffusers' pipeline, from the same latents and with the same later noise."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        settings.model, safety_checker=None, dtype=torch.float32
    )
    # Stable Diffusion's configuration of DDIM does not clip.
    changes = {"clip_sample": False} if settings.scheduler == "ddim" else {}
    pipeline.scheduler = SCHEDULERS[settings.scheduler].from_config(pipeline.scheduler.config, **changes)
    pipeline.load_ip_adapter(
        settings.model,
        subfolder="ip_adapter",
        weight_name="ip-adapter.safetensors",
        image_encoder_folder=None,
    )
    pipeline.set_ip_adapter_scale(ip_adapter_scale)
    pipeline.set_progress_bar_config(disable=True)
    size = (
        settings.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    ) // pipeline.vae_scale_factor
    image = torch.from_numpy(rows.image_embeds_BD[row])[None, None]
    guidance = float(rows.guidance_scale_B[row])
    return pipeline(
        prompt=rows.prompts[row],
        negative_prompt=rows.negative_prompts[row],
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(image), image]) if guidance > 1 else image],
        latents=next(item_noise([rows.seeds[row]], 4 * size * size)).view(1, 4, size, size),
        generator=torch.Generator().manual_seed(rows.seeds[row]),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=guidance,
        eta=0.3 if settings.scheduler == "tcd" else 0.0,  # the pipeline would silently set TCD's to 0
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_row_of_a_batch_equals_the_same_item_alone(
    tiny_decoder: DecoderSettings, scheduler: str
) -> None:
    settings = tiny_decoder.model_copy(update={"scheduler": scheduler})
    loop, rows = loop_for(settings), rows_for(settings)
    together, finite = loop.draw(rows)
    assert together.shape == (5, 16, 16, 3)
    assert finite.all()
    for row in range(5):
        alone, _ = loop.draw(rows.take([row] * 5))
        assert np.array_equal(together[row], alone[0])
        assert np.array_equal(alone[0], alone[4])
    assert not np.array_equal(together[0], together[2])


@pytest.mark.parametrize(
    ("scheduler", "guidance"), [("dpm_solver", 1.0), *((scheduler, 4.0) for scheduler in SCHEDULERS)]
)
def test_each_row_equals_the_pipeline_called_for_that_item(
    tiny_decoder: DecoderSettings, scheduler: str, guidance: float
) -> None:
    settings = tiny_decoder.model_copy(update={"scheduler": scheduler, "decoder_guidance_scale": guidance})
    rows = rows_for(settings)
    ours, _ = loop_for(settings).draw(rows)
    for row in range(5):
        assert psnr(ours[row] / 255.0, pipeline_image(settings, rows, row)) >= 45


def test_the_bundled_decoder_equals_the_pipeline() -> None:
    settings = DecoderSettings(model=str(DECODER), num_inference_steps=4, decoder_guidance_scale=3.0)
    rows = rows_for(settings, 256).take([1, 2])
    ours, _ = loop_for(settings).draw(rows)
    for row in range(2):
        assert psnr(ours[row] / 255.0, pipeline_image(settings, rows, row)) >= 45


def test_too_many_steps_for_a_scheduler_are_refused_at_load(tiny_decoder: DecoderSettings) -> None:
    for scheduler, steps in (("lcm", 51), ("ddim", 1001)):
        with pytest.raises(UserError, match=f"decoder.num_inference_steps {steps}: "):
            loop_for(tiny_decoder.model_copy(update={"scheduler": scheduler, "num_inference_steps": steps}))


def test_guidance_and_image_weight_may_differ_per_row(tiny_decoder: DecoderSettings) -> None:
    loop, rows = loop_for(tiny_decoder), rows_for(tiny_decoder)
    guidance, scale = np.array([1, 2, 3, 4, 5], np.float32), np.array([1.0, 0.0, 0.5, 0.2, 1.0], np.float32)
    mixed, _ = loop.draw(replace(rows, guidance_scale_B=guidance, ip_adapter_scale_B=scale))
    for row in range(5):
        alone = replace(
            rows.take([row] * 5), guidance_scale_B=guidance[[row] * 5], ip_adapter_scale_B=scale[[row] * 5]
        )
        # Alone, a row with guidance 1 is drawn in single passes, which round differently.
        assert psnr(mixed[row] / 255.0, loop.draw(alone)[0][0] / 255.0) >= 60
        expected = pipeline_image(
            tiny_decoder, replace(rows, guidance_scale_B=guidance), row, float(scale[row])
        )
        assert psnr(mixed[row] / 255.0, expected) >= 45


def test_embedding_prompt_negative_prompt_and_seed_each_change_the_image(
    tiny_decoder: DecoderSettings,
) -> None:
    loop = loop_for(tiny_decoder)
    base = rows_for(tiny_decoder).take([0])
    drawn = loop.draw(base)[0]
    for change in (
        {"image_embeds_BD": base.image_embeds_BD + 1},
        {"prompts": ["noto food pizza"]},
        {"negative_prompts": ["noto food pizza"]},
        {"seeds": [2]},
    ):
        assert not np.array_equal(drawn, loop.draw(replace(base, **change))[0]), change


def test_a_lora_is_merged_at_load(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    rows = rows_for(tiny_decoder)
    plain, _ = loop_for(tiny_decoder).draw(rows)
    torch.manual_seed(0)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    low, high = torch.randn(2, 32), torch.randn(32, 2)
    save_file({f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high}, tmp_path / "fast.safetensors")
    merged = loop_for(tiny_decoder.model_copy(update={"lora": str(tmp_path / "fast.safetensors")}))
    by_hand = loop_for(tiny_decoder)
    with torch.no_grad():
        by_hand.networks.unet.get_submodule(name).weight += high @ low  # type: ignore[attr-defined]
    drawn, _ = merged.draw(rows)
    assert not np.array_equal(drawn, plain)
    assert psnr(drawn / 255.0, by_hand.draw(rows)[0] / 255.0) >= 60


def test_a_tiny_autoencoder_replaces_the_full_one(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")
    settings = tiny_decoder.model_copy(update={"vae": str(tmp_path / "taesd")})
    drawn, finite = loop_for(settings).draw(rows_for(settings))
    assert finite.all()
    assert drawn.shape == (5, 16, 16, 3)
    assert not np.array_equal(drawn, loop_for(tiny_decoder).draw(rows_for(tiny_decoder))[0])


class Counted:
    """A UNet that notes the rows of each pass."""

    def __init__(self, unet: object) -> None:
        self.unet, self.rows = unet, []

    def __call__(self, latents: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(latents))
        assert {len(tensor) for tensor in inputs} == {len(latents)}
        return self.unet(latents, *inputs)


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), [1, 1, 1, 1]),
        ((0.25, 0.75), [0, 1, 1, 0]),
        ((0.3, 1.0), [0, 0, 1, 1]),
        ((0.5, 0.5), [0] * 4),
    ],
)
def test_steps_outside_the_guidance_interval_are_single_passes(
    tiny_decoder: DecoderSettings, interval: tuple[float, float], guided: list[int]
) -> None:
    settings = tiny_decoder.model_copy(update={"num_inference_steps": 4, "guidance_interval": interval})
    networks = load_networks(settings)
    counted = Counted(networks.unet)
    images, _ = DenoisingLoop(replace(networks, unet=counted), settings).draw(rows_for(settings))
    assert counted.rows == [5 + 5 * step for step in guided]
    plain = settings.model_copy(update={"guidance_interval": (0.0, 1.0)})
    always, _ = loop_for(plain).draw(rows_for(plain))
    never, _ = loop_for(plain).draw(replace(rows_for(plain), guidance_scale_B=np.ones(5, np.float32)))
    assert np.array_equal(images, always) == all(guided)
    assert (np.abs(images.astype(int) - never).max() <= 1) == (not any(guided))


def test_an_interval_that_ends_before_it_starts_is_refused(tiny_decoder: DecoderSettings) -> None:
    with pytest.raises(ValueError, match=r"guidance_interval starts at 0\.6 and stops at 0\.2; swap them"):
        DecoderSettings.model_validate({**tiny_decoder.model_dump(), "guidance_interval": [0.6, 0.2]})


@pytest.mark.parametrize("family", ["tiny_decoder", "tiny_sdxl"])
def test_a_shallow_pass_after_a_whole_one_of_the_same_inputs_equals_it(
    request: pytest.FixtureRequest, family: str
) -> None:
    settings = request.getfixturevalue(family).model_copy(update={"cache_interval": 2})
    networks = load_networks(settings)
    assert networks.shallow_unet is not None
    rows = rows_for(settings)
    conditioning = networks.condition(rows).in_order(networks.family.conditioning)
    size = networks.image_size // networks.vae_scale_factor
    latents = torch.randn(5, 4, size, size, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((5,), 500)
    with torch.inference_mode():
        whole, deep = networks.unet(latents, timesteps, *conditioning)
        assert deep.shape == (5, networks.deep_channels, size, size)
        torch.testing.assert_close(networks.shallow_unet(latents, timesteps, *conditioning, deep), whole)
        # The first rows of the whole pass, and other noise in the outer blocks.
        some = [tensor[:2] for tensor in (latents, timesteps, *conditioning, deep)]
        torch.testing.assert_close(networks.shallow_unet(*some), whole[:2])
        other = networks.shallow_unet(latents + 0.5, timesteps, *conditioning, deep)
        assert (other - whole).abs().max() > 0.01
        assert not torch.equal(other, networks.unet(latents + 0.5, timesteps, *conditioning)[0])


@pytest.mark.parametrize(
    ("interval", "guided", "expected"),
    [
        (1, (0.0, 1.0), ["w10", "w10", "w10", "w10", "w10"]),
        (2, (0.0, 1.0), ["w10", "s10", "w10", "s10", "w10"]),
        (3, (0.0, 1.0), ["w10", "s10", "s10", "w10", "s10"]),
        (3, (0.0, 0.4), ["w10", "s10", "s5", "w5", "s5"]),
        (3, (0.4, 1.0), ["w5", "s5", "w10", "w10", "s10"]),  # the third step has rows that none kept
    ],
)
def test_passes_between_whole_ones_are_shallow(
    tiny_decoder: DecoderSettings, interval: int, guided: tuple[float, float], expected: list[str]
) -> None:
    settings = tiny_decoder.model_copy(
        update={"num_inference_steps": 5, "cache_interval": interval, "guidance_interval": guided}
    )
    networks, passes = load_networks(settings), []

    def noting(kind: str, unet: object) -> object:
        def run(latents: torch.Tensor, *inputs: torch.Tensor) -> object:
            passes.append(f"{kind}{len(latents)}")
            assert {len(tensor) for tensor in inputs} == {len(latents)}
            return unet(latents, *inputs)

        return run

    noted = replace(
        networks,
        unet=noting("w", networks.unet),
        shallow_unet=networks.shallow_unet and noting("s", networks.shallow_unet),
    )
    images, finite = DenoisingLoop(noted, settings).draw(rows_for(settings))
    assert passes == expected
    assert finite.all()
    again, _ = loop_for(settings).draw(rows_for(settings))
    np.testing.assert_array_equal(images, again)


def test_a_compiled_unet_has_whole_passes_alone(tiny_decoder: DecoderSettings) -> None:
    settings = {**tiny_decoder.model_dump(), "compile": True}
    assert DecoderSettings.model_validate(settings).compile
    with pytest.raises(ValueError, match="cache_interval 2 with compile; .* set cache_interval to 1"):
        DecoderSettings.model_validate({**settings, "cache_interval": 2})
