"""The decoder: a CLIP image embedding becomes an image through Stable Diffusion + IP-Adapter, in process.

Our own loop over the pipeline's modules, because `StableDiffusionPipeline` mixes the rows of a batch once each has
an embedding of its own. Image i of a batch equals that item decoded alone.

Shapes: B batch, D embed dim, L text tokens, H context width.
"""

import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from rebeca_ray.config import DecoderSettings
from rebeca_ray.decoder_files import adapter_location
from rebeca_ray.errors import UserError
from rebeca_ray.sampling import item_noise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Decoder(Protocol):
    """What rendering needs: embeddings, seeds and prompts in, pictures out, row by row independent."""

    def decode(self, image_embeds_BD: np.ndarray, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """uint8 images [B, height, width, 3]. Raises NonFiniteImagesError if any is not finite."""
        ...


class NonFiniteImagesError(RuntimeError):
    """Rows of a batch came out NaN or infinite, the usual end of float16 overflow; rounded, they would be black images.

    `images` holds the whole batch, `finite` [B] says which of its rows are good.
    """

    def __init__(self, dtype: str, images: np.ndarray, finite: np.ndarray) -> None:
        super().__init__(f"the decoder drew values that are not finite in {dtype}")
        self.images, self.finite = images, finite


class DiffusersDecoder:
    """A diffusers Stable Diffusion 1.x/2.x directory or hub id with an IP-Adapter file that reads one global embedding.

    Raises UserError if weights are missing, or are pickles.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        repo, folder, file = adapter_location(settings)
        self.settings = settings
        dtype = DTYPES[settings.dtype]
        try:
            pipeline: Any = StableDiffusionPipeline.from_pretrained(
                settings.model, dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
            pipeline.load_ip_adapter(repo, subfolder=folder, weight_name=file, image_encoder_folder=None)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"decoder {settings.model}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
        pipeline.set_ip_adapter_scale(settings.ip_adapter_scale)
        self.unet = pipeline.unet.to(settings.device, dtype).eval()
        self.vae = pipeline.vae.to(settings.device, dtype).eval()
        self.text_encoder = pipeline.text_encoder.to(settings.device, dtype).eval()
        self.tokenizer = pipeline.tokenizer
        if settings.scheduler == "ddim":  # its default clips to [-1, 1], right for pixels and wrong for latents
            self.scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        else:
            self.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        image_size = settings.image_size or self.unet.config.sample_size * pipeline.vae_scale_factor
        self.latent_size = image_size // pipeline.vae_scale_factor

    @torch.inference_mode()
    def decode(self, image_embeds_BD: np.ndarray, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """Draw one image a row; short batches are padded to `batch_size`, so that bits do not depend on company."""
        images, finite = [], []
        for start in range(0, len(seeds), self.settings.batch_size):
            rows = slice(start, start + self.settings.batch_size)
            padding = self.settings.batch_size - len(seeds[rows])
            embeds = np.concatenate([image_embeds_BD[rows], np.repeat(image_embeds_BD[:1], padding, axis=0)])
            drawn, good = self.decode_tile(embeds, [*seeds[rows], *[seeds[0]] * padding], [*prompts[rows], *[""] * padding])
            images.append(drawn[: len(drawn) - padding])
            finite.append(good[: len(good) - padding])
        if not np.concatenate(finite).all():
            raise NonFiniteImagesError(self.settings.dtype, np.concatenate(images), np.concatenate(finite))
        return np.concatenate(images)

    def decode_tile(self, image_embeds_BD: np.ndarray, seeds: Sequence[int], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """One full batch: the denoising loop of Stable Diffusion, guidance as one doubled batch.

        Returns uint8 images [B, H, W, 3], and which of them are finite [B].
        """
        device, dtype, guidance = self.settings.device, self.unet.dtype, self.settings.decoder_guidance_scale
        size, channels = self.latent_size, self.unet.config.in_channels
        image = torch.from_numpy(np.ascontiguousarray(image_embeds_BD)).to(device, dtype)[:, None]
        text = self.encode_prompts(prompts)
        if guidance > 1:
            image = torch.cat([image, torch.zeros_like(image)])
            text = torch.cat([text, self.encode_prompts([""] * len(prompts))])
        condition = {"image_embeds": [image]}
        self.scheduler.set_timesteps(self.settings.num_inference_steps, device=device)
        noise = next(item_noise(seeds, channels * size * size, device)).view(-1, channels, size, size)
        latents = noise * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(latents, timestep).to(dtype)
            if guidance > 1:
                scaled = scaled.repeat(2, 1, 1, 1)
            predicted = self.unet(scaled, timestep, text, added_cond_kwargs=condition, return_dict=False)[0].float()
            if guidance > 1:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance * (conditional - unconditional)
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype), return_dict=False)[0]
        finite = pixels.isfinite().flatten(1).all(dim=1)
        rounded = ((pixels.float() / 2 + 0.5).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).cpu().numpy(), finite.cpu().numpy()

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text tokens [B, L, H]; each distinct prompt is encoded once."""
        distinct = sorted(set(prompts))
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        encoded = self.text_encoder(tokens.input_ids.to(self.settings.device))[0]
        return encoded[[distinct.index(prompt) for prompt in prompts]]


def encode_image(image_HWC: np.ndarray, image_format: str, quality: int, max_size: int | None = None) -> bytes:
    """Encode a uint8 image; with `max_size`, shrink it first so that no side is longer. WebP at 100 is lossless."""
    image = Image.fromarray(image_HWC)
    if max_size is not None:
        image.thumbnail((max_size, max_size))
    buffer = io.BytesIO()
    if image_format == "PNG":
        image.save(buffer, "PNG")
    elif image_format == "WEBP":
        image.save(buffer, "WEBP", quality=quality, lossless=quality == 100)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
