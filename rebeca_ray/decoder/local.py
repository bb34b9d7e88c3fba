"""The decoder in this process: draw, check, draw again what is not fit to be shown, encode."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.encoding import encode_image
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.decoder.safety import Checker, load_checker
from rebeca_ray.errors import InputError
from rebeca_ray.identity import retry_seed

log = logging.getLogger(__name__)


class LocalDecoder:
    """Stable Diffusion + IP-Adapter in this process.

    Raises UserError if weights are missing, or pickles.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings
        self.loop = DenoisingLoop(load_networks(settings), settings)
        self.checker = load_checker(settings)
        self.batch_size = settings.batch_size
        self.encoders = ThreadPoolExecutor(
            max_workers=4
        )  # Pillow lets go of the interpreter while it encodes

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Draw, check, draw again with other noise what is not fit to be shown (if that is the policy), encode."""
        safety = self.settings.safety
        outcomes = [DecodedImage(seed=seed) for seed in rows.seeds]
        todo = list(range(len(rows)))
        for attempt in range(safety.max_attempts if safety.policy == "regenerate" else 1):
            seeds = [retry_seed(rows.seeds[row], attempt) for row in todo]
            images = self.draw(replace(rows.take(todo), seeds=seeds))
            probabilities = self.check(images)
            for row, outcome in zip(
                todo, self.encoders.map(self.outcome, images, seeds, probabilities), strict=True
            ):
                outcomes[row] = outcome
            todo = [row for row in todo if self.is_unsafe(outcomes[row])]
            if not todo:
                break
        if safety.policy != "flag":
            for row in todo:
                outcomes[row] = DecodedImage(
                    seed=outcomes[row].seed, safety_probability=outcomes[row].safety_probability
                )
        return outcomes

    def is_unsafe(self, drawn: DecodedImage) -> bool:
        """Also where the checker's word is no number."""
        return (
            drawn.safety_probability is not None
            and not drawn.safety_probability <= self.settings.safety.max_probability
        )

    def draw(self, rows: Rows) -> list[np.ndarray | str]:
        """uint8 [Y, X, 3], or the reason why there is none, of every row."""
        drawn: list[np.ndarray | str] = ["image_embeds is not finite"] * len(rows)
        todo = np.flatnonzero(np.isfinite(rows.image_embeds_BD).all(axis=1))
        while len(todo):
            tile, todo = todo[: self.batch_size], todo[self.batch_size :]
            try:
                results = self.draw_tile(rows.take(tile))
            except RuntimeError as error:  # what torch and the engines raise; anything else is our mistake and should stop the run
                if out_of_memory(error):
                    todo = np.concatenate([tile, todo])
                    self.halve(error)
                    continue
                if isinstance(error, torch.AcceleratorError):  # the device is lost, not the rows
                    raise
                results = [self.draw_alone(rows.take([row])) for row in tile]
            for row, result in zip(tile, results, strict=True):
                drawn[row] = result
        return drawn

    def draw_tile(self, rows: Rows) -> list[np.ndarray | str]:
        """At most `batch_size` rows, padded to it, so that bits do not depend on company."""
        padded = rows.take([*range(len(rows)), *[0] * (self.batch_size - len(rows))])
        images, finite = self.loop.draw(padded)
        # Usually float16 overflow; rounded, it would be a black image.
        reason = f"the decoder drew values that are not finite in {self.settings.dtype}"
        return [image if good else reason for image, good in zip(images[: len(rows)], finite, strict=False)]

    def draw_alone(self, row: Rows) -> np.ndarray | str:
        """One row of a tile that failed: only the row that is to blame has no image."""
        try:
            return self.draw_tile(row)[0]
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def halve(self, error: RuntimeError) -> None:
        """Go on with tiles half as large. Raises UserError if they are of one image already."""
        if self.batch_size == 1:
            raise InputError(
                f"decoder: not even one image fits the device's memory ({' '.join(str(error).split())[:200]})"
            ) from None
        before, self.batch_size = self.batch_size, self.batch_size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            f"decoder: {before} images at once do not fit the device's memory; continuing with {self.batch_size}. "
            f"Set decoder.batch_size={self.batch_size} to start there"
        )

    def check(self, images: Sequence[np.ndarray | str]) -> list[float | None]:
        """The probability that each image is unsafe; None where there is no image or no checker."""
        probabilities: list[float | None] = [None] * len(images)
        drawn = [index for index, image in enumerate(images) if not isinstance(image, str)]
        if self.checker and drawn:
            for index, probability in zip(
                drawn, self.ask(self.checker, np.stack([images[index] for index in drawn])), strict=True
            ):
                probabilities[index] = float(
                    np.float32(probability)
                )  # as the column has it, and as a server would send it
        return probabilities

    def ask(self, checker: Checker, images_BYX3: np.ndarray) -> np.ndarray:
        """The checker's word on each image. Raises UserError if it gives none: what was not checked is not shown."""
        name = self.settings.safety.checker
        try:
            found = np.asarray(checker(images_BYX3), np.float32)
        except Exception as error:  # it is the user's own
            raise InputError(
                f"decoder.safety.checker {name}: raised {type(error).__name__}: {error}; mend it"
            ) from error
        if found.shape != (len(images_BYX3),):
            raise InputError(
                f"decoder.safety.checker {name}: gave {found.shape} for {len(images_BYX3)} images, expected one number each"
            )
        return found

    def outcome(self, image: np.ndarray | str, seed: int, probability: float | None) -> DecodedImage:
        """Encoded, with its thumbnail."""
        if isinstance(image, str):
            return DecodedImage(seed=seed, error=image)
        kind, quality = self.settings.image_format, self.settings.image_quality
        return DecodedImage(
            seed=seed,
            image=encode_image(image, kind, quality),
            thumbnail=encode_image(image, kind, quality, max_size=self.settings.thumbnail_size),
            width=image.shape[1],
            height=image.shape[0],
            safety_probability=probability,
        )


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an engine ran out of memory: torch says so by type on a GPU, by words on a CPU, and so does ONNX Runtime."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "ALLOC_FAILED" in str(error)
        or ("alloc" in str(error).lower() and "memory" in str(error).lower())
    )
