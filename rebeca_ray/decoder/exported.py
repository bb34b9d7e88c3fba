"""The networks of an exported decoder, run by another engine."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import read_export
from rebeca_ray.decoder.networks import DTYPES, Networks


def exported_networks(
    settings: DecoderSettings, load: Callable[[Path, str], Callable[..., torch.Tensor]]
) -> Networks:
    """The networks in `settings.engine_dir`, each loaded by `load(folder, name)`.

    Raises UserError if that is no exported decoder, or one of another model, precision or image size than the settings say.
    """
    from transformers import CLIPTokenizer

    folder, told = Path(str(settings.engine_dir)), read_export(settings)
    return Networks(
        text_encoder=load(folder, "text_encoder"),
        image_projection=load(folder, "image_projection"),
        unet=load(folder, "unet"),
        vae_decoder=load(folder, "vae_decoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        embed_dim=told["embed_dim"],
        latent_channels=told["latent_channels"],
        image_size=told["image_size"],
        vae_scale_factor=told["vae_scale_factor"],
        device=settings.device,
        dtype=DTYPES[settings.dtype],
    )
