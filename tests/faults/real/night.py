"""The driver of a night under faults: `python -m tests.faults.real.night CONFIG [OPTION …]`.

It is `rebeca generate` with a light decoder, and it prints each stage that it enters. The files beside the
decoder give its render actors orders: `stalled` lets them wait for ever, `poison` names an item that kills
its actor, `seconds` slows each batch down. Each actor lists the items that it drew in `drawn-PID`.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.generation import render
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.rendering import checks
from tests.generation.light_render import LightRender

STALL_SECONDS = 3600


class OrderedRender(LightRender):
    """Renders as the files beside the decoder say."""

    def render(self, batch: pa.Table) -> pa.Table:
        orders = Path(self.settings.model).parent
        items = batch["item_id"].to_pylist()
        if (orders / "stalled").exists():
            time.sleep(STALL_SECONDS)
        if read(orders / "poison") in items:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(read(orders / "seconds") or 0))
        images = super().render(batch)
        with (orders / f"drawn-{os.getpid()}").open("a") as file:
            file.write("".join(f"{item}\n" for item in items))
        return images


def check_light(_: DecoderSettings) -> None:
    """A light decoder asks no server."""


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextmanager
def announced(progress: Progress, name: str) -> Iterator[None]:
    """Print the name of a stage as it begins."""
    print(f"stage {name}", flush=True)
    with stage(progress, name):
        yield


stage = Progress.stage


def main(config: str, *options: str) -> None:
    """Generate as the command does."""
    from rebeca_ray.cli.commands import generate
    from rebeca_ray.cli.runner import run_script

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    Progress.stage = announced  # type: ignore[method-assign, assignment]
    if "triton" not in Path(config).name:
        render.RenderImages = OrderedRender  # type: ignore[misc]
        checks.check_decoder = check_light
    sys.argv[1:] = options
    print("stage start", flush=True)
    run_script(generate, config=Path(config))


if __name__ == "__main__":
    main(*sys.argv[1:])
