"""Encoded images: the right format, the right size, and the word that a machine drew them."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rebeca_ray.decoder.encoding import encode_image

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_encoding(image_format: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    opened = Image.open(io.BytesIO(encode_image(image, image_format, 100)))  # type: ignore[arg-type]
    assert (opened.format, opened.size) == (image_format, (48, 32))
    if image_format != "JPEG":
        assert np.array_equal(np.asarray(opened.convert("RGB")), image)
    assert Image.open(io.BytesIO(encode_image(image, image_format, 90, max_size=16))).size == (16, 11)  # type: ignore[arg-type]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("max_size", [None, 16])
def test_every_image_says_that_a_machine_drew_it(image_format: str, max_size: int | None) -> None:
    encoded = encode_image(np.zeros((32, 48, 3), np.uint8), image_format, 90, max_size=max_size)  # type: ignore[arg-type]
    (description,) = ElementTree.fromstring(Image.open(io.BytesIO(encoded)).info["xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == SOURCE


def test_quality_is_a_trade_of_bytes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("WEBP", "JPEG"):
        assert len(encode_image(image, image_format, 30)) < len(encode_image(image, image_format, 90))  # type: ignore[arg-type]
