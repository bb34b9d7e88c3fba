"""A night on a Ray of its own: `python -m tests.telemetry.night CONFIG`, which is JSON.

Of the images, one fails, and the safety checker objects to three: one is left out, one flagged, one drawn
again. A line `published` follows, then `stalled`: each line of standard input makes the process go on.
"""

import sys
import time
from dataclasses import replace
from threading import Lock
from typing import Any

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.generation import render
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.identity import retry_seed
from rebeca_ray.telemetry import metrics
from tests.generation.light_render import PlainDecoder

SECONDS_PER_CALL = 0.8


class SlowDecoder(PlainDecoder):
    """Spoils its first four images, each in another way."""

    def __init__(self) -> None:
        self.images, self.lock = 0, Lock()

    def decode(self, rows: Rows) -> list[DecodedImage]:
        time.sleep(SECONDS_PER_CALL)
        return [self.spoiled(image) for image in super().decode(rows)]

    def spoiled(self, image: DecodedImage) -> DecodedImage:
        with self.lock:
            self.images += 1
        spoiled = {
            1: DecodedImage(seed=image.seed, error="it is spoilt"),
            2: DecodedImage(seed=image.seed, safety_probability=0.99),
            3: replace(image, safety_probability=0.99),
            4: replace(image, seed=retry_seed(image.seed, 1), safety_probability=0.01),
        }
        return spoiled.get(self.images, image)


class SlowRender(render.RenderImages):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.decoder = SlowDecoder()


def main() -> None:
    render.RenderImages = SlowRender  # type: ignore[misc]
    render.build_decoder = lambda _: SlowDecoder()  # type: ignore[assignment,return-value]
    metrics.record_epoch(1, 0.9, 0.8, 1000.0)
    generate_catalog(GenerateConfig.model_validate_json(sys.argv[1]), force=True)
    metrics.record_epoch(1, 0.9, 0.8, 1000.0)
    for state in ("published", "stalled"):
        print(state, flush=True)
        sys.stdin.readline()
        metrics.note_progress(metrics.Command.GENERATE)


if __name__ == "__main__":
    main()
