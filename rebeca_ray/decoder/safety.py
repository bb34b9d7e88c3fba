"""Is an image fit to be shown? Asked inside the decoder, before anything is encoded.

A checker is any function of uint8 images [B, Y, X, 3] that gives the probability [B] that each is unsafe: the one diffusers ships
with Stable Diffusion, or one of yours, `module:function`.
"""

import importlib
from collections.abc import Callable

import numpy as np

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_decoder
from rebeca_ray.errors import InputError

Checker = Callable[[np.ndarray], np.ndarray]


def load_checker(settings: DecoderSettings) -> Checker | None:
    """The checker that `settings.safety` names. Raises UserError if it cannot be had."""
    name = settings.safety.checker
    if name is None:
        return None
    if name == "stable-diffusion":
        return StableDiffusionChecker(settings)
    module, _, function = name.partition(":")
    if not function:
        raise InputError(
            f"decoder.safety.checker {name}: names no function; give stable-diffusion, or module:function"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"decoder.safety.checker {name}: {error}; give stable-diffusion, or module:function of a module on every node"
        ) from None


class StableDiffusionChecker:
    """The `safety_checker` beside the model's weights: its verdict, 0 or 1, and never the black image it would put in place."""

    def __init__(self, settings: DecoderSettings) -> None:
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        model = find_decoder(settings).model
        try:
            self.processor = CLIPImageProcessor.from_pretrained(model, subfolder="feature_extractor")
            self.model = StableDiffusionSafetyChecker.from_pretrained(
                model, subfolder="safety_checker", use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"decoder.safety.checker stable-diffusion: {settings.model} has none ({' '.join(str(error).split())[:200]}); "
                "give module:function, or set it to null"
            ) from None
        self.model = self.model.to(settings.device).eval()

    def __call__(self, images_BYX3: np.ndarray) -> np.ndarray:
        pixels = self.processor(list(images_BYX3), return_tensors="pt").pixel_values
        thrown_away = np.zeros((len(images_BYX3), 1))  # where it draws its black images
        _, unsafe = self.model(clip_input=pixels.to(self.model.device), images=thrown_away)
        return np.array(unsafe, np.float32)
