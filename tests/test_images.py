"""Pictures: every kind of bad or odd file gives an upright RGB image or one `ImageError`."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet import images
from vlmdet.errors import ImageError
from vlmdet.images import decode, open_image, orientation, to_upright_rgb


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(tag: int) -> Image.Exif:
    block = Image.Exif()
    block[274] = tag
    return block


def test_path_and_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    data = encode(Image.fromarray(pixels), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", data):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "absent.jpg")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(tmp_path)


def test_zero_bytes_name_the_picture() -> None:
    with pytest.raises(ImageError, match=r"row 7: the file is empty \(0 bytes\)"):
        open_image(b"", name="row 7")


def test_no_picture_at_all() -> None:
    with pytest.raises(ImageError, match="not a picture"):
        open_image(b"<html>404</html>")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_file(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(ImageError):
        open_image(data[: int(len(data) * share)])


def test_cmyk_is_converted() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image = open_image(encode(red, "TIFF"))
    assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 0, 0))


def test_palette_is_converted() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 12, 200, 34])
    opened = open_image(encode(image, "PNG"))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", (12, 200, 34))


def test_transparency_is_laid_on_white() -> None:
    layer = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    layer.putpixel((1, 0), (10, 20, 30, 0))
    opened = open_image(encode(layer, "PNG"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    """0, 50 %, 100 % of 65,535; a plain `convert` would give white for all but the first."""
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    opened = open_image(encode(Image.fromarray(grey), "PNG"))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_every_turn_is_undone(kind: str, tag: int) -> None:
    """The upright picture is 48 x 32 with a white upper left corner; stored so that the tag leads back to it."""
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 24, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[tag]) if tag in undo else upright
    image = open_image(encode(stored, kind, exif=exif(tag)))
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(upright, dtype=int)).mean() < 4
    assert np.array_equal(np.asarray(to_upright_rgb(image)), np.asarray(image)), "turned twice"


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_odd_orientation_counts_as_upright(tag: int) -> None:
    image = decode(encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif(tag)), "x")
    assert orientation(image) == 1
    assert to_upright_rgb(image).size == (6, 4)


def test_sixty_megapixels_open() -> None:
    """One bit a pixel: 7.5 MB to decode. 60 megapixels are a real camera's, and no attack."""
    image = Image.new("1", (10_000, 6_000), 1)
    assert decode(encode(image, "PNG"), "x").size == (10_000, 6_000)


def test_over_the_limit_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 99)
    assert open_image(encode(Image.new("RGB", (11, 9)), "PNG")).size == (11, 9)
    with pytest.raises(ImageError, match="10 x 10 pixels, over the limit of 99"):
        open_image(encode(Image.new("RGB", (10, 10)), "PNG"))


def test_a_header_that_claims_gigapixels_is_refused() -> None:
    """A PNG of 100 bytes whose head says 60,000 x 60,000: Pillow's own limit."""
    data = bytearray(encode(Image.new("1", (1, 1)), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="over the limit"):
        open_image(bytes(data))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_broken_bytes_give_a_picture_or_an_image_error(kind: str) -> None:
    """Bytes of the head and its EXIF block are changed at random: anything but ImageError would be a traceback."""
    data = encode(Image.new("RGB", (20, 10), (9, 9, 9)), kind, exif=exif(6))
    chance = random.Random(0)
    opened = refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(min(len(broken), 220))] = chance.randrange(256)
        try:
            assert open_image(bytes(broken)).mode == "RGB"
            opened += 1
        except ImageError:
            refused += 1
    assert opened
    assert refused


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0garbage garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_block_counts_as_upright(block: bytes) -> None:
    image = open_image(encode(Image.new("RGB", (20, 10)), "WEBP", exif=block))
    assert image.size == (20, 10)
