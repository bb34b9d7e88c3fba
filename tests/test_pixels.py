"""Encoded images are opened as a person sees them, or refused by name before they fill the memory."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from rebeca_ray.errors import InputError
from rebeca_ray.pixels import MAX_PIXELS, open_image, see_image
from tests.conftest import REPO

SIZE = (40, 24)
RED = (200, 30, 30)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene() -> Image.Image:
    """A picture without symmetry, so that every turn of it differs."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    channels = (x * 255 // (SIZE[0] - 1), y * 255 // (SIZE[1] - 1), np.where(x > 2 * y, 220, 20))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def grey() -> Image.Image:
    return scene().convert("L")


def opacity() -> Image.Image:
    """Opaque in the middle, clear outside, half of it between."""
    levels = np.zeros(SIZE[::-1], np.uint8)
    levels[4:20, 6:34] = 128
    levels[8:16, 12:28] = 255
    return Image.fromarray(levels)


def clear_scene() -> Image.Image:
    image = scene().convert("RGBA")
    image.putalpha(opacity())
    return image


def on(colour: tuple[int, int, int], image: Image.Image) -> np.ndarray:
    """Blend in floats, independently of Pillow."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
    weight = pixels[..., 3:] / 255
    return pixels[..., :3] * weight + np.array(colour) * (1 - weight)


def pixels_of(data: bytes, background: str = "#ffffff") -> np.ndarray:
    seen = see_image(data, background)
    assert seen.mode == "RGB"
    return np.asarray(seen).astype(np.float64)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """Return a PNG by hand, of kinds that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def transparent_files() -> Iterator[tuple[str, bytes, Image.Image]]:
    image = clear_scene()
    yield "PNG", encoded(image), image
    yield "WebP", encoded(image, "WEBP", lossless=True, exact=True), image
    yield "TIFF", encoded(image, "TIFF"), image
    shades = grey().convert("LA")
    shades.putalpha(opacity())
    yield "LA", encoded(shades), shades
    # A palette, first with one clear entry, then with an opacity per entry.
    few = scene().quantize(16)
    one = few.convert("RGBA")
    one.putalpha(Image.fromarray(np.where(np.asarray(few) == 3, 0, 255).astype(np.uint8)))
    yield "palette", encoded(few, transparency=3), one
    yield "GIF", encoded(few, "GIF", transparency=3), one
    steps = bytes(range(0, 256, 17))
    every = few.convert("RGBA")
    every.putalpha(Image.fromarray(np.array(list(steps), np.uint8)[np.asarray(few)]))
    yield "palette of opacities", encoded(few, transparency=steps), every
    # One colour, or one level of grey, that is clear.
    keyed = Image.new("RGB", SIZE, RED)
    keyed.paste((0, 0, 0), (5, 5, 20, 20))
    hole = keyed.convert("RGBA")
    hole.paste((0, 0, 0, 0), (5, 5, 20, 20))
    yield "a clear colour", encoded(keyed, transparency=(0, 0, 0)), hole


@pytest.mark.parametrize(("name", "data", "image"), list(transparent_files()))
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 200)])
def test_a_transparent_image_lies_on_the_background(
    name: str, data: bytes, image: Image.Image, background: tuple[int, int, int]
) -> None:
    seen = pixels_of(data, "#{:02x}{:02x}{:02x}".format(*background))
    assert np.abs(seen - on(background, image)).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_clear_level_of_a_grey_png_with_few_bits_is_found(bits: int) -> None:
    """Two rows: the upper one black, the lower one white and clear."""
    width = 8
    rows = b"\0" + bytes(width * bits // 8) + b"\0" + b"\xff" * (width * bits // 8)
    data = png(width, 2, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", 2**bits - 1)))
    assert pixels_of(data, "#0a14c8").tolist() == [[[0, 0, 0]] * width, [[10, 20, 200]] * width]


def test_the_clear_colour_of_a_16_bit_png_is_found() -> None:
    left, right = struct.pack(">HHH", 0xFFFF, 0x1234, 0), struct.pack(">HHH", 0x8000, 0x8000, 0x8000)
    data = png(2, 1, 16, 2, b"\0" + left + right, chunk(b"tRNS", left))
    assert pixels_of(data, "#0a14c8").tolist() == [[[10, 20, 200], [128, 128, 128]]]
    level = struct.pack(">HH", 0x1234, 0xFFFF)
    data = png(2, 1, 16, 0, b"\0" + level, chunk(b"tRNS", struct.pack(">H", 0x1234)))
    assert pixels_of(data, "#0a14c8").tolist() == [[[10, 20, 200], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_an_image_is_turned_upright(kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(scene(), kind, exif=exif, **options)
    stored = np.asarray(scene())
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored.swapaxes(0, 1), 2),
        8: np.rot90(stored),
    }[value]
    seen = pixels_of(data)
    assert seen.shape == turned.shape
    assert np.abs(seen - turned).max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_and_broken_exif_leave_the_image(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(pixels_of(encoded(scene(), exif=exif)), np.asarray(scene()))
    for broken in (b"junk", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert np.array_equal(pixels_of(encoded(scene(), exif=broken)), np.asarray(scene()))


def test_a_turned_image_may_be_transparent_or_of_16_bits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(clear_scene(), exif=exif)
    expected = np.rot90(on((255, 255, 255), clear_scene()), -1)
    assert np.abs(pixels_of(data) - expected).max() <= 1
    deep = Image.fromarray(np.asarray(grey()).astype(np.uint16) * 257)
    expected = np.rot90(np.asarray(grey().convert("RGB")), -1)
    assert np.array_equal(pixels_of(encoded(deep, exif=exif)), expected)
    assert np.array_equal(pixels_of(encoded(deep, "TIFF", exif=exif)), expected)


def deep_files() -> Iterator[tuple[str, bytes]]:
    levels = np.asarray(grey()).astype(np.uint16)
    deep = Image.fromarray(levels * 257)
    yield "PNG", encoded(deep)
    yield "TIFF", encoded(deep, "TIFF")
    yield "TIFF, compressed", encoded(deep, "TIFF", compression="tiff_lzw")
    yield (
        "TIFF, big-endian",
        encoded(Image.frombytes("I;16B", SIZE, (levels * 257).astype(">u2").tobytes()), "TIFF"),
    )
    yield "TIFF of floats", encoded(Image.fromarray(levels.astype(np.float32) / 255), "TIFF")


@pytest.mark.parametrize(("name", "data"), list(deep_files()))
def test_16_bits_and_floats_are_scaled_by_their_range(name: str, data: bytes) -> None:
    assert np.array_equal(pixels_of(data), np.asarray(grey().convert("RGB")))


def test_a_tiff_of_12_bits_is_scaled_by_its_range() -> None:
    """Two pixels, 0 and 4095, in three bytes."""
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries
    assert pixels_of(data + bytes(4)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_white_is_zero_in_some_tiffs() -> None:
    levels = np.asarray(grey()).astype(np.uint16)
    for image in (Image.fromarray(levels * 257), Image.fromarray(levels.astype(np.float32) / 255)):
        data = encoded(image, "TIFF", tiffinfo={262: 0})
        assert Image.open(io.BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
        assert np.array_equal(pixels_of(data), 255 - np.asarray(grey().convert("RGB")))


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colour_of_16_bits_is_seen(channels: str) -> None:
    image = scene() if channels == "RGB" else clear_scene()
    rows = (np.asarray(image).astype(">u2") * 257).astype(">u2")
    data = png(*SIZE, 16, 2 if channels == "RGB" else 6, b"".join(b"\0" + row.tobytes() for row in rows))
    assert np.abs(pixels_of(data) - on((255, 255, 255), image)).max() <= 1


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (scene(), "PNG", {}),
        (scene(), "BMP", {}),
        (scene(), "TIFF", {}),
        (scene(), "WEBP", {"lossless": True}),
        (grey(), "PNG", {}),
        (grey().convert("1"), "PNG", {}),
        (scene().quantize(16), "PNG", {}),
        (scene().quantize(16), "GIF", {}),
        (scene().convert("CMYK"), "TIFF", {}),
        (scene(), "JPEG", {}),
        (grey(), "JPEG", {}),
        (scene().convert("CMYK"), "JPEG", {}),
    ],
)
def test_an_opaque_image_of_8_bits_is_as_pillow_converts_it(
    image: Image.Image, kind: str, options: dict[str, Any]
) -> None:
    """Existing embeddings stay the same."""
    data = encoded(image, kind, **options)
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_seen(kind: str) -> None:
    later = ImageOps.invert(scene())
    if kind == "MPO":
        data = encoded(scene(), kind, save_all=True, append_images=[later])
        assert Image.open(io.BytesIO(data)).format == "MPO"
        assert np.array_equal(pixels_of(data), pixels_of(encoded(scene(), "JPEG")))
        return
    first = scene().quantize(16) if kind == "GIF" else scene()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[later.convert(first.mode)], **lossless)
    assert np.array_equal(pixels_of(data), np.asarray(first.convert("RGB")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no image that can be read; expected PNG, JPEG, WEBP, GIF, BMP or TIFF"),
        (b"text" * 100, "is no image that can be read"),
        (encoded(scene(), "PPM"), "is no image that can be read"),
        (encoded(scene(), "ICO"), "is no image that can be read"),
        (encoded(scene(), "EPS"), "is no image that can be read"),
        (encoded(scene(), "PCX"), "is no image that can be read"),
        (encoded(scene(), "JPEG2000"), "is no image that can be read"),
        (encoded(scene(), "JPEG")[:-200], "is a broken image; expected a whole PNG, JPEG, "),
        (encoded(scene())[:-100], "is a broken image"),
        (encoded(scene(), "WEBP")[:-20], "is a broken image|is no image that can be read"),
        (encoded(Image.new("L", (1, 101))), "has 1 x 101 pixels; expected sides of a ratio of at most 100"),
        (encoded(Image.new("L", (101, 1))), "has 101 x 1 pixels; expected sides of a ratio"),
        (encoded(Image.new("1", (8193, 8192))), "has 8,193 x 8,192 pixels; expected at most 67,108,864"),
        (encoded(Image.new("1", (10_000, 10_000))), "has too many pixels; expected at most 67,108,864"),
        (encoded(Image.new("1", (13_000, 13_000))), "has too many pixels; expected at most 67,108,864"),
        (encoded(Image.new("1", (20_000, 20_000))), "has too many pixels; expected at most 67,108,864"),
        (encoded(Image.new("I", SIZE, 7), "TIFF"), "Pillow's mode I, which is not known; expected 8 or 16"),
        (encoded(Image.new("LAB", SIZE), "TIFF"), "Pillow's mode LAB, which is not known"),
        (encoded(Image.new("F", SIZE, 2.0), "TIFF"), "its floats go from 2 to 2; expected 0 to 1"),
        (encoded(Image.new("F", SIZE, -0.5), "TIFF"), "its floats go from -0.5 to -0.5; expected 0 to 1"),
        (encoded(Image.new("F", SIZE, float("nan")), "TIFF"), "its floats go from nan to nan"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_seen_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        see_image(data)
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_of_the_largest_size_is_opened() -> None:
    assert open_image(encoded(Image.new("1", (8192, 8192)))).size == (8192, 8192)
    assert open_image(encoded(Image.new("1", (1, 100)))).size == (1, 100)
    assert MAX_PIXELS == 8192 * 8192


def test_a_huge_image_takes_no_memory_before_it_is_refused() -> None:
    """169 megapixels in some kilobytes, in a process that has little memory left."""
    code = """
import io, resource, sys
from PIL import Image
from rebeca_ray.errors import InputError
from rebeca_ray.pixels import see_image
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    see_image(data)
except InputError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""
    row = b"\0" + bytes(3 * 13_000)
    compress = zlib.compressobj(9)
    rows = b"".join(compress.compress(row) for _ in range(13_000)) + compress.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(data) < 600_000
    out = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    megabytes, _, message = out.stdout.decode().partition(" ")
    assert "too many pixels" in message
    assert int(megabytes) < 20
    assert out.stderr == b""


def test_images_are_opened_in_one_place() -> None:
    opening = [
        str(path.relative_to(REPO))
        for folder in ("rebeca_ray", "serving", "infra", "jobs")
        for path in (REPO / folder).rglob("*.py")
        if "Image.open(" in path.read_text()
    ]
    assert opening == ["rebeca_ray/pixels.py"]
