"""Load the safety checker. The decoder calls it on every image before it encodes any.

A checker is any function of uint8 images [B, Y, X, 3] that returns the probability [B] that each is unsafe.
It is bundled, part of the model, or a function of the user, `module:function`.
"""

import importlib
from collections.abc import Callable

import numpy as np

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_model, with_checker
from rebeca_ray.decoder.inspection import REMEDY
from rebeca_ray.decoder.safety_model.network import BundledChecker
from rebeca_ray.errors import InputError

Checker = Callable[[np.ndarray], np.ndarray]


def load_checker(settings: DecoderSettings) -> Checker | None:
    """Return the checker of the settings, None for `none`. Raises InputError if it cannot be loaded."""
    name = with_checker(settings).safety.checker
    if name is None or name == "none":
        return None
    if name == "bundled":
        return BundledChecker(settings.device)
    if name == "stable-diffusion":
        return StableDiffusionChecker(settings)
    module, _, function = name.partition(":")
    if not function:
        raise InputError(
            f"decoder.safety.checker {name}: names no function; "
            "give bundled, stable-diffusion, module:function, or none"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"decoder.safety.checker {name}: {error}; give bundled, stable-diffusion, "
            "module:function of a module on every node, or none"
        ) from None


class StableDiffusionChecker:
    """The `safety_checker` in the model's folder. It returns 0 or 1, and leaves the images as they are."""

    def __init__(self, settings: DecoderSettings) -> None:
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        what = "decoder.safety.checker stable-diffusion"
        try:
            model = find_model(settings)
        except InputError as error:  # an exported decoder needs the folder for its checker alone
            raise InputError(f"{what}: {error}; or give {REMEDY} as the checker") from None
        try:
            self.processor = CLIPImageProcessor.from_pretrained(model, subfolder="feature_extractor")
            self.model, loaded = StableDiffusionSafetyChecker.from_pretrained(
                model, subfolder="safety_checker", use_safetensors=True, output_loading_info=True
            )
            if loaded["missing_keys"]:  # they would be random
                raise ValueError("weights are missing")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{what}: {settings.model} has none that loads ({type(error).__name__}); give {REMEDY}"
            ) from None
        self.model = self.model.to(settings.device).eval()

    def __call__(self, images_BYX3: np.ndarray) -> np.ndarray:
        pixels = self.processor(list(images_BYX3), return_tensors="pt").pixel_values
        # The model blackens unsafe images in place; it gets a dummy, so that ours stay unchanged.
        dummy = np.zeros((len(images_BYX3), 1))
        _, unsafe = self.model(clip_input=pixels.to(self.model.device), images=dummy)
        return np.array(unsafe, np.float32)
