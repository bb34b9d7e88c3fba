"""Distillation into a LoRA for few unguided passes: its steps against diffusers, and a LoRA it makes."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.stickers.build import lcm
from rebeca_ray.stickers.build.unet import new_scheduler

FEW_STEPS = DecoderSettings(
    model=str(DECODER), scheduler="lcm", num_inference_steps=4, decoder_guidance_scale=1.0
)


@pytest.mark.parametrize("timestep", [999, 499, 19])
def test_a_step_of_the_teacher_is_one_of_ddim(timestep: int) -> None:
    ddim = diffusers.DDIMScheduler.from_config(
        new_scheduler().config, clip_sample=False, set_alpha_to_one=False
    )
    ddim.set_timesteps(1000 // lcm.STRIDE)
    generator = torch.Generator().manual_seed(0)
    x, velocity = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    step = lcm.Schedule().ddim_step(x, velocity, torch.tensor([timestep] * 2))
    torch.testing.assert_close(step, ddim.step(velocity, timestep, x).prev_sample)


def test_the_consistency_function_weighs_as_diffusers_and_keeps_a_latent_without_noise() -> None:
    x, clean = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = lcm.consistent(x, clean, torch.tensor([0, 19, 999]))
    torch.testing.assert_close(kept[0], x[0])
    for row, timestep in ((1, 19), (2, 999)):
        skip, out = diffusers.LCMScheduler().get_scalings_for_boundary_condition_discrete(timestep)
        torch.testing.assert_close(kept[row], skip * x[row] + out * clean[row])


def test_the_lora_learns_is_saved_and_draws(tmp_path: Path) -> None:
    """Distil for a few steps on random latents: the loss falls, and the decoder reads the file."""
    torch.manual_seed(0)
    distillation = lcm.Distillation()
    optimizer = torch.optim.AdamW(distillation.trained, lr=1e-3, weight_decay=0.0)
    random = torch.Generator().manual_seed(1)
    latents = 0.5 * torch.randn(8, 4, 16, 16, generator=random)
    embeds = torch.randn(8, EMBED_DIM, generator=random)
    losses = []
    for _ in range(4):
        loss = distillation.loss(latents, embeds, torch.Generator().manual_seed(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    file = tmp_path / "made" / "lcm.safetensors"
    distillation.save(file)
    rows = Rows.of(FEW_STEPS, embeds[:2].numpy(), [1, 2])
    without = np.stack(LocalDecoder(FEW_STEPS).draw(rows))
    drawn = np.stack(LocalDecoder(FEW_STEPS.model_copy(update={"lora": str(file)})).draw(rows))
    assert drawn.shape == without.shape
    assert np.abs(drawn.astype(int) - without.astype(int)).mean() > 1
