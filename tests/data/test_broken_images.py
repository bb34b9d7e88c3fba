"""Broken images: each has a reason in one line."""

import re
from typing import Any

import pytest

from rebeca_ray.data.clip import read_image
from tests.data.pictures import LONG, picture


def bomb() -> bytes:
    """Return a small file that claims to be 60,000 pixels wide and high."""
    header = picture()
    return header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is null"),
        ({"bytes": None, "path": None}, "has no bytes"),
        ({"bytes": b"", "path": "a.png"}, "has no bytes"),
        ({"bytes": None, "path": "a.png"}, "has a path alone and null bytes; write the file's content into"),
        ({"bytes": b"text", "path": None}, "is no image that can be read; expected PNG, JPEG"),
        ({"bytes": picture()[:40], "path": None}, "is a broken image|is no image"),
        ({"bytes": picture()[:20], "path": None}, "is a broken image|is no image"),
        ({"bytes": bomb(), "path": None}, "is a broken image|is no image"),
        ({"bytes": b"\xff\xd8\xff\xe0", "path": None}, "is a broken image|is no image"),
        ({"bytes": LONG.encode(), "path": None}, "is no image that can be read"),
    ],
)
def test_a_broken_image_has_a_reason_in_one_line(value: dict[str, Any] | None, reason: str) -> None:
    image, error = read_image(value, "#ffffff")
    assert image.mode == "RGB"
    assert error is not None
    assert re.match(reason, error)
    assert len(error) < 200
    assert len(error.splitlines()) == 1
