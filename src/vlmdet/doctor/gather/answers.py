"""Answers of a run in one form, whatever its predictions file is called and holds.

When: WHEN WRONG, from the rows of `files.Run.predictions`; numpy only. Boxes come as fractions of the picture where its size is
known or the numbers say so, else as they stand; those of a prediction and of its truth always in the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, as_boxes
from vlmdet.doctor.gather.text_boxes import boxes_in

TEXTS = ("text", "raw", "raw_text", "output", "output_text", "generated_text", "generated", "response", "completion", "answer",
         "prediction", "pred", "raw_output", "predicted_text", "pred_text")  # fmt: skip
PREDICTED = ("boxes", "pred_boxes", "predicted_boxes", "predictions", "pred", "prediction", "detections", "bboxes", "pred_bboxes",
             "pred_bbox", "box", "output_boxes", "parsed", "parsed_boxes")  # fmt: skip
TRUTH = ("truth", "gt", "gt_boxes", "ground_truth", "true_boxes", "target_boxes", "targets", "target", "references", "reference",
         "label", "labels", "gt_bboxes", "gt_bbox", "truths", "annotations", "true", "expected", "truth_boxes")  # fmt: skip
TOKENS = ("new_tokens", "n_tokens", "num_tokens", "answer_tokens", "generated_tokens", "completion_tokens", "length",
          "n_new_tokens", "num_new_tokens", "output_tokens", "tokens")  # fmt: skip
NAMES = ("id", "image_id", "image", "file", "file_name", "image_path", "sample_id", "idx", "index", "row")


@dataclass(frozen=True)
class Answered:
    """One answer of a run, and the truth.

    Attributes:
        id: of the picture.
        text: as generated; "" where only boxes were stored.
        boxes: (m, 4) predicted, xyxy, in the same numbers as `truth`.
        truth: (n, 4) true boxes, xyxy.
        new_tokens: generated, None where unknown.
        truncated: whether the row says that the limit was reached.
        failed: the reason of a row that could not be run, else "".
    """

    id: str
    text: str
    boxes: np.ndarray
    truth: np.ndarray
    new_tokens: int | None = None
    truncated: bool = False
    failed: str = ""


def answers_of(rows: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """Read rows of a predictions file; a row without any truth has none."""
    return [_answer(row, i) for i, row in enumerate(rows)]


def _answer(row: Mapping[str, Any], place: int) -> Answered:
    text = next((row[key] for key in TEXTS if isinstance(row.get(key), str)), "")
    truth, truth_is_text = _boxes(row, TRUTH)
    boxes, boxes_are_text = _boxes(row, PREDICTED)
    if boxes is None and text:
        boxes, boxes_are_text = (
            np.asarray([one.numbers for one in boxes_in(text)], dtype=np.float64).reshape(-1, 4),
            True,
        )
    boxes = np.zeros((0, 4)) if boxes is None else boxes
    truth = np.zeros((0, 4)) if truth is None else truth
    size = _size(row)
    if boxes_are_text != truth_is_text or size is not None:
        boxes, truth = _fractions(boxes, size, grid=boxes_are_text), _fractions(truth, size, grid=truth_is_text)
    tokens = next((row[key] for key in TOKENS if key in row), None)
    if isinstance(tokens, Mapping):
        tokens = tokens.get("answer")
    name = next((str(row[key]) for key in NAMES if isinstance(row.get(key), (str, int))), str(place))
    failed = row.get("error") if row.get("status") == "error" or isinstance(row.get("error"), str) else None
    cut = row.get("truncated") or row.get("finish_reason") == "length" or row.get("hit_limit")
    number = int(tokens) if isinstance(tokens, (int, float)) and not isinstance(tokens, bool) else None
    return Answered(name, text, boxes, truth, number, bool(cut), str(failed or ""))


def _boxes(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[np.ndarray | None, bool]:
    """Return the boxes under the first of the keys that holds some, and whether they were read from a text."""
    for key in keys:
        value = row.get(key)
        if value is None or isinstance(value, (bool, int, float)):
            continue
        if isinstance(value, str):
            if keys is PREDICTED:
                continue
            found = [one.numbers for one in boxes_in(value)]
            return np.asarray(found, dtype=np.float64).reshape(-1, 4), True
        try:
            numbers = [box for _, box in as_boxes(value)]
        except (NotAvailable, AttributeError, TypeError):
            continue
        return np.asarray(numbers, dtype=np.float64).reshape(-1, 4), False
    return None, False


def _size(row: Mapping[str, Any]) -> tuple[float, float] | None:
    for wide, high in (("width", "height"), ("image_width", "image_height"), ("w", "h"), ("img_width", "img_height")):
        if (
            isinstance(row.get(wide), (int, float))
            and isinstance(row.get(high), (int, float))
            and row[wide]
            and row[high]
        ):
            return float(row[wide]), float(row[high])
    size = row.get("size") or row.get("image_size")
    if (
        isinstance(size, (list, tuple))
        and len(size) == 2
        and all(isinstance(one, (int, float)) and one for one in size)
    ):
        return float(size[0]), float(size[1])
    return None


def _fractions(boxes: np.ndarray, size: tuple[float, float] | None, *, grid: bool) -> np.ndarray:
    """Bring boxes to fractions: those of a text stand on a grid of 1,000, others in pixels, unless all are below 1."""
    if not len(boxes) or np.abs(boxes).max() <= 1.5:
        return boxes
    if grid or size is None:
        return boxes / 1000.0
    return boxes / np.asarray([*size, *size])


BASE_WORDS = ("base", "zero_shot", "zeroshot", "zero-shot", "untuned", "original", "pretrained", "before")
TUNED_WORDS = ("tuned", "finetuned", "fine_tuned", "fine-tuned", "adapter", "trained", "lora", "after", "ours", "sft")


def role_of(name: str) -> str:
    """Tell by a file's name whose answers it holds: `base`, `tuned`, or `` where it does not say."""
    words = name.lower().replace("pretrained", "base").replace("untuned", "base")
    if any(word in words for word in BASE_WORDS) and not any(
        word in words for word in ("tuned", "adapter", "trained", "lora")
    ):
        return "base"
    return "tuned" if any(word in words for word in TUNED_WORDS) else ""
