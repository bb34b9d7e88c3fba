"""Open encoded images: of known formats, within bounds, and as a person sees them."""

import base64
import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from rebeca_ray.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's other readers stay closed
MAX_PIXELS = 2**26  # 8192 x 8192, the largest image that the decoder draws
MAX_RATIO = 100  # of the longer side to the shorter, since CLIP enlarges the shorter side
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # of at most 8 bits
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def see_image(encoded: bytes, background: str = "#ffffff") -> Image.Image:
    """Return the RGB image that a viewer shows: upright, on `background` where it is transparent.

    Of an animation, it is the first frame. Colour profiles are not applied. Raises InputError as `open_image`
    does, and for pixels whose range is unknown.
    """
    image = open_image(encoded)
    turn = TURNS.get(orientation(image) or 1)
    if image.mode.startswith("I;16"):
        image = from_16_bits(image)
    elif image.mode == "F":
        image = from_floats(image)
    elif image.mode not in MODES:
        raise InputError(
            f"its pixels have the range of Pillow's mode {image.mode}, which is not known; "
            "expected 8 or 16 bits per channel; convert it"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        seen = Image.new("RGB", image.size, background)
        seen.paste(image, mask=image)
    else:
        seen = image if image.mode == "RGB" else image.convert("RGB")
    return seen.transpose(turn) if turn is not None else seen


def open_image(encoded: bytes) -> Image.Image:
    """Decode an image in its own mode. The size in its header is checked before its pixels are decoded.

    Raises InputError for an image that is broken, of another format than FORMATS, or too large.
    """
    with warnings.catch_warnings():
        # A warning about a large image is an error here; all others are about metadata that nobody reads.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            check_size(*image.size)
            mend_transparency(image)
            image.load()
            return image
        except InputError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(
                f"has too many pixels; expected at most {MAX_PIXELS:,}; make it smaller"
            ) from None
        except Exception as error:  # decoders raise errors of any type for a broken file
            expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            if isinstance(error, UnidentifiedImageError):
                raise InputError(f"is no image that can be read; expected {expected}") from None
            raise InputError(f"is a broken image; expected a whole {expected}; save it again") from None


def check_size(width: int, height: int) -> None:
    """Raise InputError for an image with too many pixels, or of a shape like a line."""
    if width * height > MAX_PIXELS:
        raise InputError(
            f"has {width:,} x {height:,} pixels; expected at most {MAX_PIXELS:,}; make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(
            f"has {width:,} x {height:,} pixels; expected sides of a ratio of at most {MAX_RATIO}; crop it"
        )


def mend_transparency(image: ImageFile) -> None:
    """Scale the transparent level of a PNG to 8 bits, as Pillow does with the pixels.

    Pillow keeps the level in the bits of the file.
    """
    level = image.info.get("transparency")
    raw = image.tile[0].args if image.tile else None
    if raw in ("L;2", "L;4") and isinstance(level, int):
        image.info["transparency"] = level * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B" and isinstance(level, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in level)


def from_16_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 8 bits, with an opacity if one level of grey is transparent."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    largest = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    levels = np.asarray(image)
    scale = np.minimum((np.arange(65536) * 255 + largest // 2) // largest, 255).astype(np.uint8)
    grey = scale[levels]
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    shown, clear = Image.fromarray(grey), image.info.get("transparency")
    if not isinstance(clear, int):
        return shown
    opacity = np.where(levels == clear, 0, 255).astype(np.uint8)
    return Image.merge("LA", (shown, Image.fromarray(opacity)))


def from_floats(image: Image.Image) -> Image.Image:
    """Return a grey image of 8 bits. Raises InputError for values outside 0 to 1."""
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 1):  # nor for numbers that are not finite
        raise InputError(f"its floats go from {low:g} to {high:g}; expected 0 to 1; scale them")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 1 - levels
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of a decoded image, None if it has none. Broken EXIF counts as none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif()[ExifTags.Base.Orientation])
        except Exception:  # as a viewer does
            return None


def data_uri(encoded: bytes) -> str:
    """Return an encoded image as an address that holds it, for a page without other files."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
    kind = next((kind for start, kind in kinds.items() if encoded.startswith(start)), "png")
    return f"data:image/{kind};base64," + base64.b64encode(encoded).decode()
