"""A picture, and a text longer than any that a message may hold."""

import io

from PIL import Image

LONG = "x" * 10**7


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
