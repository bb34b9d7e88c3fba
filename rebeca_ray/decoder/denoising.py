"""The denoising loop: a batch in which each row has its own embedding, prompt, seed, guidance and image weight.

Our own, because `StableDiffusionPipeline` mixes the rows of a batch once each has an embedding of its own. Image i of a batch
equals that item drawn alone.

Shapes: B batch, D embed dim, L text tokens, K image tokens, H context width, C latent channels, Y X pixels or latents.
"""

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
    """Stable Diffusion's sampling over some `Networks`."""

    def __init__(self, networks: Networks, settings: DecoderSettings) -> None:
        self.networks, self.settings = networks, settings
        self.scheduler = build_scheduler(settings.scheduler, networks.scheduler_config)
        try:
            self.scheduler.set_timesteps(settings.num_inference_steps)
        except ValueError as error:
            raise InputError(
                f"decoder.num_inference_steps {settings.num_inference_steps}: {' '.join(str(error).split())}"
            ) from None
        self.latent_size = networks.image_size // networks.vae_scale_factor

    @torch.inference_mode()
    def draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Draw one tile: uint8 images [B, Y, X, 3], and which of them are finite [B].

        Guidance is one doubled batch (Ho & Salimans 2022); a tile in which no row asks for it is drawn in single passes.
        """
        networks, size, channels = self.networks, self.latent_size, self.networks.latent_channels
        device, dtype = networks.device, networks.dtype
        guidance_B = torch.from_numpy(rows.guidance_scale_B).to(device)[:, None, None, None]
        guided = bool((rows.guidance_scale_B != 1).any())
        embeds_BD = torch.from_numpy(np.ascontiguousarray(rows.image_embeds_BD)).to(device, dtype)
        scale_B = torch.from_numpy(rows.ip_adapter_scale_B).to(device, dtype)
        text_BLH = self.encode(rows.prompts)
        if guided:  # without the item: a zero embedding, as published, and the negative prompt
            embeds_BD = torch.cat([embeds_BD, torch.zeros_like(embeds_BD)])
            scale_B = scale_B.repeat(2)
            text_BLH = torch.cat([text_BLH, self.encode(rows.negative_prompts)])
        image_BKH = networks.image_projection(embeds_BD)
        self.scheduler.set_timesteps(self.settings.num_inference_steps, device=device)
        noise = next(item_noise(rows.seeds, channels * size * size, device)).view(-1, channels, size, size)
        latents = noise * self.scheduler.init_noise_sigma
        later_noise = self.later_noise(rows.seeds)
        for timestep in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(latents, timestep).to(dtype)
            if guided:
                scaled = scaled.repeat(2, 1, 1, 1)
            predicted = networks.unet(
                scaled, timestep.expand(len(scaled)), text_BLH, image_BKH, scale_B
            ).float()
            if guided:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance_B * (conditional - unconditional)
            latents = self.scheduler.step(predicted, timestep, latents, **later_noise, return_dict=False)[0]
        pixels = networks.vae_decoder(latents.to(dtype))
        finite = pixels.isfinite().flatten(1).all(dim=1)
        rounded = ((pixels.float() / 2 + 0.5).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).cpu().numpy(), finite.cpu().numpy()

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text tokens [B, L, H]; each distinct prompt is encoded once."""
        distinct = sorted(set(prompts))
        tokenizer = self.networks.tokenizer
        tokens = tokenizer(
            distinct,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        encoded = self.networks.text_encoder(tokens.input_ids.to(self.networks.device))
        return encoded[[distinct.index(prompt) for prompt in prompts]]

    def later_noise(self, seeds: Sequence[int]) -> dict[str, Any]:
        """LCM and TCD add noise between their steps: a generator a row, so that it is the row's own."""
        if self.settings.scheduler not in ("lcm", "tcd"):
            return {}
        return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def build_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A diffusers scheduler by our name for it, for a model with that scheduler config."""
    import diffusers

    if name == "ddim":  # its default clips to [-1, 1], right for pixels and wrong for latents
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    kind = {
        "dpm_solver": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
        "tcd": diffusers.TCDScheduler,
    }[name]
    return kind.from_config(config)
