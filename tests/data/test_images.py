"""RELIABILITY E1, E3: any file becomes a picture or one DataError."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from diffalign.data.images import decode, pixels, probe
from diffalign.errors import DataError

from .toy import picture

LIMIT = 1_000_000


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def mutants(data: bytes, rng: np.random.Generator, count: int):
    """Cut, flipped, inserted, zeroed, header swapped."""
    for _ in range(count):
        bad = bytearray(data)
        at, length = int(rng.integers(len(bad))), int(rng.integers(1, 64))
        kind = rng.integers(5)
        if kind == 0:
            bad = bad[:at]
        elif kind == 1:
            for place in rng.integers(len(bad), size=rng.integers(1, 20)):
                bad[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            bad[at:at] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 3:
            bad[at:at + length] = bytes(len(bad[at:at + length]))
        else:
            bad[at % 64:at % 64 + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        yield bytes(bad)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


FILES = {
    "PNG": picture(0, (40, 24)), "JPEG": picture(1, (40, 24), "JPEG", exif=exif(6)), "WEBP": picture(2, (40, 24), "WEBP"),
    "GIF": picture(3, (40, 24), "GIF"), "BMP": picture(4, (40, 24), "BMP"), "TIFF": picture(5, (40, 24), "TIFF"),
    "TIFF-LZW": picture(6, (40, 24), "TIFF", compression="tiff_lzw"), "PNG-P": saved(
        Image.open(io.BytesIO(picture(7, (40, 24)))).quantize(16), "PNG", transparency=3, exif=exif(5)),
}


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_pictures_or_sentences(name):
    rng, refused = np.random.default_rng(len(name)), 0
    for bad in mutants(FILES[name], rng, 60):
        started = time.perf_counter()
        try:
            size = probe(bad, "pairs.jsonl line 7", LIMIT)
            image = decode(bad, "pairs.jsonl line 7", LIMIT)
            assert image.mode == "RGB" and (image.height, image.width) == size
        except DataError as error:
            refused += 1
            assert str(error).startswith("pairs.jsonl line 7: ") and "\n" not in str(error)
        assert time.perf_counter() - started < 0.5
    assert refused > 0


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.4 x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
                                  b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_no_picture_is_named(data):
    with pytest.raises(DataError, match="^row 3: "):
        probe(data, "row 3", LIMIT)


def test_a_bomb_is_refused_from_its_header():
    """20,000 x 20,000 pixels of zeros: 400 Mpx in a file of some 400 kB, 1.2 GB when decoded."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    packed = zlib.compressobj(9)
    row = bytes(1 + 20_000 // 8)
    body = b"".join(packed.compress(row) for _ in range(20_000)) + packed.flush()
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", body)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(DataError, match="row 1: 400000000 pixels, more than data.max_pixels"):
        decode(bomb, "row 1", 100_000_000)
    assert time.perf_counter() - started < 0.1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    with pytest.raises(DataError, match="row 1: 40 x 24 pixels are more than data.max_pixels = 959"):
        decode(FILES["PNG"], "row 1", 959)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused(format):
    frames = [Image.open(io.BytesIO(picture(i))).copy() for i in range(3)]
    with pytest.raises(DataError, match="animated or has several pages"):
        probe(saved(frames[0], format, save_all=True, append_images=frames[1:]), "row 1", LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format, orientation):
    """The stored picture has a red top-left corner; each orientation says where that corner belongs when upright."""
    array = np.full((32, 48, 3), 255, dtype=np.uint8)
    array[:16, :16] = (255, 0, 0)
    options = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    data = saved(Image.fromarray(array), format, exif=exif(orientation), **options)
    size, image = probe(data, "row", LIMIT), decode(data, "row", LIMIT)
    assert size == (image.height, image.width) == ((32, 48) if orientation < 5 else (48, 32))
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    y, x = {"tl": (5, 5), "tr": (5, -6), "br": (-6, -6), "bl": (-6, 5)}[corner]
    found = np.asarray(image)[y, x].astype(int)
    assert found[0] > 200 and found[1] < 60


def test_modes_become_rgb_on_white():
    """Half-transparent black on white is 127 or 128; 16-bit 0x8080 is 0x80; CMYK (0, 255, 255, 0) is red."""
    def value(image: Image.Image, format: str = "PNG", **options) -> list[int]:
        return np.asarray(decode(saved(image, format, **options), "row", LIMIT))[0, 0].tolist()
    assert value(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == [255] * 3
    assert value(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))[0] in (127, 128)
    assert value(Image.new("LA", (8, 8), (0, 0))) == [255] * 3
    assert value(Image.new("L", (8, 8), 77)) == [77] * 3
    assert value(Image.new("1", (8, 8), 1)) == [255] * 3
    assert value(Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))) == [128] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 0, 128, 255])
    assert value(palette) == [0, 128, 255]
    assert value(palette, transparency=1) == [255] * 3
    assert value(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)) == [255] * 3
    red = value(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert red[0] > 240 and max(red[1:]) < 15
    with pytest.raises(DataError, match="floating-point"):
        value(Image.new("F", (8, 8), 0.5), "TIFF")


def test_pixels_span_minus_one_to_one():
    values = pixels([Image.new("RGB", (2, 3), colour) for colour in ((0, 0, 0), (255, 255, 255))])
    assert values.shape == (2, 3, 3, 2) and values.dtype == np.float32
    assert values[0].max() == -1 and values[1].min() == 1
