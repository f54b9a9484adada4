"""The way of a picture from a row into a batch, watched: what reaches the picture processor, and what comes out.

When: for checks of stage vision. Drawn pictures of known size and colour take the place of the user's own, in the form in which
his rows hold them.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call
from vlmdet.doctor.gather.annotations import open_stored
from vlmdet.doctor.gather.batches import Batch, as_array
from vlmdet.doctor.gather.conversations import Example, is_picture
from vlmdet.images import BROKEN

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

Grid = tuple[int, int, int]
Size = tuple[int, int]


@dataclass
class Seen:
    """What picture processors got: sizes (width, height) and keyword arguments; `asked`, those of the whole processor."""

    sizes: list[Size] = field(default_factory=list)
    keywords: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def watched(processor: Any = None) -> Iterator[Seen]:
    """Note what picture processors of transformers get, and what the given processor is called with, in the block."""
    seen = Seen()
    try:
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError:
        yield seen
        return
    original = BaseImageProcessor.__call__

    def call_and_note(self: Any, images: Any, *args: Any, **keywords: Any) -> Any:
        seen.sizes.extend(size_of(one) for one in flat(images))
        seen.keywords.append(keywords)
        return original(self, images, *args, **keywords)

    kind: Any = type(processor)
    own = kind.__dict__.get("__call__")
    whole = kind.__call__ if callable(processor) else None

    def call_whole(self: Any, *args: Any, **keywords: Any) -> Any:
        seen.asked.append({**keywords, **(keywords.get("images_kwargs") or {})})
        return whole(self, *args, **keywords)  # type: ignore[misc]

    BaseImageProcessor.__call__ = call_and_note  # type: ignore[method-assign]
    watchable = whole is not None and hasattr(processor, "image_processor")
    if watchable:
        kind.__call__ = call_whole
    try:
        yield seen
    finally:
        BaseImageProcessor.__call__ = original  # type: ignore[method-assign]
        if watchable and own is not None:
            kind.__call__ = own
        elif watchable:
            del kind.__call__


def flat(images: Any) -> list[Any]:
    """Return the pictures of a nested list."""
    if isinstance(images, (list, tuple)):
        return [inner for one in images for inner in flat(one)]
    return [images] if images is not None else []


def size_of(picture: Any) -> Size:
    """Return width and height of a picture, an array or a tensor; (0, 0) where unknown."""
    if isinstance(picture, Image.Image):
        return picture.size
    shape = tuple(int(one) for one in getattr(picture, "shape", ()))
    if len(shape) < 2:
        return 0, 0
    rows, columns = shape[-2:] if len(shape) == 2 or shape[-3] in (1, 3, 4) else shape[-3:-1]
    return columns, rows


# ---- put pictures in place of others ---------------------------------------------------------------------------------


class Drawer:
    """Puts drawn pictures into converted rows, in the form in which the rows hold theirs; files go to a temporary folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vlmdet-doctor-")
        self._count = 0

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def like(self, held: Any, picture: Image.Image) -> Any:
        """Return the picture in the form of what is held: PIL, path, `file://` text, bytes, `{"bytes", "path"}`, array.

        Raises:
            NotAvailable: held in a form that is unknown.
        """
        if isinstance(held, Image.Image):
            return picture
        if isinstance(held, np.ndarray):
            return np.asarray(picture)
        if isinstance(held, (bytes, bytearray)):
            return _png(picture)
        if isinstance(held, Mapping) and ("bytes" in held or "path" in held):
            as_bytes = held.get("bytes") is not None
            return {
                **held,
                "bytes": _png(picture) if as_bytes else None,
                "path": None if as_bytes else self._save(picture),
            }
        if isinstance(held, str):
            return ("file://" if held.startswith("file://") else "") + self._save(picture)
        if isinstance(held, Path):
            return Path(self._save(picture))
        raise NotAvailable(f"pictures in a form that is known, not {type(held).__name__}")

    def _save(self, picture: Image.Image) -> str:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.png"
        picture.save(path)
        return str(path)

    def replace(self, raw: Any, picture: Image.Image) -> Any:
        """Return a converted row with each of its pictures replaced; the row itself is not changed.

        Raises:
            NotAvailable: the row has no picture.
        """
        changed, count = self._walk(raw, picture)
        if not count:
            raise NotAvailable("a picture in the converted row")
        return changed

    def _walk(self, raw: Any, picture: Image.Image) -> tuple[Any, int]:
        if isinstance(raw, Mapping):
            out, count = dict(raw), 0
            for key, value in raw.items():
                if key in ("images", "image", "img", "picture", "pictures", "image_url") and value is not None:
                    new, more = self._value(value, picture)
                elif key in ("messages", "conversations", "conversation", "prompt", "completion", "content"):
                    new, more = self._walk(value, picture)
                else:
                    continue
                out[key], count = new, count + more
            return out, count
        if isinstance(raw, (list, tuple)):
            pairs = [self._walk(one, picture) for one in raw]
            return [one for one, _ in pairs], sum(more for _, more in pairs)
        return raw, 0

    def _value(self, value: Any, picture: Image.Image) -> tuple[Any, int]:
        if isinstance(value, (list, tuple)):
            return [self.like(one, picture) for one in value], len(value)
        if isinstance(value, Mapping) and "url" in value:
            return {**value, "url": self.like(value["url"], picture)}, 1
        return self.like(value, picture), 1


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def plain_picture(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """Return a picture of one colour."""
    return Image.new("RGB", (width, height), colour)


# ---- through each path ----------------------------------------------------------------------------------------------


def collate_drawn(
    evidence: Evidence, examples: Sequence[Example], pictures: Sequence[Image.Image], name: str
) -> tuple[Batch, Seen]:
    """Collate converted rows with drawn pictures in place of their own.

    Raises:
        NotAvailable: the collator or a picture is not there, or it raised: what it does to own pictures is told elsewhere.
    """
    with Drawer() as drawer, watched(evidence.subject.processor) as seen:
        raws = [drawer.replace(one.raw, picture) for one, picture in zip(examples, pictures, strict=True)]
        where = [
            f"{one.where}, its picture replaced by a drawn one of {p.width} x {p.height}"
            for one, p in zip(examples, pictures, strict=True)
        ]
        try:
            return evidence.collate(raws, name, where, [one.answers for one in examples]), seen
        except UserCodeError as error:
            raise NotAvailable(f"a collator that takes drawn pictures: {error.text[:200]}") from None


def processor_grid(processor: Any, picture: Image.Image, **limits: Any) -> Grid | None:
    """Return the grid that the user's picture processor makes of a picture, by itself; None for families without grids.

    Raises:
        UserCodeError: it raised.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        return None
    out = call("processor", images, images=[picture], return_tensors="pt", **limits)
    grid = out.get("image_grid_thw")
    return None if grid is None else tuple(int(one) for one in as_array(grid).reshape(-1, 3)[0])  # type: ignore[return-value]


def patch_of(processor: Any) -> int | None:
    """Return the side of a patch in pixels, None where the processor has none."""
    value = getattr(getattr(processor, "image_processor", None), "patch_size", None)
    return value if isinstance(value, int) else None


def merge_of(processor: Any) -> int:
    """Return how many patches a side of an image token is long; 2 where the processor does not say."""
    value = getattr(getattr(processor, "image_processor", None), "merge_size", None)
    return value if isinstance(value, int) and value > 0 else 2


def one_picture(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with exactly one picture, shortest answers first."""
    return sorted((one for one in examples if len(one.pictures) == 1), key=lambda one: len(one.answer))


def original_size(evidence: Evidence, example: Example) -> Size | None:
    """Return the size of a row's picture as it lies in the data, upright; of the converted one where the row does not say."""
    annotation = evidence.annotations()[example.index]
    if annotation.picture is not None and not annotation.picture.error:
        return annotation.picture.upright
    return converted_size(example) or annotation.stored


def converted_size(example: Example) -> Size | None:
    """Return the size of a row's picture as the converter gives it, as stored; None where it cannot be opened."""
    try:
        return open_stored(example.pictures[0]).size
    except (*BROKEN, AttributeError, IndexError, TypeError, KeyError):
        return None


def part_options(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Return what each picture part says of its size: `min_pixels`, `max_pixels`, `resized_height`, `resized_width`."""
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and is_picture(part):
                names = ("min_pixels", "max_pixels", "resized_height", "resized_width")
                found.append({name: int(part[name]) for name in names if part.get(name) is not None})
    return found


def shown(grid: Grid | None, patch: int | None) -> str:
    """Return `(1, 46, 34): 476 x 644 pixels`."""
    if grid is None:
        return "none"
    return f"{tuple(grid)}" + (f", {grid[2] * patch} x {grid[1] * patch} pixels" if patch else "")


def area(grid: Grid, patch: int) -> int:
    """Return the pixels of a grid."""
    return grid[1] * grid[2] * patch * patch


_SIZE_WORDS = ("min_pixels", "max_pixels", "size", "do_resize")


def size_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keywords[name] for name in _SIZE_WORDS if keywords.get(name) is not None}


def far(first: Grid, second: Grid) -> bool:
    return not 0.8 < first[1] * first[2] / (second[1] * second[2]) < 1.25


# ---- colours in a batch ---------------------------------------------------------------------------------------------


def pixel_rows(batch: Batch) -> list[np.ndarray] | None:
    """Split the pixel values of a batch by row; None where that cannot be done.

    Output: for each row an array whose axis -2 or the blocks of whose last axis are channels; see `channels`.
    """
    pixels = batch.pixels
    if pixels is None or pixels.ndim < 2 or not all(count == 1 for count in batch.pictures):
        return None
    count = len(batch.pictures) or len(batch.ids)
    if batch.grids is not None and pixels.ndim == 2:
        lengths = [int(np.prod(one)) for one in batch.grids]
        if len(lengths) != count or sum(lengths) != len(pixels):
            return None
        return list(np.split(pixels, np.cumsum(lengths)[:-1]))
    if len(pixels) == count:
        return list(pixels)
    return None if len(pixels) % count or count > 1 else [pixels]


def channels(pixels: np.ndarray) -> np.ndarray | None:
    """Return the median of each of three channels; None where the layout is unknown."""
    values = np.asarray(pixels, np.float64)
    if values.ndim == 2 and values.shape[-1] % 3 == 0:  # patches, channel first within each
        return np.median(values.reshape(len(values), 3, -1), axis=(0, 2))
    if values.ndim >= 3 and values.shape[-3] == 3:
        return np.median(np.moveaxis(values, -3, 0).reshape(3, -1), axis=1)
    if values.ndim >= 3 and values.shape[-1] == 3:
        return np.median(values.reshape(-1, 3), axis=0)
    return None
