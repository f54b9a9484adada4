"""Pictures resized once to the size the model sees, and kept on disk: later passes decode and shrink nothing.

When: EVERY BATCH, around the collator; no torch of its own, processor and collator are handed in. A photograph of 2
megapixels takes a core about 25 ms to decode and shrink; what is left of it loads in a fraction of one.

One file per picture, `<sha256>.npy`: uint8 (height, width, 3), what the processor's own resize made of it, before it is
scaled and normalised. The name is a hash over the bytes of the picture file, the processor's settings, the pixel limits and
the versions that resize, so another picture or another limit never meets an old file. Nothing is kept in memory; on disk a
picture takes three bytes a pixel, 3 MB at 1,003,520 pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmdet.errors import ConfigError, ImageError
from vlmdet.files import write_whole
from vlmdet.images import open_image

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """Return training rows whose pictures stay undecoded, `{"path", "bytes"}`, when they are accessed.

    When: once per run, for `ResizedCollator`. Not a transform of the rows: of a data set with one, `datasets` reads whole rows
    where only a column is asked for, and so would the sampler that groups rows by length.
    """
    from datasets import Image as ImageFeature

    return rows.cast_column("image", ImageFeature(decode=False))


class ResizedCollator:
    """Make batches of pictures that were resized before.

    When: every batch of training, in place of `collator`, where nothing augments the rows: a picture that is cut or turned anew
    at each access has no size to keep.

    Input: rows with an undecoded `image`, see `undecoded`.
    Output: the batch of `collator`, bit for bit.

    Args:
        collator: one that leaves the resize to the processor: a `Qwen2VLCollatorV3`.
        pictures: the cache.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], Any], pictures: ResizedPictures) -> None:
        self.collator = collator
        self.pictures = pictures

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Make a batch.

        Raises:
            ImageError: a picture is missing or broken; what `collator` raises.
        """
        return self.collator(
            [dict(row) | {"image": self.pictures.get(row["image"], f"row {row['id']}")} for row in rows]
        )


class ResizedPictures:
    """A folder of resized pictures, filled as they are asked for.

    A file is written beside its place and renamed, so a run that is killed leaves no half picture, and several processes may
    fill one folder. Where the disk is full, pictures are resized as without a cache, and one warning says so.

    Args:
        folder: of the files; made where absent.
        image_processor: of a Qwen-VL model.
        min_pixels: smallest picture area after the resize.
        max_pixels: largest.

    Raises:
        ConfigError: the processor does not cut pictures into patches as the Qwen-VL families do.
    """

    def __init__(self, folder: Path, image_processor: Any, *, min_pixels: int, max_pixels: int) -> None:
        if not all(hasattr(image_processor, name) for name in ("patch_size", "merge_size", "temporal_patch_size")):
            raise ConfigError(
                f"a {type(image_processor).__name__} does not cut pictures into patches as Qwen-VL does",
                "set training.cache_pictures=false",
            )
        self.folder = folder
        self.image_processor = image_processor
        self.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.settings = processing_settings(image_processor, min_pixels=min_pixels, max_pixels=max_pixels)
        self.writes = True
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, image: Mapping[str, Any], name: str) -> Image.Image:
        """Return a picture as the model sees it: RGB, upright, resized.

        Input: the storage form `{"path", "bytes"}` of a row; `name` of the row, for messages.

        Raises:
            ImageError: missing, or broken.
        """
        data = picture_bytes(image, name)
        file = self.folder / f"{picture_key(data, self.settings)}.npy"
        pixels = _read(file)
        if pixels is not None:
            return Image.fromarray(pixels)
        picture = open_image(data, name=name)
        pixels = resize_like(self.image_processor, picture, self.size)
        if pixels is None:
            logger.warning("%s: the processor would resize the picture twice, so it is not cached", name)
            return picture
        self._write(file, pixels)
        return Image.fromarray(pixels)

    def _write(self, file: Path, pixels: np.ndarray) -> None:
        if not self.writes:
            return
        buffer = io.BytesIO()
        np.save(buffer, pixels, allow_pickle=False)
        try:
            write_whole(file, buffer.getvalue())
        except OSError as error:
            self.writes = False
            logger.warning(
                "%s: pictures are no longer cached (%s); the run goes on more slowly", self.folder, error.strerror
            )


def resize_like(image_processor: Any, picture: Image.Image, size: Mapping[str, int]) -> np.ndarray | None:
    """Resize a picture as a Qwen-VL processor does; None where what comes out would not pass through it unchanged.

    When: once per picture, for the cache, and for a server that shall see the same pixels.

    Input: `size`, the limits of its area as the processor words them: `{"shortest_edge": 12544, "longest_edge": 38416}`.
    Output: (height, width, 3) uint8. The processor is asked for patches without scaling or normalising, which are put
    back into a picture; that picture goes through it again and must give the same patches, bit for bit.
    """
    patches, grid = _patches(image_processor, picture, size)
    pixels = _join(image_processor, patches, *grid)
    try:
        again, grid_again = _patches(image_processor, Image.fromarray(pixels), size)
    except ValueError:  # a strip that is over 200 times as long as wide once its sides are rounded
        return None
    return pixels if grid == grid_again and np.array_equal(patches, again) else None


def _patches(image_processor: Any, picture: Image.Image, size: Mapping[str, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the patches (rows * columns, numbers of a patch) uint8 of a resized picture, and rows and columns."""
    made = image_processor([picture], size=dict(size), do_rescale=False, do_normalize=False, return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    return made["pixel_values"], (rows, columns)


def _join(image_processor: Any, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Put patches back into a picture: the processor lists them by blocks of merge x merge, each two frames deep."""
    merge, side = image_processor.merge_size, image_processor.patch_size
    depth = image_processor.temporal_patch_size
    blocks = patches.reshape(rows // merge, columns // merge, merge, merge, 3, depth, side, side)[:, :, :, :, :, 0]
    pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)
    return np.ascontiguousarray(pixels.astype(np.uint8))


def processing_settings(image_processor: Any, *, min_pixels: int, max_pixels: int) -> str:
    """Write down, as JSON, everything but the picture that decides which pixels a processor makes of it."""
    return json.dumps(
        {
            "processor": image_processor.to_dict(),
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "versions": {name: version(name) for name in ("pillow", "torchvision", "transformers")},
        },
        sort_keys=True,
        default=str,
    )


def picture_key(data: bytes, settings: str) -> str:
    """Name a picture: 64 hexadecimal digits of a hash over the bytes of its file and what is done to it."""
    digest = hashlib.sha256(data)
    digest.update(settings.encode())
    return digest.hexdigest()


def picture_bytes(image: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of a row's picture file.

    Input: the storage form `{"path", "bytes"}` of an undecoded row; `name` of the row, for messages.

    Raises:
        ImageError: the file cannot be read.
    """
    if image["bytes"]:
        return bytes(image["bytes"])
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: {image['path']} cannot be read ({error.strerror})") from error


def _read(file: Path) -> np.ndarray | None:
    """Read a cached picture; None where there is none, or where the file is not what was written."""
    try:
        pixels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 else None
