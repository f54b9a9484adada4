"""Pictures of simple drawn objects with names: what the embedded base is pre-trained on.

When: ONCE, by `scripts/build_tiny_base.py`, and by the test that holds the base to its own kind of pictures.

A scene is a background with noise, clutter, and one to seven objects, each of a shape and (for plain shapes) a colour. It
is asked about by name, `"star"` or `"red star"`, and the answer is every object of that name. There is no table among
the shapes, and nothing here calls the code that draws one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vlmdet.data.synthetic.primitives import Color, add_noise, barcode, gradient, random_color, text_block

COLORS: dict[str, Color] = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 215, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 210),
    "purple": (125, 50, 160),
    "pink": (240, 140, 185),
    "brown": (125, 80, 45),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
}

POLYGON_SHAPES = (
    "disc", "ring", "square", "frame", "triangle", "star", "cross", "diamond", "arrow", "crescent", "hexagon", "blob",
    "flower", "bar",
)  # fmt: skip
PATTERN_SHAPES = ("barcode", "text block", "checkerboard", "stripes", "dots")
SHAPES = POLYGON_SHAPES + PATTERN_SHAPES

_RARE = ("frame", "diamond", "crescent", "hexagon", "flower")  # hard to tell from others at the base's 14-pixel patches
_CHANCES = np.array([0.2 if shape in _RARE else 1.0 for shape in SHAPES])
_CHANCES /= _CHANCES.sum()


@dataclass(frozen=True)
class Scene:
    """One drawn picture and what is on it.

    `image` is RGB; `boxes` (n, 4) float64, xyxy fractions, in drawing order (later ones lie on top); `shapes` and
    `colors` name each object (`colors` holds `None` for patterns).
    """

    image: Image.Image
    boxes: np.ndarray
    shapes: list[str]
    colors: list[str | None]

    def names(self) -> list[set[str]]:
        """Return, for each object, every name that fits it: `{"star", "red star"}`."""
        return [
            {shape} | ({f"{color} {shape}"} if color else set())
            for shape, color in zip(self.shapes, self.colors, strict=True)
        ]


def draw_scene(
    rng: np.random.Generator, width: int, height: int, *, objects: int, smallest: float, largest: float
) -> Scene:
    """Draw one scene.

    Input: picture size in pixels; `objects`, how many to try to place (crowded ones are left out); `smallest` and
    `largest`, the range of an object's longer side as a fraction of the picture's shorter side.
    Output: a `Scene` with at least one object.
    """
    base = random_color(rng)
    image = gradient(rng, width, height, base, _shift(rng, base, 70)).convert("RGB")
    draw = ImageDraw.Draw(image)
    _clutter(rng, draw, width, height, base)
    boxes: list[tuple[float, float, float, float]] = []
    shapes: list[str] = []
    colors: list[str | None] = []
    for _ in range(objects * 4):
        if len(boxes) == objects:
            break
        # a repeated name now and then, so that several boxes of one name occur
        repeat = bool(shapes) and rng.random() < 0.3
        shape = str(shapes[-1] if repeat else rng.choice(SHAPES, p=_CHANCES))
        longer = rng.uniform(smallest, largest) * min(width, height)
        center = rng.uniform(0, width), rng.uniform(0, height)
        if shape in POLYGON_SHAPES:
            color = str(colors[-1] if repeat and rng.random() < 0.7 else rng.choice(list(COLORS)))
            rings = _polygon(rng, shape, longer)
            box = _extent(rings, center)
        else:
            color = None
            aspect = 1.0 if shape == "checkerboard" else rng.uniform(0.45, 1.0)
            sides = (longer, longer * aspect) if rng.random() < 0.6 else (longer * aspect, longer)
            box = (
                center[0] - sides[0] / 2,
                center[1] - sides[1] / 2,
                center[0] + sides[0] / 2,
                center[1] + sides[1] / 2,
            )
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height or any(_covers(box, other) for other in boxes):
            continue
        if color is not None:
            fill = _shift(rng, COLORS[color], 28)
            if _close(fill, base):
                continue
            outline = _shift(rng, fill, 90) if rng.random() < 0.4 else None
            _paint(image, draw, rings, center, fill, outline)
        else:
            _paint_pattern(rng, image, shape, box)
        boxes.append(box)
        shapes.append(shape)
        colors.append(color)
    if not boxes:
        return draw_scene(rng, width, height, objects=objects, smallest=smallest, largest=largest)
    image = add_noise(rng, image, float(rng.uniform(0, 14)))
    return Scene(image, np.array(boxes) / [width, height, width, height], shapes, colors)


def _shift(rng: np.random.Generator, color: Color, amount: int) -> Color:
    red, green, blue = (int(np.clip(value + rng.integers(-amount, amount + 1), 0, 255)) for value in color)
    return red, green, blue


def _close(first: Color, second: Color) -> bool:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) < 110


def _covers(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Tell whether two boxes share over a tenth of the smaller one."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return False
    area = min((box[2] - box[0]) * (box[3] - box[1]), (other[2] - other[0]) * (other[3] - other[1]))
    return width * height > 0.1 * area


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, width: int, height: int, base: Color) -> None:
    """Draw faint lines and ellipses behind the objects; none of them has a name."""
    for _ in range(int(rng.integers(0, 7))):
        x, y = rng.uniform(0, width, 2), rng.uniform(0, height, 2)
        ink = _shift(rng, base, 30)
        if rng.random() < 0.5:
            draw.line((x[0], y[0], x[1], y[1]), fill=ink, width=int(rng.integers(1, 4)))
        else:
            draw.ellipse((x.min(), y.min(), x.max(), y.max()), fill=ink)


def _circle(radius: float, points: int = 28) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius


def _spikes(points: int, inner: float) -> np.ndarray:
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


def _outline(rng: np.random.Generator, shape: str) -> list[np.ndarray]:
    """Return the rings of a shape in a unit circle: the outer one, then a hole where the shape has one."""
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.75
    if shape in ("disc", "ring"):
        squeeze = np.array([1.0, rng.uniform(0.8, 1.0)])
        rings = [_circle(1.0) * squeeze]
        return rings + [_circle(rng.uniform(0.5, 0.7)) * squeeze] if shape == "ring" else rings
    if shape in ("square", "frame"):
        rings = [square * np.array([1.0, rng.uniform(0.85, 1.0)])]
        return rings + [rings[0] * rng.uniform(0.55, 0.75)] if shape == "frame" else rings
    if shape == "triangle":
        return [_circle(1.0, 3)]
    if shape == "star":
        return [_spikes(5, rng.uniform(0.36, 0.48))]
    if shape == "flower":
        angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        radius = 0.75 + 0.25 * np.cos(angle * rng.integers(5, 8))
        return [np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]]
    if shape == "cross":
        w = rng.uniform(0.22, 0.36)
        arm = np.array([[-w, -1], [w, -1], [w, -w]])  # a quarter of the outline, turned four times
        turns = [arm, arm[:, ::-1] * [-1, 1], -arm, arm[:, ::-1] * [1, -1]]
        return [np.concatenate(turns)]
    if shape == "diamond":
        return [np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]])]
    if shape == "arrow":
        return [np.array([[-1, -0.2], [0.2, -0.2], [0.2, -0.6], [1, 0], [0.2, 0.6], [0.2, 0.2], [-1, 0.2]])]
    if shape == "crescent":
        outer = np.linspace(0.5, 2 * np.pi - 0.5, 24)
        inner = np.linspace(2 * np.pi - 0.75, 0.75, 24)
        back = np.stack([np.cos(outer), np.sin(outer)], axis=1)
        front = np.stack([np.cos(inner) * 0.75 + 0.32, np.sin(inner) * 0.72], axis=1)
        return [np.concatenate([back, front])]
    if shape == "hexagon":
        return [_circle(1.0, 6)]
    if shape == "bar":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array([1.0, rng.uniform(0.15, 0.35)])]
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # blob: a wobbling circle
    radius = np.full(40, 0.75)
    for wave in range(2, 6):
        radius += rng.uniform(-0.14, 0.14) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return [np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]]


def _polygon(rng: np.random.Generator, shape: str, longer: float) -> list[np.ndarray]:
    """Turn and scale a shape so that the longer side of its box is `longer` pixels; centred on 0."""
    spread = 0.25 if shape in ("square", "frame", "cross", "diamond", "star") else np.pi
    angle = rng.uniform(-spread, spread)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rings = [ring @ turn for ring in _outline(rng, shape)]
    low, high = rings[0].min(axis=0), rings[0].max(axis=0)
    return [(ring - (low + high) / 2) * longer / (high - low).max() for ring in rings]


def _extent(rings: list[np.ndarray], center: tuple[float, float]) -> tuple[float, float, float, float]:
    low, high = rings[0].min(axis=0) + center, rings[0].max(axis=0) + center
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _paint(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    rings: list[np.ndarray],
    center: tuple[float, float],
    fill: Color,
    outline: Color | None,
) -> None:
    points = [[(float(x), float(y)) for x, y in ring + np.array(center)] for ring in rings]
    if len(points) == 1:
        draw.polygon(points[0], fill=fill, outline=outline)
        return
    mask = Image.new("L", image.size, 0)
    stencil = ImageDraw.Draw(mask)
    stencil.polygon(points[0], fill=255)
    stencil.polygon(points[1], fill=0)
    image.paste(fill, mask=mask)


def _paint_pattern(rng: np.random.Generator, image: Image.Image, shape: str, box: tuple[float, ...]) -> None:
    left, top = round(box[0]), round(box[1])
    width, height = max(round(box[2]) - left, 6), max(round(box[3]) - top, 6)
    ink, paper = random_color(rng, 0, 110), random_color(rng, 150, 256)
    if shape == "barcode":
        tile = barcode(rng, width, height)
    elif shape == "text block":
        tile = text_block(rng, width, height, ink, paper)
    else:
        if rng.random() < 0.3:
            ink, paper = paper, ink
        tile = Image.new("RGBA", (width, height), (*paper, 255))
        pen = ImageDraw.Draw(tile)
        cells = int(rng.integers(3, 7))
        step = max(width, height) / cells
        for i in range(cells):
            if shape == "stripes":
                if width >= height:
                    pen.rectangle((i * step, 0, i * step + step / 2, height), fill=(*ink, 255))
                else:
                    pen.rectangle((0, i * step, width, i * step + step / 2), fill=(*ink, 255))
                continue
            for j in range(cells):
                if shape == "checkerboard" and (i + j) % 2 == 0:
                    pen.rectangle((i * step, j * step, (i + 1) * step - 1, (j + 1) * step - 1), fill=(*ink, 255))
                elif shape == "dots":
                    low, high = step * 0.2, step * 0.75
                    spot = (i * step + low, j * step + low, i * step + high, j * step + high)
                    pen.ellipse(spot, fill=(*ink, 255))
    image.paste(tile, (left, top), tile)
