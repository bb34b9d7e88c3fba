"""The decoder in this process: render, check, render unsafe images again, encode.

A tile is checked and encoded in another thread while the next one is drawn, also one of another call. So the
networks do not wait.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.encoding import encode_image
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.files import with_checker
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.decoder.safety import Checker, load_checker
from rebeca_ray.errors import InputError
from rebeca_ray.identity import retry_seed

log = logging.getLogger(__name__)


class LocalDecoder:
    """The networks, the safety checker and the encoders in this process; threads may share them.

    Raises InputError if weights are missing, or are pickles.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings = with_checker(choose(settings))
        self.loop = DenoisingLoop(load_networks(settings), settings)
        self.checker = load_checker(settings)
        self.batch_size = settings.batch_size
        self.drawing, self.threads = threading.Lock(), torch.get_num_threads()
        self.finisher = ThreadPoolExecutor(max_workers=1)
        # Pillow releases the interpreter lock while it encodes.
        self.encoders = ThreadPoolExecutor(max_workers=4)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Draw, check and encode; the policy `regenerate` draws unsafe images again with other noise."""
        safety = self.settings.safety
        outcomes = [DecodedImage(seed=seed) for seed in rows.seeds]
        todo = list(range(len(rows)))
        # Each attempt draws the rows that are still unsafe, with other seeds.
        for attempt in range(safety.max_attempts if safety.policy == "regenerate" else 1):
            seeds = [retry_seed(rows.seeds[row], attempt) for row in todo]
            with self.drawing:
                # A new thread takes over the number that any thread set last, and the checker sets one. It
                # does so when it first reads the number, hence the reading.
                torch.get_num_threads()
                torch.set_num_threads(self.threads)
                finished = [
                    (tile, self.finisher.submit(self.finish, images, [seeds[index] for index in tile]))
                    for tile, images in self.draw_tiles(replace(rows.take(todo), seeds=seeds))
                ]
            for tile, future in finished:
                for index, outcome in zip(tile, future.result(), strict=True):
                    outcomes[todo[index]] = outcome
            todo = [row for row in todo if self.is_unsafe(outcomes[row])]
            if not todo:
                break
        # A row that stays unsafe keeps its probability and loses its image, unless the policy only flags it.
        if safety.policy != "flag":
            for row in todo:
                outcomes[row] = DecodedImage(
                    seed=outcomes[row].seed, safety_probability=outcomes[row].safety_probability
                )
        return outcomes

    def is_unsafe(self, drawn: DecodedImage) -> bool:
        """Return whether an image is unsafe; a probability that is not a number counts as unsafe."""
        return (
            drawn.safety_probability is not None
            and not drawn.safety_probability <= self.settings.safety.max_probability
        )

    def draw(self, rows: Rows) -> list[np.ndarray | str]:
        """Return a uint8 image [Y, X, 3] per row, or the error text of that row."""
        drawn: list[np.ndarray | str] = [""] * len(rows)
        for tile, results in self.draw_tiles(rows):
            for row, result in zip(tile, results, strict=True):
                drawn[row] = result
        return drawn

    def draw_tiles(self, rows: Rows) -> Iterator[tuple[list[int], list[np.ndarray | str]]]:
        """Yield some rows and an image or error text for each, until all rows are drawn."""
        finite = np.isfinite(rows.image_embeds_BD).all(axis=1)
        broken = np.flatnonzero(~finite).tolist()
        if broken:
            yield broken, ["image_embeds is not finite"] * len(broken)
        todo = np.flatnonzero(finite)
        while len(todo):
            tile, todo = todo[: self.batch_size], todo[self.batch_size :]
            try:
                results = self.draw_tile(rows.take(tile))
            # Torch and the engines raise RuntimeError. Any other error is a bug and stops the run.
            except RuntimeError as error:
                if out_of_memory(error):
                    todo = np.concatenate([tile, todo])
                    self.halve(error)
                    continue
                if isinstance(error, torch.AcceleratorError):  # the device failed, not a row
                    raise
                results = [self.draw_alone(rows.take([row])) for row in tile]
            yield tile.tolist(), results

    def draw_tile(self, rows: Rows) -> list[np.ndarray | str]:
        """Draw up to `batch_size` rows, padded to it, so that the bits of a row do not depend on others."""
        padded = rows.take([*range(len(rows)), *[0] * (self.batch_size - len(rows))])
        images, finite = self.loop.draw(padded)
        # Usually float16 overflow. Rounded, it would be a black image.
        reason = f"the decoder drew values that are not finite in {self.settings.dtype}"
        return [image if good else reason for image, good in zip(images[: len(rows)], finite, strict=False)]

    def draw_alone(self, row: Rows) -> np.ndarray | str:
        """Draw one row of a tile that failed, so that only the row at fault has no image."""
        try:
            return self.draw_tile(row)[0]
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def halve(self, error: RuntimeError) -> None:
        """Continue with tiles of half the size. Raises InputError if a tile is one image already."""
        if self.batch_size == 1:
            raise InputError(
                f"decoder: not even one image fits the device's memory ({' '.join(str(error).split())[:200]})"
            ) from None
        before, self.batch_size = self.batch_size, self.batch_size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            f"decoder: {before} images at once do not fit the device's memory; "
            f"continuing with {self.batch_size}. Set decoder.batch_size={self.batch_size} to start there"
        )

    def finish(self, images: Sequence[np.ndarray | str], seeds: Sequence[int]) -> list[DecodedImage]:
        """Check and encode the images of a tile."""
        return list(self.encoders.map(self.outcome, images, seeds, self.check(images)))

    def check(self, images: Sequence[np.ndarray | str]) -> list[float | None]:
        """Return the probability that each image is unsafe; None without an image or a checker."""
        probabilities: list[float | None] = [None] * len(images)
        drawn = [index for index, image in enumerate(images) if not isinstance(image, str)]
        if self.checker and drawn:
            checked = self.call_checker(self.checker, np.stack([images[index] for index in drawn]))
            for index, probability in zip(drawn, checked, strict=True):
                # float32, as in the column of the catalog and in the answer of a server
                probabilities[index] = float(np.float32(probability))
        return probabilities

    def call_checker(self, checker: Checker, images_BYX3: np.ndarray) -> np.ndarray:
        """Return one probability per image. Raises InputError if the checker fails."""
        name = self.settings.safety.checker
        try:
            probabilities = np.asarray(checker(images_BYX3), np.float32)
        except Exception as error:  # the checker may be any function of the user
            raise InputError(
                f"decoder.safety.checker {name}: raised {type(error).__name__}: {error}; fix it"
            ) from error
        if probabilities.shape != (len(images_BYX3),):
            raise InputError(
                f"decoder.safety.checker {name}: gave {probabilities.shape} for {len(images_BYX3)} images, "
                "expected one number each"
            )
        return probabilities

    def outcome(self, image: np.ndarray | str, seed: int, probability: float | None) -> DecodedImage:
        """Return the outcome of one row: the encoded image with its thumbnail, or the error."""
        if isinstance(image, str):
            return DecodedImage(seed=seed, error=image)
        kind, quality = self.settings.image_format, self.settings.image_quality
        marked, size = self.settings.provenance != "none", self.settings.thumbnail_size
        encoded = thumbnail = encode_image(image, kind, quality, marked=marked)
        if max(image.shape[:2]) > size:  # a small image is its own thumbnail
            thumbnail = encode_image(image, kind, quality, max_size=size, marked=marked)
        return DecodedImage(
            seed=seed,
            image=encoded,
            thumbnail=thumbnail,
            width=image.shape[1],
            height=image.shape[0],
            safety_probability=probability,
        )


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an engine ran out of memory. Only torch on a GPU has a type for it."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "ALLOC_FAILED" in str(error)
        or ("alloc" in str(error).lower() and "memory" in str(error).lower())
    )
