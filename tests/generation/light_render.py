"""Render actors that start without diffusers, for tests of actors that die, hang or start again."""

import io
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from PIL import Image

from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.generation import render


class PlainDecoder:
    """Draws each row in one colour, which its seed decides."""

    def decode(self, rows: Rows) -> list[DecodedImage]:
        return [DecodedImage(seed=seed, image=plain(seed), width=16, height=16) for seed in rows.seeds]


def plain(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), tuple(seed.to_bytes(8, "big")[-3:])).save(file, "PNG")
    return file.getvalue()


class LightRender(render.RenderImages):
    """Renders by a `PlainDecoder`; all else is as in a night."""

    def __init__(self, *arguments: Any) -> None:
        with patch.object(render, "build_decoder", lambda _: PlainDecoder()):
            super().__init__(*arguments)


class KilledByOneRow(LightRender):
    """One item kills the actor: the one whose id is in the file beside the notes."""

    def render(self, batch: pa.Table) -> pa.Table:
        assert self.suspects is not None
        poison = Path(self.suspects.uri).parents[3].joinpath("poison").read_text()
        if poison in batch["item_id"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().render(batch)
