"""Read COCO truth and result files that other tools wrote: a YOLO or RF-DETR run, another project.

When: AFTER, by `vlmdet compare --truth`; no torch. The truth is one object, results are a list:

    {"images": [{"id": 3, "file_name": "3.jpg", "width": 640, "height": 480}],
     "categories": [{"id": 1, "name": "cup"}],
     "annotations": [{"id": 1, "image_id": 3, "category_id": 1, "bbox": [x, y, width, height], "area": 900, "iscrowd": 0}]}
    [{"image_id": 3, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}]

Tools vary this; what is read otherwise than written here is told in `notes`, what cannot be read is refused by count and
example, and left out only where the user says so. `coco_names.py` finds the pictures and classes.
It is over 400 lines, since truth and results share how a box, a number and a refusal are read.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vlmdet.boxes import BoxFormat, corners
from vlmdet.errors import DataError
from vlmdet.evaluation.coco_names import category_ways, image_ways, plain_id, resolve

WRAPPERS = ("annotations", "predictions", "results", "detections", "instances")
"""Keys under which some tools put the list of results."""

NAMES_OF_IMAGE = ("file_name", "filename", "image_name", "image", "path", "image_path")
NAMES_OF_CATEGORY = ("category_name", "category", "class_name", "label", "class", "name")
IDS_OF_CATEGORY = ("category_id", "class_id", "label_id", "cls")
BOXES = ("bbox", "box")
SCORES = ("score", "confidence", "conf", "probability")

DROP = "--drop-unusable"

Row = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """A truth file.

    Attributes:
        document: COCO document with ids of pictures and classes as whole numbers, annotations numbered from 1.
        row_ids: of each picture, the id of its row: the id in the file, as text.
        true: of each picture, boxes (xyxy fractions), labels and flags, as a row's `truth`.
        notes: what was read otherwise than the format says.
    """

    path: Path
    document: dict[str, Any]
    row_ids: tuple[str, ...]
    true: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the file."""
        return tuple(category["name"] for category in self.document["categories"])


@dataclass(frozen=True)
class Results:
    """A result file: `results` with the ids of a `Truth`, `rows` as of `predictions.jsonl`, one a picture of the truth."""

    path: Path
    results: list[dict[str, Any]]
    rows: list[Row]
    notes: tuple[str, ...]


def read_truth(path: str | Path, *, drop_unusable: bool = False) -> Truth:
    """Read a COCO truth file.

    When: once per comparison.

    Output: `Truth`. A box is `ignore` where it has `iscrowd` or `ignore`; COCO's own figures know only `iscrowd`. A missing
    `area` is that of the box, a missing box that of the segmentation, a missing size of a picture what its boxes need.

    Raises:
        DataError: it is no such file, two pictures share an id, or annotations cannot be used and `drop_unusable` is not
            set; names how many and an example.
    """
    path = Path(path)
    content = _read_json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: is no COCO truth: it has no list 'images'", "name the file with the annotations")
    if not isinstance(content.get("annotations"), list):
        raise DataError(
            f"{path}: has pictures and no list 'annotations', so nothing is known to be true of them",
            "name the file with the annotations",
        )
    images = _objects(path, content, "images")
    annotations = _objects(path, content, "annotations")
    notes: list[str] = []
    ids = _ids(path, "images", images)
    categories = _objects(path, content, "categories")
    if not categories:
        known = sorted({plain_id(entry.get("category_id")) for entry in annotations} - {None}, key=str)
        categories = [{"id": value, "name": str(value)} for value in known]
        notes.append("there are no categories: their ids serve as names")
    category_ids = _ids(path, "categories", categories)
    names = _category_names(categories, category_ids, notes)

    place_of, category_of = {key: i for i, key in enumerate(ids)}, {key: i for i, key in enumerate(category_ids)}
    broken: list[tuple[str, Any]] = []
    kept: list[tuple[int, int, list[float], Mapping[str, Any]]] = []
    no_area = no_box = 0
    for entry in annotations:
        image = place_of.get(plain_id(entry.get("image_id")))
        category = category_of.get(plain_id(entry.get("category_id")))
        box, from_segments = _find_box(entry)
        if image is None or category is None or box is None or min(box[2:]) < 0:
            reason = "image" if image is None else "category" if category is None else "box"
            broken.append((f"without a usable {reason}", entry))
            continue
        no_box += from_segments
        no_area += _number(entry.get("area")) is None
        kept.append((image, category, box, entry))
    _refuse(path, "annotations", broken, len(annotations), drop_unusable, notes)
    _tell_text(annotations, "annotations", notes)
    if no_box:
        notes.append(f"{no_box} annotations have no bbox: taken from their segmentation")
    if no_area:
        notes.append(f"{no_area} annotations have no area: width times height of the box decides their size")
    only_ignored = sum(1 for *_, entry in kept if entry.get("ignore") and not entry.get("iscrowd"))
    if only_ignored:
        notes.append(
            f"{only_ignored} boxes have ignore=1 and iscrowd=0: COCO's figures count them, ours leave them out"
        )
    if len({str(entry.get("id")) for *_, entry in kept}) < len(kept):
        notes.append(
            "ids of annotations are missing or repeated: each annotation counts as a box of its own, where pycocotools takes "
            "the last one for all of its id"
        )
    if any(plain_id(entry.get("id")) == 0 for *_, entry in kept):
        notes.append(
            "an annotation has the id 0: here it counts like any other; pycocotools takes one with this id for never found, "
            "so figures that it gave are lower"
        )
    numbers = ids if _holds(ids) else [i + 1 for i in _ranks(ids)]
    category_numbers = category_ids if _holds(category_ids) else list(range(1, len(names) + 1))
    sizes = _sizes(images, kept, notes)
    true: list[dict[str, Any]] = [{"boxes": [], "labels": [], "ignore": []} for _ in images]
    written: list[dict[str, Any]] = []
    for image, category, box, entry in kept:
        true[image]["boxes"].append(_fractions(box, sizes[image]))
        true[image]["labels"].append(names[category])
        true[image]["ignore"].append(bool(entry.get("iscrowd")) or bool(entry.get("ignore")))
        area = _number(entry.get("area"))
        written.append(
            {
                "id": len(written) + 1,
                "image_id": numbers[image],
                "category_id": category_numbers[category],
                "bbox": box,
                "area": box[2] * box[3] if area is None else area,
                "iscrowd": int(bool(entry.get("iscrowd"))),
            }
        )
    document = {
        "images": [
            {"id": number, "file_name": str(entry.get("file_name", number)), "width": size[0], "height": size[1]}
            for number, entry, size in zip(numbers, images, sizes, strict=True)
        ],
        "categories": [
            {"id": number, "name": name, "written_id": key}
            for number, name, key in zip(category_numbers, names, category_ids, strict=True)
        ],
        "annotations": written,
    }
    return Truth(path, document, tuple(str(key) for key in ids), tuple(true), tuple(notes))


def read_results(
    path: str | Path,
    truth: Truth,
    *,
    image_ids: str | None = None,
    category_ids: str | None = None,
    box_format: str | None = None,
    drop_unusable: bool = False,
) -> Results:
    """Read a COCO result file about a truth.

    When: once per file of a comparison.

    Input: `image_ids` and `category_ids`, how pictures and classes are named, one of `coco_names.IMAGE_WAYS` and
    `CATEGORY_WAYS`, None for the first that suits every result; `box_format`, e.g. `xyxy/pixel`, where boxes are not
    `xywh/pixel`; `drop_unusable`, leave out and count what cannot be used.
    Output: `Results`. A picture of the truth without results has status `none`. Scores are None where none is written.

    Raises:
        DataError: it cannot be read; results name no picture or class of the truth, have no box, a number that is none, or
            only some of them a score; or two readings contradict each other. Names how many, and an example.
        ConfigError: the box format is unknown.
    """
    path = Path(path)
    content = _read_json(path)
    notes: list[str] = []
    entries = _list_results(path, content, notes)
    form = BoxFormat.parse(box_format) if box_format else None
    own = content if isinstance(content, Mapping) else {}
    image_values, image_names, own_images = _named(
        entries, ("image_id",), NAMES_OF_IMAGE, own.get("images"), "file_name"
    )
    values, names, own_categories = _named(entries, IDS_OF_CATEGORY, NAMES_OF_CATEGORY, own.get("categories"), "name")
    images, categories = truth.document["images"], truth.document["categories"]
    image = resolve(
        "image", image_values, image_names,
        image_ways([plain_id(key) for key in truth.row_ids], [entry["file_name"] for entry in images]),
        chosen=image_ids, flag="--image-ids", own_table=own_images,
    )  # fmt: skip
    category = resolve(
        "category", values, names,
        category_ways([entry["written_id"] for entry in categories], [entry["name"] for entry in categories]),
        chosen=category_ids, flag="--category-ids", own_table=own_categories,
    )  # fmt: skip
    notes += [*image.notes, *category.notes]
    boxes = [_find_box(entry)[0] for entry in entries]
    scores, has_scores = _find_scores(entries)
    _tell_text(entries, "results", notes)
    broken: list[tuple[str, Any]] = []
    kept: list[int] = []
    for i, entry in enumerate(entries):
        reason = (
            "of images that the truth lacks" if image.places[i] is None
            else "of categories that the truth lacks" if category.places[i] is None
            else "without four finite numbers of a box" if boxes[i] is None
            else "with a score that is no number" if has_scores and scores[i] is None
            else ""
        )  # fmt: skip
        if reason:
            broken.append((reason, entry))
        else:
            kept.append(i)
    _refuse(path, "results", broken, len(entries), drop_unusable, notes)

    sizes = [(entry["width"], entry["height"]) for entry in images]
    given = np.asarray([boxes[i] for i in kept], dtype=np.float64).reshape(-1, 4)
    of = np.asarray([sizes[image.places[i] or 0] for i in kept], dtype=np.float64).reshape(-1, 2)
    given = _as_xywh(path, given, of, form)
    turned = np.min(given[:, 2:], axis=1, initial=0) < 0
    reason = "with a negative side (--box-format says another order)"
    broken = [(reason, entries[kept[i]]) for i in np.flatnonzero(turned)]
    _refuse(path, "results", broken, len(entries), drop_unusable, notes)
    kept = [kept[i] for i in np.flatnonzero(~turned)]
    given, of = given[~turned], of[~turned]
    outside = (given[:, :2] < -1).any(axis=1) | (given[:, :2] + given[:, 2:] > of + 1).any(axis=1)
    if outside.any():
        notes.append(f"{outside.sum()} boxes reach out of their picture: scored as they are")
    rows = [_empty_row(truth, place) for place in range(len(images))]
    results: list[dict[str, Any]] = []
    for i, box in zip(kept, given.tolist(), strict=True):
        place, number = image.places[i], category.places[i]
        assert place is not None and number is not None
        entry = {"image_id": images[place]["id"], "category_id": categories[number]["id"], "bbox": box}
        results.append({**entry, "score": scores[i]} if has_scores else entry)
        row = rows[place]
        row["status"] = "ok"
        row["boxes"].append(_fractions(box, sizes[place]))
        row["labels"].append(categories[number]["name"])
        row["scores"].append(scores[i])
    for row in rows:
        row |= {"score_source": "file"} if has_scores else {"scores": None, "score_source": None}
    ranks = [(entry["image_id"], entry["category_id"], entry.get("score")) for entry in results]
    different = len({(rank, *entry["bbox"]) for rank, entry in zip(ranks, results, strict=True)})
    if different < len(results):
        notes.append(f"{len(results) - different} results repeat another one exactly: scored as they are")
    tied = different - len(set(ranks))
    if tied and len({score for *_, score in ranks}) > 1:  # constant scores are refused, or shuffled
        notes.append(
            f"{tied} boxes have the score of another one of their picture and class: COCO's figures take those in the order "
            "of the file"
        )
    return Results(path, results, rows, tuple(notes))


def rows_about(rows: Sequence[Mapping[str, Any]], truth: Truth, where: str) -> list[Row]:
    """Put the truth of a file in the place of that of rows of our own.

    When: where a run is compared with result files.

    Input: rows, whose pictures are found by id, or by the name of their file; `where`, for messages.
    Output: rows in the order of the truth.

    Raises:
        DataError: a picture of the truth has no row, or a row no picture.
    """
    ways = image_ways(
        [plain_id(key) for key in truth.row_ids], [entry["file_name"] for entry in truth.document["images"]]
    )
    found = resolve(
        "image", [row["id"] for row in rows], [row.get("image") for row in rows], ways, chosen=None, flag="--image-ids"
    )
    lost = [str(row["id"]) for row, place in zip(rows, found.places, strict=True) if place is None]
    missing = sorted({*range(len(truth.row_ids))} - {place for place in found.places if place is not None})
    if lost or missing or len(rows) != len(truth.row_ids):
        raise DataError(
            f"{where}: {len(lost)} of its {len(rows)} pictures are not in {truth.path}, and {len(missing)} of that are not "
            f"in it (such as {', '.join([*lost[:2], *(truth.row_ids[i] for i in missing[:2])])})",
            "predict the pictures of the truth, all of them",
        )
    by_place = dict(zip(found.places, rows, strict=True))
    return [
        {
            **by_place[place],
            **{key: _empty_row(truth, place)[key] for key in ("id", "image", "width", "height", "truth")},
        }
        for place in range(len(rows))
    ]


def _read_json(path: Path) -> Any:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            raise DataError(f"{path}: is packed by gzip", f"unpack it: gunzip --keep {path}")
        return json.loads(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "name a JSON file in COCO's format") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error})", "name a JSON file in COCO's format") from error


def _objects(path: Path, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = content.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"{path}: '{key}' is no list of objects", "name a file in COCO's format")
    return entries


def _ids(path: Path, what: str, entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the ids of pictures or classes, or refuse what has none or one twice."""
    ids = [plain_id(entry.get("id")) for entry in entries]
    if None in ids:
        raise DataError(f"{path}: {ids.count(None)} of the {what} have no id", "give each an id")
    if len(set(ids)) < len(ids):
        twice = sorted({str(key) for key in ids if ids.count(key) > 1}) if len(ids) < 20_000 else []
        raise DataError(f"{path}: {what} share an id: {', '.join(twice[:5]) or 'some'}", "leave one of each out")
    return ids


def _category_names(categories: Sequence[Mapping[str, Any]], ids: Sequence[Any], notes: list[str]) -> list[str]:
    names = [str(entry.get("name", key)) for entry, key in zip(categories, ids, strict=True)]
    if len(set(names)) < len(names):
        notes.append("categories share a name: the id is added to it")
        names = [f"{name} ({key})" if names.count(name) > 1 else name for name, key in zip(names, ids, strict=True)]
    return names


def _list_results(path: Path, content: Any, notes: list[str]) -> list[Mapping[str, Any]]:
    """Return the list of results, whatever it is wrapped in."""
    if isinstance(content, Mapping):
        under = [key for key in WRAPPERS if isinstance(content.get(key), list)]
        if len(under) != 1:
            found = ", ".join(str(key) for key in list(content)[:8])
            raise DataError(
                f"{path}: is no list of results, and has {'several' if under else 'none'} of {', '.join(WRAPPERS)}: {found}",
                'write it as [{"image_id", "category_id", "bbox", "score"}, …]',
            )
        notes.append(f"results stand under '{under[0]}'")
        content = content[under[0]]
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise DataError(
            f"{path}: is no list of results", 'write it as [{"image_id", "category_id", "bbox", "score"}, …]'
        )
    flat: list[Mapping[str, Any]] = []
    for entry in content:
        inner = next((entry[key] for key in WRAPPERS if isinstance(entry.get(key), list)), None)
        if inner is None:
            flat.append(entry)
        else:  # one entry a picture, with the boxes inside
            about = {key: entry[key] for key in ("image_id", *NAMES_OF_IMAGE) if key in entry}
            if not about and "id" in entry:
                about = {"image_id": entry["id"]}
            if not all(isinstance(box, Mapping) for box in inner):
                raise DataError(f"{path}: a picture's results are no objects", "see the format of COCO's results")
            flat.extend({**about, **box} for box in inner)
    return flat


def _named(
    entries: Sequence[Mapping[str, Any]], ids: Sequence[str], names: Sequence[str], table: Any, table_key: str
) -> tuple[list[Any], list[Any], bool]:
    """Return id and name of each result's picture or class, and whether the file's own table gave every name.

    The table gives names where results have none.
    """
    by_id = {}
    if isinstance(table, list):
        by_id = {
            plain_id(entry.get("id")): entry.get(table_key)
            for entry in table
            if isinstance(entry, Mapping) and isinstance(entry.get(table_key), str)
        }
    values, called, of_table = [], [], bool(by_id)
    for entry in entries:
        value = next((entry[key] for key in ids if entry.get(key) is not None), None)
        name = next((entry[key] for key in names if entry.get(key) is not None), None)
        if name is not None and not isinstance(name, str):
            value, name = (name if value is None else value), None
        if name is None and by_id:
            name = by_id.get(plain_id(value))
        else:
            of_table = False
        values.append(value)
        called.append(name)
    return values, called, of_table


def _find_box(entry: Mapping[str, Any]) -> tuple[list[float] | None, bool]:
    """Return the four numbers of a box, or those around its segmentation, and whether it is the latter."""
    box = next((entry[key] for key in BOXES if entry.get(key)), None)
    if isinstance(box, list):
        numbers = [number for value in box if (number := _number(value)) is not None]
        return (numbers if len(box) == len(numbers) == 4 else None), False
    segments = entry.get("segmentation")
    if isinstance(segments, list) and segments:
        parts = segments if isinstance(segments[0], list) else [segments]
        rings = [part for part in parts if isinstance(part, list) and len(part) >= 4 and all(map(_is_number, part))]
        if len(rings) == len(parts):
            x = [number for part in rings for number in part[0::2]]
            y = [number for part in rings for number in part[1::2]]
            return [min(x), min(y), max(x) - min(x), max(y) - min(y)], True
    return (_box_of_runs(segments), True) if isinstance(segments, Mapping) else (None, False)


def _box_of_runs(segments: Mapping[str, Any]) -> list[float] | None:
    """Return the box around a run-length mask, packed into text or as a list of counts; None of a broken one."""
    from faster_coco_eval import mask

    size, counts = segments.get("size"), segments.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n < 2**16 for n in size)):
        return None
    if isinstance(counts, list) and not all(isinstance(n, int) and 0 <= n <= size[0] * size[1] for n in counts):
        return None
    if not isinstance(counts, list | str):
        return None
    try:
        packed = {"size": size, "counts": counts}
        if isinstance(counts, list):
            packed = mask.frPyObjects(packed, *size)
        return [float(number) for number in mask.toBbox([packed])[0]]
    except (RuntimeError, ValueError):  # what faster-coco-eval says of a broken one
        return None


def _find_scores(entries: Sequence[Mapping[str, Any]]) -> tuple[list[float | None], bool]:
    """Return a score for each result, and whether there are any."""
    raw = [next((entry[key] for key in SCORES if entry.get(key) is not None), None) for entry in entries]
    return [_number(value) for value in raw], any(value is not None for value in raw)


def _tell_text(entries: Sequence[Mapping[str, Any]], what: str, notes: list[str]) -> None:
    """Tell how many entries have numbers written as text, as a tool does that turns what it cannot write into text."""
    texts = 0
    for entry in entries:
        values = [entry.get(key) for key in (*BOXES, *SCORES, "area")]
        flat = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
        texts += any(isinstance(value, str) and _number(value) is not None for value in flat)
    if texts:
        notes.append(f"{texts} {what} have numbers written as text: read as numbers")


def _as_xywh(path: Path, boxes: np.ndarray, sizes: np.ndarray, form: BoxFormat | None) -> np.ndarray:
    """Turn boxes into x, y, width, height in pixels; refuse those that plainly are something else."""
    if form is not None:
        if form.order == "xywh" and form.unit == "pixel":
            return boxes
        unit = {"pixel": 1.0, "fraction": 1.0, "per_mille": 1000.0}[form.unit]
        scale = np.ones((len(boxes), 4)) if form.unit == "pixel" else np.concatenate([sizes, sizes], axis=1) / unit
        xyxy = corners(boxes, form.order)
        xyxy = xyxy * scale
        return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    if not len(boxes):
        return boxes
    if boxes.max() <= 1 and sizes.max() > 2:
        raise DataError(
            f"{path}: no number of any box is above 1, so these are no pixels",
            "say so: --box-format xywh/fraction, or as it is",
        )
    beyond = (boxes[:, :2] + boxes[:, 2:] > sizes * 1.02 + 1).any(axis=1)
    as_corners = (boxes[:, 2:] >= boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= sizes * 1.02 + 1).all(axis=1)
    if beyond.sum() > 0.25 * len(boxes) and as_corners.mean() > 0.95:
        raise DataError(
            f"{path}: {beyond.sum()} of {len(boxes)} boxes reach far out of their picture as x, y, width, height, and "
            f"{(~as_corners).sum()} do not fit as x1, y1, x2, y2",
            "say which: --box-format xyxy/pixel or --box-format xywh/pixel",
        )
    return boxes


def _sizes(
    images: Sequence[Mapping[str, Any]], kept: Sequence[tuple[int, int, list[float], Any]], notes: list[str]
) -> list[tuple[int, int]]:
    """Return width and height of each picture; where they are missing, what its true boxes need."""
    need = np.ones((len(images), 2))
    for image, _, box, _ in kept:
        need[image] = np.maximum(need[image], [box[0] + box[2], box[1] + box[3]])
    sizes, missing = [], 0
    for entry, least in zip(images, need, strict=True):
        wide, high = entry.get("width"), entry.get("height")
        if _is_number(wide) and _is_number(high) and min(wide, high) >= 1:
            sizes.append((round(wide), round(high)))
        else:
            missing += 1
            sizes.append((math.ceil(least[0]), math.ceil(least[1])))
    if missing:
        notes.append(
            f"{missing} pictures have no width and height: what their true boxes need stands for it; no figure depends on it"
        )
    return sizes


def _fractions(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    x, y, wide, high = box
    return [x / size[0], y / size[1], (x + wide) / size[0], (y + high) / size[1]]


def _empty_row(truth: Truth, place: int) -> Row:
    image = truth.document["images"][place]
    return {
        "id": truth.row_ids[place],
        "image": image["file_name"],
        "width": image["width"],
        "height": image["height"],
        "truth": truth.true[place],
        "text": "",
        "boxes": [],
        "labels": [],
        "scores": [],
        "score_source": None,
        "problems": [],
        "status": "none",
        "tokens": {"prompt": 0, "image": 0, "answer": 0},
        "truncated": False,
        "ms": 0.0,
        "error": None,
    }


def _refuse(path: Path, what: str, broken: Sequence[tuple[str, Any]], of: int, drop: bool, notes: list[str]) -> None:
    """Refuse entries that cannot be used, or count them where the user lets them go."""
    if not broken:
        return
    counts: dict[str, list[Any]] = {}
    for reason, entry in broken:
        counts.setdefault(reason, []).append(entry)
    parts = []
    for reason, entries in counts.items():
        shown = {key: entries[0][key] for key in list(entries[0]) if key != "segmentation"}
        parts.append(f"{len(entries)} {reason}, such as {json.dumps(shown, default=str)[:160]}")
    text = f"{len(broken)} of {of} {what} cannot be used: {'; '.join(parts)}"
    if not drop:
        raise DataError(f"{path}: {text}", f"mend the file, see --image-ids and --category-ids, or pass {DROP}")
    notes.append(f"{text}; left out ({DROP})")


def _holds(ids: Sequence[Any]) -> bool:
    """Tell whether faster-coco-eval holds these ids exactly: it keeps whole numbers as floats."""
    return all(isinstance(key, int) and abs(key) < 2**53 for key in ids)


def _ranks(keys: Sequence[Any]) -> list[int]:
    """Return the place of each id in rising order, whole numbers first: COCO takes equal scores by rising picture."""
    order = sorted(range(len(keys)), key=lambda i: (isinstance(keys[i], str), keys[i]))
    ranks = [0] * len(keys)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    """Return a finite number, also one written as text ("0.93"); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value[:40]) if "_" not in value else None
        except ValueError:
            return None
    return float(value) if _is_number(value) else None
