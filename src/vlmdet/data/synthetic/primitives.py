"""Paint shared by both kinds of drawn pictures: backgrounds, noise, words, text blocks, barcodes.

When: ONCE, while a data set is drawn. Everything takes a `numpy.random.Generator`; the same seed paints the same
pixels. Nothing here draws a table: that code lives in `packages.py` alone, so that the embedded base never sees one.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

Color = tuple[int, int, int]

WORDS = (
    "water sugar salt milk wheat flour cocoa butter oil palm starch yeast egg soy lecithin vanilla aroma acid citric "
    "natural contains may traces nuts keep cool dry best before see lid product made with pure organic fresh classic "
    "original family pack new recipe taste crunchy golden mild extra farm valley sunny"
).split()


def random_color(rng: np.random.Generator, low: int = 0, high: int = 256) -> Color:
    """Draw an RGB colour with every channel in [low, high)."""
    red, green, blue = (int(value) for value in rng.integers(low, high, size=3))
    return red, green, blue


def luminance(color: Color) -> float:
    """Return how bright a colour looks, 0 to 255 (Rec. 601 weights)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font in a size; cached, since opening it costs a millisecond."""
    return ImageFont.load_default(size)


def gradient(rng: np.random.Generator, width: int, height: int, first: Color, second: Color) -> Image.Image:
    """Paint a smooth run from one colour to another at a random angle; returns RGB of (width, height)."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    share = ((np.cos(angle) * x + np.sin(angle) * y) / 2.83 + 0.5)[..., None]
    pixels = np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def add_noise(rng: np.random.Generator, image: Image.Image, sigma: float) -> Image.Image:
    """Add grey noise of a standard deviation given in 8-bit steps; returns a new RGB image of the same size."""
    if sigma <= 0:
        return image
    bank = _noise_bank()
    side = bank.shape[0] // 2
    top, left = (int(rng.integers(side)) for _ in range(2))
    repeat = (-(-(image.height + top) // side), -(-(image.width + left) // side))
    if max(repeat) > 2:  # larger than the doubled bank
        bank = np.tile(bank[:side, :side], repeat)
    noise = bank[top : top + image.height, left : left + image.width] * np.float32(sigma)
    layer = Image.fromarray((np.floor(noise).clip(-128, 127) + 128).astype(np.uint8))
    return ImageChops.add(image, Image.merge("RGB", (layer,) * 3), 1, -128)  # four times faster than in floats


@functools.cache
def _noise_bank() -> np.ndarray:
    """Return (1018, 1018) float32: (509, 509) of normal noise, twice each way; a window costs less than new noise."""
    return np.tile(np.random.default_rng(0).standard_normal((509, 509), dtype=np.float32), (2, 2))


def words(rng: np.random.Generator, count: int) -> str:
    """Return some words of an ingredient list."""
    return " ".join(WORDS[rng.integers(len(WORDS))] for _ in range(count))  # what `choice` draws, ten times faster


def text_block(rng: np.random.Generator, width: int, height: int, ink: Color, paper: Color | None) -> Image.Image:
    """Paint lines of running text that fill a block; returns RGBA of (width, height), transparent without `paper`."""
    block = Image.new("RGBA", (width, height), (*paper, 255) if paper else (0, 0, 0, 0))
    draw = ImageDraw.Draw(block)
    size = int(np.clip(height / rng.integers(3, 8), 7, 22))
    step = max(int(size * 1.2), 1)
    for top in range(0, max(height - size + 2, 1), step):
        line = words(rng, max(2, int(width / size / 2.2)))
        draw.text((1, top), line, fill=(*ink, 255), font=font(size))
    return block


def barcode(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Paint black bars of uneven width on white, sometimes with digits below; returns RGBA of (width, height)."""
    code = Image.new("RGBA", (width, height), (255, 255, 255, 255))
    draw = ImageDraw.Draw(code)
    digits = height > 30 and rng.random() < 0.7
    bottom = int(height * 0.82) if digits else height - 2
    unit = max(width / 60, 1.0)
    x = 2.0
    while x < width - 3:
        bar = float(rng.integers(1, 4)) * unit
        draw.rectangle((x, 2, min(x + bar - 1, width - 3), bottom), fill=(10, 10, 10, 255))
        x += bar + float(rng.integers(1, 4)) * unit
    if digits:
        text = "".join(str(rng.integers(10)) for _ in range(12))
        draw.text((4, bottom), text, fill=(10, 10, 10, 255), font=font(max(int(height * 0.15), 7)))
    return code
