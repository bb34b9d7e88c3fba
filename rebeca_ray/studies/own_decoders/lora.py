"""A LoRA of the catalog's decoder, trained on liked images: the baselines `lora_shared` and `lora_per_user`.

Hu et al. 2021. As in the code of REBECA's authors, the prompt is "<u12> liked image." for a user u12, and the
rank grows with a user's likes.

Shapes: N images, B batch, C latent channels, Y X pixels or latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import LoraSettings
from rebeca_ray.decoder.families.sd import load_parts
from rebeca_ray.decoder.files import find_decoder, find_model
from rebeca_ray.decoder.inspection import family_of
from rebeca_ray.errors import InputError
from rebeca_ray.progress import counting
from rebeca_ray.studies.pictures import picture_tensor

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention
RANKS = ((50, 16), (20, 8), (0, 4))  # fewest images, rank
IMAGES_AT_ONCE = 16


def rank_of(num_images: int) -> int:
    """Return the rank for a number of images."""
    return next(rank for fewest, rank in RANKS if num_images >= fewest)


def check_trainable(method: str, settings: DecoderSettings) -> None:
    """Raise InputError for a decoder whose networks cannot be changed or trained here."""
    if settings.backend != "local" or settings.engine != "torch" or settings.lora is not None:
        raise InputError(
            f"method {method}: decoder.backend is {settings.backend}, decoder.engine {settings.engine}, "
            f"decoder.lora {settings.lora}; expected local, torch and none, because the method changes the "
            "networks; leave it out, or set them so"
        )
    if method != "fabric" and family_of(settings.model, find_model(settings)) == "sdxl":
        raise InputError(
            f"method {method}: decoder.model {settings.model} is an SDXL; expected a Stable Diffusion 1.x or "
            "2.x, because the LoRA is trained with one text encoder; leave the method out"
        )


def train_lora(
    decoder: DecoderSettings, images: Sequence[bytes], prompt: str, settings: LoraSettings, file: Path
) -> None:
    """Train a LoRA on encoded images with one prompt, and write it to `file` as safetensors.

    The loss is that of the model's own training: its noise, or its velocity (Salimans & Ho 2022). Equal
    inputs give an equal LoRA on the same machine.
    """
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    parts = load_parts(decoder, find_decoder(decoder), torch.float32)
    unet, vae, text_encoder = (
        parts[name].to(decoder.device).requires_grad_(False) for name in ("unet", "vae", "text_encoder")
    )
    schedule = DDPMScheduler.from_config(parts["scheduler"].config)
    size = decoder.image_size or unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    latents_NCYX = encode_latents(vae, images, size)
    tokens = parts["tokenizer"](
        [prompt],
        padding="max_length",
        max_length=parts["tokenizer"].model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        text_BLH = text_encoder(tokens.input_ids.to(decoder.device)).last_hidden_state
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # peft draws the first weights
        rank = rank_of(len(images))
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))
    optimizer = torch.optim.AdamW(
        [weight for weight in unet.parameters() if weight.requires_grad], lr=settings.learning_rate
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with counting("train a LoRA, in steps", settings.steps) as counted:
        for _ in range(settings.steps):
            row_B = torch.randint(len(latents_NCYX), (settings.batch_size,), generator=generator)
            clean = latents_NCYX[row_B]
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            timestep_B = torch.randint(
                schedule.config.num_train_timesteps, (settings.batch_size,), generator=generator
            ).to(clean.device)
            is_velocity = schedule.config.prediction_type == "v_prediction"
            target = schedule.get_velocity(clean, noise, timestep_B) if is_velocity else noise
            noisy = schedule.add_noise(clean, noise, timestep_B)
            predicted = unet(noisy, timestep_B, text_BLH.expand(settings.batch_size, -1, -1)).sample
            optimizer.zero_grad()
            F.mse_loss(predicted, target).backward()
            optimizer.step()
            counted.add()
    weights = {name: weight.contiguous().cpu() for name, weight in get_peft_model_state_dict(unet).items()}
    save_file(weights, file)


@torch.no_grad()
def encode_latents(vae: Any, images: Sequence[bytes], size: int) -> torch.Tensor:
    """Return the latents [N, C, Y, X] of encoded images, resized to squares of `size` pixels."""
    device, dtype = next((weight.device, weight.dtype) for weight in vae.parameters())
    parts = []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        pixels = picture_tensor(images[start : start + IMAGES_AT_ONCE], size).to(device, dtype)
        encoded = vae.encode(pixels).latent_dist.mean
        parts.append(encoded * vae.config.scaling_factor)
    return torch.cat(parts)
