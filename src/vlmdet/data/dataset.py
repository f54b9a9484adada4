"""Turn annotated pictures into conversations: question, picture, and the answer to learn.

When: ONCE, before training; no torch. A reader's samples go through `build_rows`, rows of the Hugging Face data set
`openfoodfacts/nutrition-table-detection` through `convert_to_conversation_format`. One raw row of that data set:

    {"image_id": "00000000000", "image": <picture>, "width": 3024, "height": 4032, "meta": {"barcode": "…", …},
     "objects": {"bbox": [[0.1, 0.2, 0.5, 0.9]],  # y_min, x_min, y_max, x_max, fractions
                 "category_id": [0], "category_name": ["nutrition-table"]}}

and what it becomes:

    {"id": "00000000000", "image": <picture>, "boxes": [[0.2, 0.1, 0.9, 0.5]], "labels": ["nutrition-table"],
     "messages": [system, user with IMAGE_PLACEHOLDER and the question, assistant with the answer]}

The picture itself is put into the messages later, for every batch, by `data.collators`.

Long, because the raw rows of that data set are read and mended here, where their conversation is made.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.errors import ConfigError, DataError, did_you_mean
from vlmdet.grounding import PIXEL_CODECS, View, get_codec
from vlmdet.grounding.prompts import SYSTEM_PROMPT
from vlmdet.grounding.questions import question_of
from vlmdet.images import decode, orientation, to_upright_rgb
from vlmdet.records import Problem, Sample

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

BoxOrder = Literal["raster", "as_given", "large_first", "shuffle"]
Messages = list[dict[str, Any]]
ViewOf = Callable[[int, int], View]
"""From the width and height of an upright picture, in pixels, to what the model sees of it."""

IMAGE_PLACEHOLDER = "IMAGE_PLACEHOLDER"
"""Stands where a picture belongs: Arrow cannot store a picture in one part of a message and text in the next."""

ROWS_AT_ONCE = 32
"""Rows that are held in memory while they are written to Arrow's file; each may carry a photograph."""

NUTRITION_TABLES = "openfoodfacts/nutrition-table-detection"
NUTRITION_LABELS = (
    "nutrition-table",
    "nutrition-table-text",
    "nutrition-table-small",
    "nutrition-table-small-energy",
)
"""Names of that set by `category_id`; the drawn set has its schema, and uses the first."""

system_message = SYSTEM_PROMPT

_ROUNDING = 1e-6  # a box may leave the picture by this fraction without a word
_NUTRITION_FORMAT = BoxFormat("yxyx", "fraction")


def build_messages(
    asked: Sequence[str],
    *,
    boxes: Boxes | None = None,
    labels: Sequence[str] = (),
    size: tuple[int, int] = (1, 1),
    view: View | None = None,
    codec: str = "qwen2_vl",
    box_order: str = "raster",
    own_words: bool = False,
) -> Messages:
    """Word the conversation about one picture; the only place that does.

    When: once per row in data preparation and after each augmentation; once per prediction run, without an answer.

    Input: `asked`, the labels of the question; `boxes` (n) on the upright picture with n `labels`, or None for a
    question without an answer; `size`, width and height in pixels, or `view`, which also says what the model sees
    (codecs that write pixels need it); `codec`, which decides the question too, see `grounding.questions`; `own_words`,
    ask in our words whatever the codec; `box_order`, `raster` (top to bottom, then left to right), `large_first`,
    `shuffle` or `as_given`, see `_in_order`.
    Output: system (not for families that know none), user (placeholder, question) and, with boxes, assistant; every content
    is a list of parts: `{"role": "assistant", "content": [{"type": "text", "text": "<|object_ref_start|>logo<|…"}]}`.
    Control tokens in labels are made harmless.

    Raises:
        ConfigError: codec or box order is unknown, or the codec writes pixels of the resized picture and `view` is absent.
        ValueError: nothing is asked for, or boxes and labels differ in number.
    """
    system, question = question_of("plain_json" if own_words else codec, asked)
    messages = messages_of(system, question)
    if boxes is not None:
        boxes, labels = _in_order(boxes, labels, box_order)
        if view is None and codec in PIXEL_CODECS:
            raise ConfigError(
                f"{codec} writes pixels of the resized picture, and nobody said which size that is",
                "give view or view_of, e.g. functools.partial(grounding.sizes.plan_view, min_pixels=…, max_pixels=…)",
            )
        answer = get_codec(codec).encode(labels, boxes, view or View(*size, *size))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def messages_of(system: str, question: str) -> Messages:
    """Lay a question beside the place of a picture, without an answer.

    When: by `build_messages`, and once per prediction, whose contract has both texts.

    Input: `system`, "" for none; `question`, in which labels are harmless already.
    """
    messages: Messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append(
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGE_PLACEHOLDER}, {"type": "text", "text": question}],
        }
    )
    return messages


def convert_to_conversation_format(
    example: Mapping[str, Any],
    *,
    labels: Sequence[str] = NUTRITION_LABELS,
    codec: str = "qwen2_vl",
    box_order: BoxOrder = "raster",
    view_of: ViewOf | None = None,
    problems: list[Problem] | None = None,
) -> dict[str, Any]:
    """Turn a raw row of the nutrition-table data set into a training row.

    When: once per row, usually by `datasets.Dataset.map`.

    Input: `example` as in the module's docstring; `width` and `height` may be absent; `image` is a PIL image, a path,
    or the storage form `{"path", "bytes"}`. `labels` are asked for. `view_of` as in `build_rows`. `problems` collects
    boxes that were cut to the picture or left out because they have no area; without it they are logged as warnings.
    Output: `id`, `messages`, `image` as given (turned upright where it is an opened image with an EXIF turn, which
    Arrow would lose), `boxes` [[x1, y1, x2, y2]] as fractions of the upright picture, `labels`; all in one order.
    A picture with an EXIF turn whose `width` and `height` are those before the turn has its boxes turned too.

    Raises:
        DataError: a field is missing or odd, a label is not in `labels`, no box of several has an area, or `width` and
            `height` are swapped and no EXIF tag says why.
        ImageError: the picture is broken.
    """
    name = f"row {_row_id(example) or '(no image_id)'}"
    if not has_image(example):
        raise DataError(f"{name}: there is no picture", "leave such rows out: dataset.filter(has_image)")
    image = example["image"]
    opened = _peek(image, name)
    names, boxes = _read_objects(example, name)
    _check_labels(names, labels, name)
    turn = orientation(opened)
    width, height = opened.size[::-1] if turn >= 5 else opened.size
    if (example.get("width"), example.get("height")) == (height, width) != (width, height):
        if turn < 5:
            raise DataError(
                f"{name}: width and height say {height} x {width}, the picture is {width} x {height} "
                "and has no EXIF turn",
                'if it was decoded by datasets, keep the tag: cast_column("image", Image(decode=False))',
            )
        boxes = boxes.turned(turn)
    boxes, names = _mend(boxes, names, name, problems)
    boxes, names = _in_order(boxes, names, box_order)
    messages = build_messages(
        labels,
        boxes=boxes,
        labels=names,
        size=(width, height),
        view=view_of(width, height) if view_of else None,
        codec=codec,
        box_order="as_given",
    )
    # Written to Arrow, an opened picture loses its EXIF tag: it would be shown unturned under boxes that are upright.
    if isinstance(image, Image.Image) and turn != 1:
        image = to_upright_rgb(image)
    return _row(_row_id(example), messages, image, boxes, names)


def has_image(example: Mapping[str, Any]) -> bool:
    """Tell whether a row has a picture: `image`, or a list `images`, that is neither None nor an empty storage form."""
    pictures = example.get("images") or [example.get("image")]
    return all(
        picture is not None
        and not (isinstance(picture, dict) and picture.get("path") is None and not picture.get("bytes"))
        for picture in pictures
    )


_has_image = has_image


def build_row(
    sample: Sample,
    *,
    labels: Sequence[str],
    codec: str = "qwen2_vl",
    box_order: BoxOrder = "raster",
    view: View | None = None,
) -> dict[str, Any]:
    """Turn a reader's sample into a training row.

    When: once per row.

    Input: a `sample`; `labels` to ask for; `view` for codecs that write pixels of the resized picture.
    Output: as `convert_to_conversation_format`; `image` is what `datasets.Image` stores, `{"path": "a.jpg",
    "bytes": None}` or `{"path": None, "bytes": b"…"}`. The picture is not opened.

    Raises:
        DataError: a label of the sample is not in `labels`.
    """
    name = sample.source or sample.id
    _check_labels(sample.labels, labels, name)
    boxes, names = _in_order(sample.boxes, sample.labels, box_order)
    messages = build_messages(
        labels,
        boxes=boxes,
        labels=names,
        size=(sample.width, sample.height),
        view=view,
        codec=codec,
        box_order="as_given",
    )
    image: dict[str, str | bytes | None]
    if isinstance(sample.picture, Path):
        image = {"path": str(sample.picture), "bytes": None}
    else:
        image = {"path": None, "bytes": sample.picture()}
    return _row(sample.id, messages, image, boxes, names)


def build_rows(
    samples: Iterable[Sample],
    *,
    labels: Sequence[str],
    codec: str = "qwen2_vl",
    box_order: BoxOrder = "raster",
    view_of: ViewOf | None = None,
) -> datasets.Dataset:
    """Turn a reader's samples into a data set of training rows.

    When: once per split, before training.

    Input: as `build_row`; `view_of` plans the view of a picture by width and height in pixels, for codecs that write pixels
    of the resized picture: `partial(plan_view, min_pixels=…, max_pixels=…, factor=…)`.
    Output: columns `id`, `messages`, `image`, `boxes`, `labels`. Arrow gives every part of a message all keys (`text`,
    `image`), None where unused; `restore_images_in_conversations` takes them away again. The rows lie in a temporary file, which
    is deleted when the process ends, and not in memory.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    # Through a file that Arrow maps into memory: rows that carry their pictures may be gigabytes.
    folder = Path(tempfile.mkdtemp(prefix="vlmdet-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ArrowWriter(
        features=conversation_features(), path=str(folder / "rows.arrow"), writer_batch_size=ROWS_AT_ONCE
    ) as writer:
        for sample in samples:
            view = view_of(sample.width, sample.height) if view_of else None
            writer.write(build_row(sample, labels=labels, codec=codec, box_order=box_order, view=view))
        writer.finalize()
    return Dataset.from_file(str(folder / "rows.arrow"))


def load_nutrition_tables(
    split: str,
    *,
    labels: Sequence[str] = NUTRITION_LABELS,
    codec: str = "qwen2_vl",
    box_order: BoxOrder = "raster",
    view_of: ViewOf | None = None,
) -> datasets.Dataset:
    """Load a split of `openfoodfacts/nutrition-table-detection` from the Hugging Face hub as training rows.

    When: once; downloads on first use.

    Input: `split`, `train` (1,083 rows) or `val` (123); `view_of` as in `build_rows`.
    Output: as `build_rows`. Rows without a picture and rows whose boxes all lack an area are left out, and counted in
    the log.
    """
    import datasets

    # Not decoded here: `datasets` turns a picture upright and forgets the EXIF tag, which says whose the boxes are.
    raw = datasets.load_dataset(NUTRITION_TABLES, split=split).cast_column("image", datasets.Image(decode=False))
    kept = raw.filter(lambda example: has_image(example) and _has_target(example))
    if len(kept) < len(raw):
        logger.warning(
            "%s, %s: %d of %d rows left out (no picture, or no box with an area)",
            NUTRITION_TABLES,
            split,
            len(raw) - len(kept),
            len(raw),
        )
    return kept.map(
        convert_to_conversation_format,
        fn_kwargs={"labels": tuple(labels), "codec": codec, "box_order": box_order, "view_of": view_of},
        remove_columns=kept.column_names,
        features=conversation_features(),
    )


def conversation_features() -> datasets.Features:
    """Return the Arrow types of a training row, stated so that no column depends on the first rows."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    return Features(
        {
            "id": text,
            "messages": [{"role": text, "content": [{"type": text, "text": text, "image": text}]}],
            "image": ImageFeature(decode=True),
            "boxes": [[Value("float64")]],
            "labels": [text],
        }
    )


def _row(row_id: str, messages: Messages, image: Any, boxes: Boxes, labels: Sequence[str]) -> dict[str, Any]:
    return {"id": row_id, "messages": messages, "image": image, "boxes": boxes.tolist(), "labels": list(labels)}


def _row_id(example: Mapping[str, Any]) -> str:
    value = example.get("image_id")
    return "" if value is None else str(value)


def _peek(image: Any, name: str) -> Image.Image:
    """Open a picture as stored, EXIF tag included, to learn its size and turn and that it is whole."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image["path"]
    if isinstance(image, (bytes, str, Path)):
        return decode(Path(image) if isinstance(image, str) else image, name)
    raise DataError(f"{name}: the picture is a {type(image).__name__}", "give a PIL image, a path or {'path', 'bytes'}")


def _read_objects(example: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], Boxes]:
    objects = example.get("objects")
    if not isinstance(objects, Mapping) or "bbox" not in objects or "category_name" not in objects:
        raise DataError(f"{name}: 'objects' must hold 'bbox' and 'category_name'", f"found: {str(objects)[:80]}")
    names, values = tuple(str(label) for label in objects["category_name"]), objects["bbox"]
    if len(names) != len(values):
        raise DataError(f"{name}: {len(values)} boxes but {len(names)} category names")
    try:
        boxes = Boxes.from_array(values, _NUTRITION_FORMAT, 1, 1)
    except DataError as error:
        raise DataError(f"{name}: {error.message}", error.hint) from error
    if len(boxes) != len(names):  # e.g. one row of eight numbers
        raise DataError(f"{name}: boxes must be rows of four numbers: {str(values)[:80]}")
    if np.abs(boxes.xyxy).max(initial=0) > 2:
        raise DataError(f"{name}: boxes must be fractions of the picture: {str(values)[:80]}", "divide by its size")
    return names, boxes


def _check_labels(names: Sequence[str], asked: Sequence[str], row: str) -> None:
    for label in names:
        if label not in asked:
            raise DataError(f"{row}: unknown category '{label}'", did_you_mean(label, asked))


def _has_area(boxes: Boxes) -> np.ndarray:
    """Tell which boxes (n,) still have both sides after they are cut to the picture."""
    cut = boxes.clip().xyxy
    return np.all(cut[:, 2:] > cut[:, :2], axis=1)


def _has_target(example: Mapping[str, Any]) -> bool:
    """Tell whether a row is a picture without objects or has a box with an area."""
    _, boxes = _read_objects(example, f"row {_row_id(example)}")
    return len(boxes) == 0 or bool(_has_area(boxes).any())


def _mend(
    boxes: Boxes, labels: Sequence[str], name: str, problems: list[Problem] | None
) -> tuple[Boxes, tuple[str, ...]]:
    """Cut boxes to the picture and leave out those without an area; each is reported."""
    good = _has_area(boxes)
    if len(boxes) and not good.any():
        # An answer "none" would teach that there is nothing, where somebody marked something.
        raise DataError(f"{name}: no box has an area: {boxes.tolist()}", "mend the boxes or leave the row out")
    outside = np.abs(boxes.xyxy - boxes.clip().xyxy).max(axis=1, initial=0) > _ROUNDING
    for i, xyxy in enumerate(boxes.tolist()):
        if not good[i]:
            _report(Problem("", None, name, "degenerate_box", f"box {i + 1}: {xyxy}", "box_dropped"), problems)
        elif outside[i]:
            _report(Problem("", None, name, "box_outside", f"box {i + 1}: {xyxy}", "box_clipped"), problems)
    kept = np.flatnonzero(good).tolist()
    return boxes.clip()[kept], tuple(labels[i] for i in kept)


def _report(problem: Problem, problems: list[Problem] | None) -> None:
    if problems is None:
        logger.warning("%s: %s, %s (%s)", problem.id, problem.kind, problem.action, problem.detail)
    else:
        problems.append(problem)


def _in_order(boxes: Boxes, labels: Sequence[str], box_order: str) -> tuple[Boxes, tuple[str, ...]]:
    """Put boxes into the order of a policy; all but `as_given` give the same order however the boxes came.

    `raster` goes from top to bottom, then left to right; `large_first` by area, equal ones in raster order; `shuffle` is
    a random order that only the boxes and labels themselves choose, so that a row keeps it from run to run, and a picture
    whose boxes were moved by augmentation gets another.
    """
    if box_order not in get_args(BoxOrder):
        raise ConfigError(f"unknown box order '{box_order}'", did_you_mean(box_order, get_args(BoxOrder)))
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes but {len(labels)} labels")
    rows = list(range(len(boxes)))
    if box_order == "raster":
        rows = boxes.raster_order().tolist()
    elif box_order == "large_first":
        raster = boxes.raster_order()
        rows = raster[np.argsort(-boxes.area()[raster], kind="stable")].tolist()
    elif box_order == "shuffle":
        content = [json.dumps([labels[i], boxes.xyxy[i].round(9).tolist()]) for i in rows]
        rows.sort(key=lambda i: content[i])
        digest = hashlib.sha256("".join(content[i] for i in rows).encode()).digest()
        rows = np.random.default_rng(list(digest)).permutation(rows).tolist()
    return boxes[rows], tuple(labels[i] for i in rows)
