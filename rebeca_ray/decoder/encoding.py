"""Encode pixels as JPEG, WebP or PNG, thumbnails too. Every file states that a machine made the image.

The statement is IPTC's digital source type in an XMP packet, which regulators, search engines and the big
platforms read. `rebeca_ray/provenance/` has the packet, and signs the files of items.
"""

import io
from typing import Literal

import numpy as np
from PIL import Image, PngImagePlugin

from rebeca_ray.provenance.marks import XMP_PACKET


def encode_image(
    image_YX3: np.ndarray,
    image_format: Literal["JPEG", "WEBP", "PNG"],
    quality: int,
    max_size: int | None = None,
    marked: bool = True,
) -> bytes:
    """Encode a uint8 image, shrunk to `max_size` pixels per side if set. WebP at quality 100 is lossless.

    Unless `marked`, it has no XMP packet.
    """
    image = Image.fromarray(image_YX3)
    if max_size is not None:
        image.thumbnail((max_size, max_size))
    buffer = io.BytesIO()
    xmp = {"xmp": XMP_PACKET} if marked else {}
    if image_format == "PNG":
        text = PngImagePlugin.PngInfo()
        if marked:
            text.add_itxt("XML:com.adobe.xmp", XMP_PACKET.decode())
        image.save(buffer, "PNG", pnginfo=text)
    elif image_format == "WEBP":
        image.save(buffer, "WEBP", quality=quality, lossless=quality == 100, **xmp)
    else:
        image.save(buffer, "JPEG", quality=quality, **xmp)
    return buffer.getvalue()
