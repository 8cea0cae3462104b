"""Safe decoding: bytes of any picture -> an upright RGB picture on white, or one DataError that names the row.

Sizes and the EXIF orientation come from the header, so a decompression bomb is refused before a pixel is decoded. Colour
profiles are not applied. Only common raster formats are opened: no format that starts another program.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from ..errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112
MAX_BYTES = 1 << 30  # a file larger than this is no picture
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}

# What Pillow's parsers raise on broken files; found by fuzzing (tests/data/test_images.py). MemoryError: a lying header.
BROKEN = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError,
          ZeroDivisionError, NotImplementedError, MemoryError, struct.error)


def probe(data: bytes, where: str, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises DataError naming ``where``."""
    with _parsing(where):
        image = _open(data, where, max_pixels)
        return _upright_size(image)


def decode(data: bytes, where: str, max_pixels: int) -> Image.Image:
    """The whole picture, upright, RGB, transparency on white, 16 bits reduced to 8. Raises DataError naming ``where``."""
    with _parsing(where):
        image = _open(data, where, max_pixels)
        size, turn = _upright_size(image), TURNS.get(_orientation(image))
        image.load()
        image = _rgb(image, where)
        image = image.transpose(turn) if turn is not None else image
        if (image.height, image.width) != size:
            raise DataError(f"{where}: the picture's header and content disagree about its size")
        return image


def pixels(images: list[Image.Image]) -> np.ndarray:
    """RGB pictures of one size -> [N, 3, H, W] float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return (stacked.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2).copy()


@contextmanager
def _parsing(where: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own pixel limit governs; broken metadata is no reason to warn
            yield
    except Image.DecompressionBombError as error:  # Pillow's own limit of 179 million pixels comes first
        size = re.search(r"\d+", str(error))
        raise DataError(f"{where}: {size[0] if size else 'far too many'} pixels, more than data.max_pixels allows or "
                        "than can be opened at all") from None
    except BROKEN as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = "it is no picture of a known format" if "cannot identify" in reason else f"the picture is corrupt ({reason})"
        raise DataError(f"{where}: {reason}; readable are {', '.join(FORMATS)}") from None


def _open(data: bytes, where: str, max_pixels: int) -> Image.Image:
    if not data:
        raise DataError(f"{where}: the picture has no bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise DataError(f"{where}: {image.width} x {image.height} pixels are more than data.max_pixels = {max_pixels}")
    # a JPEG with a preview or a depth map calls itself a multi-picture file; its first picture is the photograph
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise DataError(f"{where}: the picture is animated or has several pages; one still picture is needed")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Broken EXIF counts as none; Pillow turns TIFF files itself."""
    raw = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(raw, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        return int(exif.get(ORIENTATION, 1))
    except BROKEN:
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        turned = image.tag_v2.get(ORIENTATION, 1) in (5, 6, 7, 8) and image.size == _stored_size(image)
    else:
        turned = _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Size as a TIFF file stores it; Pillow swaps ``image.size`` early in some versions."""
    return image.tag_v2.get(256), image.tag_v2.get(257)


def _rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(image, dtype=np.float64), 0, 65535) / 257.0
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{where}: a floating-point picture has no known range; save it with 8 bits per channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
