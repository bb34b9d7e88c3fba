"""The denoising loop over a batch. Each row may have another embedding, prompt, seed, guidance and weight.

`StableDiffusionPipeline` mixes the rows of a batch as soon as they have different embeddings; this loop does
not. Image i of a batch equals the same item drawn alone.

Shapes: B batch, C latent channels, Y X pixels or latents.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import Networks
from rebeca_ray.errors import InputError
from rebeca_ray.noise import item_noise


class DenoisingLoop:
    """The sampling loop of latent diffusion over some `Networks` of any family."""

    def __init__(self, networks: Networks, settings: DecoderSettings) -> None:
        self.networks, self.settings = networks, settings
        self.scheduler = build_scheduler(settings.scheduler, networks.scheduler_config)
        try:
            self.scheduler.set_timesteps(settings.num_inference_steps)
        except ValueError:
            raise InputError(
                f"decoder.num_inference_steps {settings.num_inference_steps}: more than the scheduler "
                f"{settings.scheduler} of this model takes; give fewer"
            ) from None
        self.latent_size = networks.image_size // networks.vae_scale_factor

    @torch.inference_mode()
    def draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Draw one tile; return uint8 images [B, Y, X, 3], and whether each is finite [B].

        Guidance is one doubled batch (Ho & Salimans 2022). A tile without a guided row needs single passes
        only, and so does a step outside `guidance_interval` (Kynkäänniemi et al. 2024). Between the whole
        passes of `cache_interval`, a pass is shallow.
        """
        networks, size, channels = self.networks, self.latent_size, self.networks.latent_channels
        device, dtype = networks.device, networks.dtype
        guidance_B = torch.from_numpy(rows.guidance_scale_B).to(device)[:, None, None, None]
        guided_steps = self.guided_steps() if (rows.guidance_scale_B != 1).any() else range(0)
        # The conditioning is the same at every step. Its first half is the conditional one.
        whole = networks.condition(rows, guided=bool(guided_steps)).in_order(networks.family.conditioning)
        conditional_half = tuple(tensor[: len(rows)] for tensor in whole)
        # Each row starts from the noise of its seed, so that its image is the same in any batch.
        self.scheduler.set_timesteps(self.settings.num_inference_steps, device=device)
        noise = next(item_noise(rows.seeds, channels * size * size, device)).view(-1, channels, size, size)
        latents = noise * self.scheduler.init_noise_sigma
        later_noise = self.later_noise(rows.seeds)
        deep = latents[:0]  # the features of the last whole pass, of no row before the first
        for step, timestep in enumerate(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, timestep).to(dtype)
            conditioning = conditional_half
            if step in guided_steps:
                scaled, conditioning = scaled.repeat(2, 1, 1, 1), whole
            inputs = (scaled, timestep.expand(len(scaled)), *conditioning)
            if networks.shallow_unet is None:
                predicted = networks.unet(*inputs)
            elif step % self.settings.cache_interval and len(scaled) <= len(deep):
                # After a guided whole pass, the first half of the features is the conditional one.
                predicted = networks.shallow_unet(*inputs, deep[: len(scaled)])
            else:
                predicted, deep = networks.unet(*inputs)
            predicted = predicted.float()
            if step in guided_steps:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance_B * (conditional - unconditional)
            latents = self.scheduler.step(predicted, timestep, latents, **later_noise, return_dict=False)[0]
        pixels = networks.vae_decoder(latents.to(dtype))
        # A pixel that is not finite becomes a number here; the second result names its image.
        finite = pixels.isfinite().flatten(1).all(dim=1)
        rounded = ((pixels.float() / 2 + 0.5).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).cpu().numpy(), finite.cpu().numpy()

    def guided_steps(self) -> range:
        """Return the steps within `guidance_interval`: those that start in it."""
        count = len(self.scheduler.timesteps)
        start, stop = (math.ceil(share * count) for share in self.settings.guidance_interval)
        return range(start, stop)

    def later_noise(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return one generator per row for LCM and TCD, which add noise between their steps."""
        if self.settings.scheduler not in ("lcm", "tcd"):
            return {}
        return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def build_scheduler(name: str, config: dict[str, Any]) -> Any:
    """Return the diffusers scheduler for a `decoder.scheduler` and a model's scheduler config."""
    import diffusers

    # The default of DDIM clips to [-1, 1], which is right for pixels and wrong for latents.
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    kind = {
        "dpm_solver": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
        "tcd": diffusers.TCDScheduler,
    }[name]
    return kind.from_config(config)
