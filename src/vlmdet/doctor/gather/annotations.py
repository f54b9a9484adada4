"""Raw rows as they lie there: pictures by their headers, boxes as stored, labels, groups.

When: first; everything else is compared with it. No torch. One row becomes one `Annotation`:

    {"image": "a.jpg", "width": 640, "height": 480, "objects": {"bbox": [[10, 20, 30, 40]], "category": ["logo"]}}
    Annotation(picture=PictureFacts(640, 480, "RGB", 1, …), boxes=[[10, 20, 30, 40]], labels=["logo"], stored=(640, 480))

Long, because rows come in as many forms as there are projects.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdet.doctor.calls import plain
from vlmdet.images import BROKEN, orientation

PICTURE_KEYS = (
    "image",
    "images",
    "img",
    "picture",
    "pixel",
    "image_path",
    "img_path",
    "path",
    "file_name",
    "filename",
    "file",
    "image_file",
    "image_url",
    "photo",
    "jpg",
    "png",
)
HOLDERS = (
    "objects",
    "annotations",
    "annotation",
    "instances",
    "labels",
    "ground_truth",
    "gt",
    "detections",
    "target",
    "anns",
)
BOX_KEYS = (
    "bbox",
    "bboxes",
    "boxes",
    "box",
    "bbox_2d",
    "bboxes_2d",
    "bounding_box",
    "bounding_boxes",
    "gt_boxes",
    "rects",
    "true_boxes",
    "coordinates",
)
LABEL_KEYS = (
    "category",
    "categories",
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "class_names",
    "category_name",
    "category_id",
    "category_ids",
    "name",
    "names",
    "names_",
    "gt_labels",
    "target_class",
)
GROUP_KEYS = (
    "group",
    "group_id",
    "product",
    "product_id",
    "barcode",
    "code",
    "scene",
    "scene_id",
    "patient",
    "patient_id",
    "video",
    "video_id",
    "sequence",
    "source_id",
    "ean",
    "sku",
    "burst",
)


@dataclass(frozen=True)
class PictureFacts:
    """A picture by its header.

    Attributes:
        width, height: as stored, not turned.
        upright: width and height after the EXIF turn.
        orientation: EXIF tag 274, 1 to 8.
        sha1: of the file's bytes or the pixels; `dhash`: 64 bits of an 8 x 8 gradient, None until asked for.
        error: why it cannot be opened, else "".
    """

    width: int
    height: int
    mode: str
    orientation: int
    path: str
    sha1: str
    error: str = ""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture as a viewer shows it."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


@dataclass(frozen=True)
class Annotation:
    """One raw row.

    Attributes:
        split, row: where it stands; `where` for messages: `train[3] (a.jpg)`.
        boxes: (n, 4) float64 as stored; None where the row has no field of boxes.
        labels: n names or None each.
        stored: width and height as the row says, None where it does not.
        odd: entries of the boxes' field that are no four numbers.
        keys: the row's keys of picture, boxes and labels.
    """

    split: str
    row: int
    picture: PictureFacts | None
    boxes: np.ndarray | None
    labels: tuple[str | None, ...]
    stored: tuple[int, int] | None
    group: str | None
    odd: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """`train[3] (a.jpg)`."""
        name = Path(self.picture.path).name if self.picture and self.picture.path else ""
        return f"{self.split}[{self.row}]" + (f" ({name})" if name else "")

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the upright picture; the stored ones where there is no picture."""
        if self.picture is not None and not self.picture.error:
            return self.picture.upright
        return self.stored


class Rows(Sequence[Any]):
    """Raw rows of a split, whatever holds them; a `datasets.Dataset` is read row by row, its pictures decoded on access."""

    def __init__(self, rows: Any) -> None:
        self.held = rows
        self.undecoded = rows
        features = getattr(rows, "features", None)
        if isinstance(features, Mapping) and hasattr(rows, "cast_column"):
            for name, feature in features.items():
                if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
                    self.undecoded = self.undecoded.cast_column(name, type(feature)(decode=False))
        elif not isinstance(rows, (list, tuple)) and not hasattr(rows, "__getitem__"):
            self.held = self.undecoded = list(rows)

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        return self.held[index]

    def raw(self, index: int) -> Any:
        """Return a row with its pictures as stored: path and bytes, not decoded."""
        return self.undecoded[index]


def sample_rows(lengths: Mapping[str, int], limit: int) -> list[tuple[str, int]]:
    """Choose rows of every split, evenly spread, at most `limit` in all; in the order of splits and rows."""
    total = sum(lengths.values())
    if total <= limit:
        return [(name, row) for name, length in lengths.items() for row in range(length)]
    chosen = []
    for name, length in lengths.items():
        share = max(min(length, 8), round(limit * length / total))
        places = np.unique(np.linspace(0, length - 1, min(share, length)).round().astype(int))
        chosen += [(name, int(row)) for row in places]
    return chosen


def read_annotation(row: Any, split: str, index: int, names: Mapping[str, Sequence[str]] | None = None) -> Annotation:
    """Read one raw row; nothing raises on odd values, they are counted.

    Input: `names`, column -> class names, of a `datasets.ClassLabel`.
    """
    if not isinstance(row, Mapping):
        return Annotation(split, index, None, None, (), None, None, odd=1)
    keys: dict[str, str] = {}
    picture_value = None
    for key in PICTURE_KEYS:
        value = row.get(key)
        if value is not None and not isinstance(value, (int, float)):
            picture_value, keys["picture"] = value, key
            break
    _, boxes_value, labels_value = _find_objects(row, keys)
    entries = plain(boxes_value)
    boxes, odd = (None, 0) if entries is None else _numbers(entries)
    count = 0 if boxes is None else len(boxes)
    labels = _labels(labels_value, count, (names or {}).get(keys.get("labels", "")))
    stored = _stored(row)
    group = next((str(row[key]) for key in GROUP_KEYS if row.get(key) not in (None, "")), None)
    first = picture_value[0] if isinstance(picture_value, (list, tuple)) and picture_value else picture_value
    return Annotation(split, index, facts(first), boxes, labels, stored, group, odd, keys)


def _find_objects(row: Mapping[str, Any], keys: dict[str, str]) -> tuple[Any, Any, Any]:
    for holder in HOLDERS:
        inner = row.get(holder)
        if isinstance(inner, Mapping):
            key = next((key for key in BOX_KEYS if inner.get(key) is not None), None)
            if key:
                label = next((key for key in LABEL_KEYS if inner.get(key) is not None), None)
                keys["boxes"] = f"{holder}.{key}"
                if label:
                    keys["labels"] = f"{holder}.{label}"
                return inner, _nested(inner[key]), inner.get(label) if label else None
        if isinstance(inner, (list, tuple)) and (not inner or isinstance(inner[0], Mapping)):
            if not inner and holder == "labels":
                continue
            first = inner[0] if inner else {}
            key = next((key for key in BOX_KEYS if key in first), None)
            if key or not inner:
                label = next((key for key in LABEL_KEYS if key in first), None)
                keys["boxes"] = f"{holder}[].{key or 'bbox'}"
                if label:
                    keys["labels"] = f"{holder}[].{label}"
                return inner, [one.get(key) for one in inner], [one.get(label) for one in inner] if label else None
    key = next((key for key in BOX_KEYS if row.get(key) is not None), None)
    if key is None:
        return None, None, None
    label = next((one for one in LABEL_KEYS if row.get(one) is not None), None)
    keys["boxes"] = key
    if label:
        keys["labels"] = label
    value = row[key]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        first = value[0]
        inner_key = next((one for one in BOX_KEYS if one in first), None)
        if inner_key:
            inner_label = next((one for one in LABEL_KEYS if one in first), None)
            return (
                value,
                [one.get(inner_key) for one in value],
                [one.get(inner_label) for one in value] if inner_label else None,
            )
    return None, _nested(value), row.get(label) if label else None


def _nested(value: Any) -> Any:
    """Make a list of boxes of a single one."""
    value = plain(value)
    if isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(one, (int, float)) for one in value):
        return [value]
    return value


def _corner_numbers(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        for names in (
            ("x1", "y1", "x2", "y2"),
            ("xmin", "ymin", "xmax", "ymax"),
            ("x", "y", "w", "h"),
            ("x", "y", "width", "height"),
            ("left", "top", "right", "bottom"),
            ("left", "top", "width", "height"),
        ):
            if all(name in entry for name in names):
                return [entry[name] for name in names]
    return entry


def _numbers(entries: Any) -> tuple[np.ndarray, int]:
    kept, odd = [], 0
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        entry = plain(_corner_numbers(entry))
        try:
            numbers = [float(one) for one in entry]
        except (TypeError, ValueError):
            odd += 1
            continue
        if len(numbers) != 4:
            odd += 1
        else:
            kept.append(numbers)
    return np.array(kept, dtype=np.float64).reshape(-1, 4), odd


def _labels(value: Any, count: int, names: Sequence[str] | None) -> tuple[str | None, ...]:
    value = plain(value)
    if value is None:
        return (None,) * count
    if isinstance(value, (str, int, float)):
        value = [value] * count
    named = [names[one] if names and isinstance(one, int) and 0 <= one < len(names) else one for one in value]
    labels = [None if one is None else str(one) for one in named]
    return tuple((labels + [None] * count)[:count])


def _stored(row: Mapping[str, Any]) -> tuple[int, int] | None:
    for names in (("width", "height"), ("image_width", "image_height"), ("img_width", "img_height"), ("w", "h")):
        if all(isinstance(plain(row.get(name)), (int, float)) for name in names):
            width, height = (int(plain(row[name])) for name in names)
            if width > 0 and height > 0:
                return width, height
    for name in ("size", "image_size"):
        value = plain(row.get(name))
        if (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(isinstance(one, int) and one > 0 for one in value)
        ):
            return int(value[0]), int(value[1])
    return None


def facts(value: Any) -> PictureFacts | None:
    """Read the header of a picture in any storage form; None where the value is none."""
    path, data = "", None
    if isinstance(value, Mapping):
        path, data = str(value.get("path") or ""), value.get("bytes")
        if data is None and not path:
            return None
    elif isinstance(value, (str, Path)):
        path = str(value)
    elif isinstance(value, (bytes, bytearray)):
        data = bytes(value)
    elif isinstance(value, Image.Image):
        path = str(getattr(value, "filename", "") or "")
        try:
            sha1 = hashlib.sha1(value.tobytes(), usedforsecurity=False).hexdigest()
        except BROKEN as error:
            return PictureFacts(value.width, value.height, value.mode, 1, path, "", f"{error}")
        return PictureFacts(value.width, value.height, value.mode, orientation(value), path, sha1)
    elif isinstance(value, np.ndarray) and value.ndim in (2, 3):
        sha1 = hashlib.sha1(np.ascontiguousarray(value).tobytes(), usedforsecurity=False).hexdigest()
        mode = "L" if value.ndim == 2 else {1: "L", 3: "RGB", 4: "RGBA"}.get(value.shape[2], "?")
        return PictureFacts(value.shape[1], value.shape[0], mode, 1, "", sha1)
    else:
        return None
    if data is None and path.startswith(("http://", "https://", "data:")):
        return PictureFacts(0, 0, "", 1, path, "", "an address, which is not fetched")
    try:
        content = data if data is not None else Path(path.removeprefix("file://")).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            sha1 = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            return PictureFacts(image.width, image.height, image.mode, orientation(image), path, sha1)
    except (*BROKEN, Image.DecompressionBombError) as error:
        return PictureFacts(0, 0, "", 1, path, "", f"{type(error).__name__}: {error}")


def open_stored(value: Any) -> Image.Image:
    """Open a picture of any storage form as stored: neither turned nor converted.

    Raises:
        OSError, ValueError: it cannot be opened.
    """
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, (bytes, bytearray)):
        return Image.open(io.BytesIO(bytes(value)))
    return Image.open(Path(str(value).removeprefix("file://")))


def dhash(image: Image.Image) -> int:
    """Return 64 bits that near-equal pictures share: whether each of 8 x 8 cells is darker than the next."""
    image.draft("L", (64, 64))
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def class_names(rows: Any) -> dict[str, list[str]]:
    """Return names of the `datasets.ClassLabel` columns: `{"objects.category": […]}`."""
    found: dict[str, list[str]] = {}
    for path, feature in _features(getattr(rows, "features", None), ""):
        names = getattr(feature, "names", None)
        if isinstance(names, list):
            found[path] = names
    return found


def _features(feature: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(feature, Mapping):
        for key, inner in feature.items():
            yield from _features(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(feature, list) and feature:
        yield from _features(feature[0], path + "[]" if isinstance(feature[0], Mapping) else path)
    elif hasattr(feature, "feature"):
        inner = feature.feature
        yield from _features(
            inner, path + "[]" if isinstance(inner, Mapping) and type(feature).__name__ == "List" else path
        )
    elif feature is not None:
        yield path, feature
