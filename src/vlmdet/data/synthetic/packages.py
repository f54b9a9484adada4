"""Drawn food packages with nutrition tables: the data set that everybody has.

When: ONCE, while the set is written; training may also draw new ones at every step.

A package is a coloured body with bands, a logo, a name, running text, a barcode, badges and framed notes, and none to
three nutrition tables, which are not covered and never overlap. `draw_package` draws one; `write_drawn_set` writes
Parquet files in the schema of the Hugging Face data set `openfoodfacts/nutrition-table-detection`. One row of a file:

    {"image_id": "drawn-val-0-000003", "image": {"bytes": b"\\xff\\xd8…", "path": "drawn-val-0-000003.jpg"},
     "width": 362, "height": 471,
     "meta": {"barcode": "4006381333931", "off_image_id": "1", "image_url": ""},
     "objects": {"bbox": [[0.41, 0.08, 0.77, 0.63]], "category_id": [0], "category_name": ["nutrition-table"]}}

`bbox` is y_min, x_min, y_max, x_max as fractions. The code that draws a table is in this module alone: the embedded
base is pre-trained without it and has never seen a table. That is why the module is long: a second one could be
imported by the base's own pictures.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.dataset import NUTRITION_LABELS
from vlmdet.data.synthetic.primitives import (
    Color,
    add_noise,
    barcode,
    font,
    gradient,
    luminance,
    random_color,
    text_block,
)
from vlmdet.data.writers import parquet
from vlmdet.errors import DataError

LABEL = "nutrition-table"

WORTH_PROCESSES = 1000
"""Rows from which on several processes draw: starting them takes a second or two."""

_TITLES = (
    "Nutrition facts",
    "Nutrition information",
    "Nutrition",
    "Typical values",
    "Nutritional values",
    "Valeurs nutritionnelles",
)
_NUTRIENTS = (
    "Energy", "Fat", "- saturates", "Carbohydrate", "- sugars", "Fibre", "Protein", "Salt", "Sodium", "Calcium", "Iron",
    "Vitamin C", "Vitamin D", "Potassium", "Magnesium", "Zinc", "Folic acid", "Iodine",
)  # fmt: skip
_AMOUNTS = (
    "0 g", "0.1 g", "0.3 g", "0.5 g", "0.8 g", "1.2 g", "1.9 g", "2.4 g", "3.5 g", "4.7 g", "6.1 g", "8.0 g",
    "9.6 g", "11 g", "14 g", "18 g", "23 g", "31 g", "46 g", "58 g", "72 g", "5 mg", "12 mg", "40 mg", "80 mg",
    "120 mg", "310 mg", "<0.1 g",
)  # fmt: skip
_ENERGY = ("180 kJ", "95 kcal", "420 kJ", "231 kcal", "1046 kJ", "389 kcal", "1850 kJ", "512 kcal")
_HEADS = ("100 g", "per 100 g", "100 ml", "portion", "30 g", "% RI", "serving")
_BRANDS = ("Nuvo", "BIO", "Lindo", "Farm", "Alpa", "Mio", "Verde", "Sol", "Kiko", "Tasty")
_PRODUCTS = (
    "Muesli",
    "Choco",
    "Cookies",
    "Yogurt",
    "Pasta",
    "Crackers",
    "Oat bar",
    "Juice",
    "Soup",
    "Honey",
    "Rice",
    "Chips",
)

_WHITE: Color = (250, 250, 250)
_BLACK: Color = (18, 18, 18)
_Rect = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class DrawnPackage:
    """One drawn picture and its nutrition tables.

    Attributes:
        image: RGB, 330 to 520 pixels a side.
        boxes: n tables, n from 0 to 3; each the tight upright box of a table that may be turned by up to 6 degrees.
        labels: n times `nutrition-table`.
    """

    image: Image.Image
    boxes: Boxes
    labels: tuple[str, ...]


def draw_package(rng: np.random.Generator) -> DrawnPackage:
    """Draw one package.

    When: once per row of a drawn set, or at every step; takes some milliseconds.

    Output: a `DrawnPackage`; about 8 % have no table, 14 % two or three. A table's longer side is 25 to 75 % of the
    picture's shorter side. The same state of `rng` gives the same pixels.
    """
    width, height = _picture_size(rng)
    image, body = _package_body(rng, width, height)
    tables = _plan_tables(rng, width, height)
    rects = [_upright(sides, center, angle) for sides, center, angle in tables]
    _decorate(rng, image, body, rects)
    for sides, center, angle in tables:
        _paint_table(rng, image, sides, center, angle)
    image = add_noise(rng, image, float(rng.uniform(0, 11)))
    boxes = Boxes.from_array(rects, BoxFormat("xyxy", "pixel"), width, height)
    return DrawnPackage(image, boxes, (LABEL,) * len(boxes))


def write_drawn_set(folder: Path, *, train: int, val: int, test: int = 0, seed: int = 0) -> Path:
    """Write a drawn data set as Parquet files.

    When: once; `vlmdet demo` does it.

    Input: `folder`, made where absent; rows of each split, 0 leaves the split out; `seed`: the same one gives the same
    bytes. Row i of a split depends on seed, split and i only, so a longer set begins with the shorter one, and no
    picture of one split occurs in another.
    Output: `folder`, with `data/train-00000-of-00001.parquet`, `data/val-…`, `data/test-…`.

    Raises:
        DataError: a number of rows is negative, all are 0, or the folder holds a split that would not be written again.
    """
    counts = {"train": train, "val": val, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise DataError(f"a drawn set of {train} train, {val} val and {test} test rows", "ask for at least one row")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    paths = {split: data / f"{split}-00000-of-00001.parquet" for split in counts}
    others = sorted(set(data.glob("*.parquet")) - {paths[split] for split, count in counts.items() if count})
    if others:
        raise DataError(
            f"{data} already holds {others[0].name}, which would be mixed with the new set", "name a new folder"
        )
    for (split, count), sequence in zip(counts.items(), np.random.SeedSequence(seed).spawn(len(counts)), strict=True):
        if count:
            rows = _rows(f"drawn-{split}-{seed}", sequence.spawn(count))
            parquet.write_rows(paths[split], rows, parquet.hub_features())
    return folder


def _rows(prefix: str, seeds: list[np.random.SeedSequence]) -> Iterator[dict[str, Any]]:
    names = [f"{prefix}-{number:06d}" for number in range(len(seeds))]
    if len(seeds) < WORTH_PROCESSES:
        yield from map(_row, names, seeds)
        return
    # spawn, not fork: the caller may have threads of torch or Arrow
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_row, names, seeds, chunksize=32)


def _row(name: str, seed: np.random.SeedSequence) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    package = draw_package(rng)
    width, height = package.image.size
    file = io.BytesIO()
    package.image.save(file, "JPEG", quality=90)
    return {
        "image_id": name,
        "image": {"bytes": file.getvalue(), "path": f"{name}.jpg"},
        "width": width,
        "height": height,
        "meta": {
            "barcode": "".join(str(digit) for digit in rng.integers(10, size=13)),
            "off_image_id": "1",
            "image_url": "",
        },
        "objects": {
            "bbox": package.boxes.to_array(BoxFormat("yxyx", "fraction"), width, height).tolist(),
            "category_id": [NUTRITION_LABELS.index(label) for label in package.labels],
            "category_name": list(package.labels),
        },
    }


# --- where things stand -----------------------------------------------------------------------------------------------


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    shorter = int(rng.integers(330, 421))
    longer = int(min(520, shorter * rng.uniform(1.0, 1.45)))
    return (shorter, longer) if rng.random() < 0.75 else (longer, shorter)


def _upright(sides: tuple[int, int], center: tuple[float, float], angle: float) -> _Rect:
    """Return the tight upright box of a rectangle turned by `angle` radians about its centre: xyxy in pixels."""
    cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
    half_width, half_height = (sides[0] * cos + sides[1] * sin) / 2, (sides[0] * sin + sides[1] * cos) / 2
    x, y = center
    return float(x - half_width), float(y - half_height), float(x + half_width), float(y + half_height)


def _apart(rect: _Rect, others: list[_Rect], gap: float) -> bool:
    return all(
        rect[0] - gap >= other[2] or rect[2] + gap <= other[0] or rect[1] - gap >= other[3] or rect[3] + gap <= other[1]
        for other in others
    )


def _plan_tables(
    rng: np.random.Generator, width: int, height: int
) -> list[tuple[tuple[int, int], tuple[float, float], float]]:
    """Choose sides, centre and angle of each table, all inside the picture and apart from one another."""
    wanted = int(rng.choice(4, p=(0.08, 0.77, 0.11, 0.04)))
    plans: list[tuple[tuple[int, int], tuple[float, float], float]] = []
    rects: list[_Rect] = []
    shorter = min(width, height)
    for attempt in range(80):
        if len(plans) == wanted:
            break
        # the later tries are small, so that the second and the third table find room
        largest = 0.75 if wanted == 1 else 0.45 if attempt < 40 else 0.3
        longer = rng.uniform(0.25, largest) * shorter
        aspect = rng.uniform(0.42, 1.0)
        sides = (
            (round(longer), round(longer * aspect)) if rng.random() < 0.45 else (round(longer * aspect), round(longer))
        )
        angle = 0.0 if rng.random() < 0.35 else float(np.radians(np.clip(rng.normal(0, 2.8), -6, 6)))
        _, _, half_width, half_height = _upright(sides, (0.0, 0.0), angle)
        center = (
            float(rng.uniform(half_width + 3, width - half_width - 3)),
            float(rng.uniform(half_height + 3, height - half_height - 3)),
        )
        if angle == 0.0:  # on whole pixels, so that the box is exact
            center = (int(center[0] - sides[0] / 2) + sides[0] / 2, int(center[1] - sides[1] / 2) + sides[1] / 2)
        rect = _upright(sides, center, angle)
        if _apart(rect, rects, 6):
            plans.append((sides, center, angle))
            rects.append(rect)
    return plans


# --- the package ------------------------------------------------------------------------------------------------------


def _wash(rng: np.random.Generator, width: int, height: int, color: Color, depth: int) -> Image.Image:
    """Paint a gradient around a colour; drawn small and enlarged, which costs a tenth."""
    other = tuple(int(np.clip(value + rng.integers(-depth, depth + 1), 0, 255)) for value in color)
    small = gradient(rng, 24, 24, color, (other[0], other[1], other[2]))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def _package_body(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Color]:
    """Paint what lies behind everything: a ground, the package on it, bands across the package."""
    ground = random_color(rng, 60, 230)
    body = random_color(rng, 175, 252) if rng.random() < 0.6 else random_color(rng, 30, 225)
    image = _wash(rng, width, height, body, 45)
    if rng.random() < 0.6:
        margin_x, margin_y = (int(rng.uniform(0.01, 0.05) * side) for side in (width, height))
        mask = Image.new("L", (width, height), 0)
        frame = (margin_x, margin_y, width - margin_x, height - margin_y)
        ImageDraw.Draw(mask).rounded_rectangle(frame, radius=int(rng.integers(0, 26)), fill=255)
        image = Image.composite(image, _wash(rng, width, height, ground, 50), mask)
        draw = ImageDraw.Draw(image)
        brand = random_color(rng)
        for top in (True, False):
            if rng.random() < 0.55:
                depth = int(height * rng.uniform(0.05, 0.2))
                y = margin_y if top else height - margin_y - depth
                draw.rectangle((margin_x, y, width - margin_x, y + depth), fill=brand)
    if rng.random() < 0.4:
        draw = ImageDraw.Draw(image)
        x, lean = rng.uniform(0, width), rng.uniform(-0.4, 0.4) * width
        breadth = rng.uniform(0.06, 0.3) * width
        points = [(x, 0), (x + breadth, 0), (x + breadth + lean, height), (x + lean, height)]
        draw.polygon([(float(a), float(b)) for a, b in points], fill=random_color(rng))
    return image, body


def _decorate(rng: np.random.Generator, image: Image.Image, body: Color, taken: list[_Rect]) -> None:
    """Paint everything on a package that is no table, apart from the tables and from each other."""
    width, height = image.size
    shorter = min(width, height)
    rects = list(taken)
    kinds = ["product", "logo"] if rng.random() < 0.85 else ["logo"]
    kinds += ["text"] * int(rng.integers(1, 4)) + ["barcode"] * int(rng.random() < 0.6)
    kinds += [str(kind) for kind in rng.choice(("badge", "icons", "photo", "note", "swatch"), size=rng.integers(1, 5))]
    for kind in kinds:
        for _ in range(8):
            sides = _decoy_sides(rng, kind, shorter)
            left, top = int(rng.uniform(4, width - sides[0] - 4)), int(rng.uniform(4, height - sides[1] - 4))
            rect = (left, top, left + sides[0], top + sides[1])
            if _apart(rect, rects, 4):
                rects.append(rect)
                _paint_decoy(rng, image, kind, (left, top), sides)
                break


def _decoy_sides(rng: np.random.Generator, kind: str, shorter: int) -> tuple[int, int]:
    low, high, aspect = {
        "product": (0.35, 0.8, 0.25),
        "logo": (0.18, 0.4, 0.6),
        "text": (0.25, 0.6, rng.uniform(0.2, 0.7)),
        "barcode": (0.18, 0.38, rng.uniform(0.5, 0.75)),
        "badge": (0.12, 0.24, 1.0),
        "icons": (0.15, 0.35, 0.3),
        "photo": (0.25, 0.5, rng.uniform(0.6, 1.0)),
        "note": (0.25, 0.5, rng.uniform(0.3, 0.7)),
        "swatch": (0.1, 0.4, rng.uniform(0.2, 1.0)),
    }[kind]
    longer = rng.uniform(low, high) * shorter
    sides = round(longer), max(round(longer * aspect), 8)
    return sides if kind not in ("barcode", "swatch") or rng.random() < 0.7 else (sides[1], sides[0])


def _paint_decoy(
    rng: np.random.Generator, image: Image.Image, kind: str, corner: tuple[int, int], sides: tuple[int, int]
) -> None:
    """Paint one decoy inside a rectangle given by its upper left corner and its sides in pixels."""
    left, top = corner
    width, height = sides
    right, bottom = left + width - 1, top + height - 1
    draw = ImageDraw.Draw(image)
    ink = _readable_on(image, (left, top, right, bottom), rng)
    if kind == "product":
        _fit_text(image, str(rng.choice(_PRODUCTS)), corner, sides, ink)
    elif kind == "logo":
        color = random_color(rng)
        if rng.random() < 0.6:
            draw.ellipse((left, top, right, bottom), fill=color, outline=ink, width=int(rng.integers(1, 4)))
        else:
            draw.rounded_rectangle((left, top, right, bottom), radius=height // 3, fill=color)
        inner = (left + width // 6, top + height // 4), (width * 2 // 3, height // 2)
        _fit_text(image, str(rng.choice(_BRANDS)), *inner, _WHITE if luminance(color) < 140 else _BLACK)
    elif kind == "text":
        paper = random_color(rng, 200, 256) if rng.random() < 0.25 else None
        tile = text_block(rng, width, height, _BLACK if paper else ink, paper)
        image.paste(tile, corner, tile)
    elif kind == "barcode":
        image.paste(barcode(rng, width, height).convert("RGB"), corner)
    elif kind == "badge":
        spikes = int(rng.integers(10, 20))
        angle = np.arange(2 * spikes) * np.pi / spikes
        radius = np.where(np.arange(2 * spikes) % 2 == 0, 0.5, rng.uniform(0.38, 0.5)) * (width - 1)
        rim = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + [left + width / 2, top + height / 2]
        color = random_color(rng)
        draw.polygon([(float(x), float(y)) for x, y in rim], fill=color)
        inner = (left + width // 5, top + height * 3 // 8), (width * 3 // 5, height // 3)
        text = str(rng.choice(("NEW", "-20%", "BIO", "2+1", "XL")))
        _fit_text(image, text, *inner, _WHITE if luminance(color) < 140 else _BLACK)
    elif kind == "icons":
        count = max(width // max(height, 1), 1)
        for number in range(count):
            start, end = left + number * height + 2, left + (number + 1) * height - 3
            if rng.random() < 0.5:
                draw.ellipse((start, top + 2, end, bottom - 2), outline=ink, width=2)
            else:
                triangle = [(start, bottom - 2), (end, bottom - 2), ((start + end) / 2, top + 2)]
                draw.polygon(triangle, outline=ink, width=2)
    elif kind == "photo":
        for _ in range(int(rng.integers(3, 9))):
            r = rng.uniform(0.15, 0.3) * min(sides)
            x, y = rng.uniform(left + r, right - r), rng.uniform(top + r, bottom - r)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=random_color(rng, 60, 240))
    elif kind == "note":  # a framed text: the decoy that is nearest to a table
        color = random_color(rng, 190, 256)
        draw.rectangle((left, top, right, bottom), fill=color, outline=_BLACK, width=int(rng.integers(1, 3)))
        tile = text_block(rng, max(width - 10, 8), max(height - 8, 8), random_color(rng, 0, 90), None)
        image.paste(tile, (left + 5, top + 4), tile)
    else:
        draw.rectangle((left, top, right, bottom), fill=random_color(rng))


def _readable_on(image: Image.Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> Color:
    """Choose an ink that stands out from what is under it."""
    light = luminance(_look(image, box))
    if light > 125:
        return random_color(rng, 0, 80) if light > 165 else _BLACK
    return random_color(rng, 215, 256) if light < 85 else _WHITE


def _look(image: Image.Image, box: tuple[int, int, int, int]) -> Color:
    """Return the mean colour of nine points of a rectangle; far cheaper than of all."""
    x1, y1, x2, y2 = box
    points = [((x1 * (4 - i) + x2 * i) // 4, (y1 * (4 - j) + y2 * j) // 4) for i in (1, 2, 3) for j in (1, 2, 3)]
    red, green, blue = zip(*(image.getpixel(point) for point in points), strict=True)  # type: ignore[misc]
    return sum(red) // 9, sum(green) // 9, sum(blue) // 9


@functools.lru_cache(maxsize=4096)
def _stamp(text: str, size: int) -> Image.Image:
    """Return a word as a mask (L), cut at its sides but as high as the line; cached, since Pillow sets type slowly."""
    left, _, right, _ = font(size).getbbox(text)
    mask = Image.new("L", (max(int(np.ceil(right - left)), 1), round(size * 1.25)), 0)
    ImageDraw.Draw(mask).text((-left, 0), text, fill=255, font=font(size))
    return mask


def _fit_text(image: Image.Image, text: str, corner: tuple[int, int], sides: tuple[int, int], ink: Color) -> None:
    """Write one word as large as its rectangle allows, in the middle."""
    mask = _stamp(text, 40)
    scale = min(sides[0] / mask.width, sides[1] / mask.height)
    mask = mask.resize((max(int(mask.width * scale), 1), max(int(mask.height * scale), 1)), Image.Resampling.BILINEAR)
    place = corner[0] + (sides[0] - mask.width) // 2, corner[1] + (sides[1] - mask.height) // 2
    image.paste(ink, place, mask)


# --- the table --------------------------------------------------------------------------------------------------------


def _paint_table(
    rng: np.random.Generator, image: Image.Image, sides: tuple[int, int], center: tuple[float, float], angle: float
) -> None:
    """Draw a nutrition table upright, then lay it turned on the picture."""
    bare = rng.random() < 0.2  # printed on the package itself, without a paper of its own
    if bare:
        tile = _lift(image, sides, center, angle)
        ink = _readable_on(tile, (0, 0, *sides), rng)
        paper = _look(tile, (0, 0, *sides))
    elif rng.random() < 0.8:
        ink = random_color(rng, 0, 60)
        paper = random_color(rng, 236, 256) if rng.random() < 0.6 else random_color(rng, 190, 256)
        tile = Image.new("RGB", sides, paper)
    else:
        ink, paper = random_color(rng, 225, 256), random_color(rng, 0, 90)
        tile = Image.new("RGB", sides, paper)
    _draw_table(rng, tile, ink, paper, framed=bare)
    _lay(image, tile, center, angle)


def _draw_table(rng: np.random.Generator, tile: Image.Image, ink: Color, paper: Color, *, framed: bool) -> None:
    """Draw title, lines and cells of a table that fills `tile`; `framed` asks for lines that reach every edge."""
    width, height = tile.size
    draw = ImageDraw.Draw(tile)
    numbers = int(rng.choice((1, 2), p=(0.5, 0.5)))
    name_width = width * (rng.uniform(0.5, 0.62) if numbers == 1 else rng.uniform(0.38, 0.46))
    size = int(np.clip(min(name_width / 6.2, height / 6.5) * rng.uniform(0.55, 1.0), 6, 20))
    rows = int(np.clip(height / (size * rng.uniform(1.25, 1.7)), 4, len(_NUTRIENTS)))
    step = height / rows
    size = int(np.clip(min(size, step * 0.8), 6, 20))
    edges = [round(row * step) for row in range(rows)] + [height]
    columns = [round(name_width + (width - name_width) * column / numbers) for column in range(numbers + 1)]
    faint = _mix(ink, paper, rng.uniform(0.0, 0.5))
    style = str(rng.choice(("grid", "rules", "zebra", "zebra rules"), p=(0.35, 0.35, 0.15, 0.15)))
    shade = _mix(ink, paper, rng.uniform(0.78, 0.9))
    titled, headed = rng.random() < 0.8, rng.random() < 0.65
    inverse = titled and rng.random() < 0.4

    for row in range(rows):
        top, bottom = edges[row], edges[row + 1] - 1
        if row == 0 and titled:
            if inverse:
                draw.rectangle((0, top, width, bottom), fill=ink)
            _write(tile, str(rng.choice(_TITLES)), (3, top, width - 6, bottom), size + 1, paper if inverse else ink)
            draw.line((0, bottom, width, bottom), fill=ink, width=2 if height > 120 else 1)
            continue
        if "zebra" in style and row % 2:
            draw.rectangle((0, top, width, bottom), fill=shade)
        if headed and row == int(titled):
            cells = [""] + [str(rng.choice(_HEADS)) for _ in range(numbers)]
        else:
            number = row - int(titled) - int(headed)
            values = _ENERGY if number == 0 else _AMOUNTS
            cells = [_NUTRIENTS[number]] + [values[rng.integers(len(values))] for _ in range(numbers)]
        _write(tile, cells[0], (3 + (size // 2 if cells[0].startswith("-") else 0), top, columns[0], bottom), size, ink)
        for column in range(numbers):
            _write(
                tile,
                cells[column + 1],
                (columns[column] + 1, top, columns[column + 1] - 3, bottom),
                size,
                ink,
                right=True,
            )
        if ("rules" in style or style == "grid") and row < rows - 1:
            draw.line((0, bottom, width, bottom), fill=faint)
    if style == "grid" or rng.random() < 0.25:
        for x in columns[:-1]:
            draw.line((x, edges[1] if titled else 0, x, height), fill=faint)
    if framed or style == "grid" or rng.random() < 0.6:
        draw.rectangle(
            (0, 0, width - 1, height - 1), outline=ink, width=2 if height > 120 and rng.random() < 0.5 else 1
        )


def _write(
    tile: Image.Image, text: str, cell: tuple[int, int, int, int], size: int, ink: Color, *, right: bool = False
) -> None:
    """Write a word into a cell (x1, y1, x2, y2), at its left or right side, half way down; cut where too long."""
    if not text:
        return
    x1, y1, x2, y2 = cell
    mask = _stamp(text, size)
    if mask.width > x2 - x1:
        mask = mask.crop((0, 0, max(x2 - x1, 1), mask.height))
    tile.paste(ink, (x2 - mask.width if right else x1, y1 + (y2 - y1 - mask.height) // 2 + 1), mask)


def _mix(first: Color, second: Color, share: float) -> Color:
    """Return a colour between two: the first at share 0, the second at 1."""
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _lift(image: Image.Image, sides: tuple[int, int], center: tuple[float, float], angle: float) -> Image.Image:
    """Return what lies under a turned rectangle, made upright: the reverse of `_lay`."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    half_x, half_y = sides[0] / 2, sides[1] / 2
    matrix = (cos, -sin, center[0] - cos * half_x + sin * half_y, sin, cos, center[1] - sin * half_x - cos * half_y)
    return image.transform(sides, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _lay(image: Image.Image, tile: Image.Image, center: tuple[float, float], angle: float) -> None:
    """Paste a tile turned by `angle` radians (clockwise) about `center`; it covers `_upright` of its sides."""
    x1, y1, x2, y2 = _upright(tile.size, center, angle)
    if angle == 0.0:
        image.paste(tile, (round(x1), round(y1)))
        return
    left, top = int(np.floor(x1)), int(np.floor(y1))
    region = int(np.ceil(x2)) - left, int(np.ceil(y2)) - top
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    x, y = left - center[0], top - center[1]
    matrix = (cos, sin, cos * x + sin * y + tile.width / 2, -sin, cos, cos * y - sin * x + tile.height / 2)
    turned = tile.transform(region, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    solid = Image.new("L", tile.size, 255)
    image.paste(turned, (left, top), solid.transform(region, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
