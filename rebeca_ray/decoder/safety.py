"""Load the safety checker. The decoder calls it on every image before it encodes any.

A checker is any function of uint8 images [B, Y, X, 3] that returns the probability [B] that each is unsafe.
It is part of the model, or a function of the user, `module:function`.
"""

import importlib
from collections.abc import Callable

import numpy as np

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_decoder
from rebeca_ray.errors import InputError

Checker = Callable[[np.ndarray], np.ndarray]


def load_checker(settings: DecoderSettings) -> Checker | None:
    """Return the checker that `settings.safety` names, or None. Raises InputError if it cannot be loaded."""
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
            f"decoder.safety.checker {name}: {error}; give stable-diffusion, "
            "or module:function of a module on every node"
        ) from None


class StableDiffusionChecker:
    """The `safety_checker` in the model's folder. It returns 0 or 1, and leaves the images as they are."""

    def __init__(self, settings: DecoderSettings) -> None:
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        model = find_decoder(settings).model
        try:
            self.processor = CLIPImageProcessor.from_pretrained(model, subfolder="feature_extractor")
            self.model = StableDiffusionSafetyChecker.from_pretrained(
                model, subfolder="safety_checker", use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"decoder.safety.checker stable-diffusion: {settings.model} has none that loads "
                f"({type(error).__name__}); give module:function, or set it to null"
            ) from None
        self.model = self.model.to(settings.device).eval()

    def __call__(self, images_BYX3: np.ndarray) -> np.ndarray:
        pixels = self.processor(list(images_BYX3), return_tensors="pt").pixel_values
        # The model blackens unsafe images in place; it gets a dummy, so that ours stay unchanged.
        dummy = np.zeros((len(images_BYX3), 1))
        _, unsafe = self.model(clip_input=pixels.to(self.model.device), images=dummy)
        return np.array(unsafe, np.float32)
