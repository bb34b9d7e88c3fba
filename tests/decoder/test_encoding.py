"""Encoded images have the right format and size, and state that a machine made them."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rebeca_ray.decoder.encoding import encode_image

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_an_image_is_encoded_in_each_format(image_format: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    opened = Image.open(io.BytesIO(encode_image(image, image_format, 100)))  # type: ignore[arg-type]
    assert (opened.format, opened.size) == (image_format, (48, 32))
    if image_format != "JPEG":
        assert np.array_equal(np.asarray(opened.convert("RGB")), image)
    shrunk = encode_image(image, image_format, 90, max_size=16)  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(shrunk)).size == (16, 11)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("max_size", [None, 16])
def test_every_image_states_that_a_machine_made_it(image_format: str, max_size: int | None) -> None:
    black = np.zeros((32, 48, 3), np.uint8)
    encoded = encode_image(black, image_format, 90, max_size=max_size)  # type: ignore[arg-type]
    (description,) = ElementTree.fromstring(Image.open(io.BytesIO(encoded)).info["xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == SOURCE


def test_lower_quality_takes_fewer_bytes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("WEBP", "JPEG"):
        low, high = (encode_image(image, image_format, quality) for quality in (30, 90))  # type: ignore[arg-type]
        assert len(low) < len(high)
