"""Batches of the user's collator as plain lists, so that checks compare numbers and no tensors.

When: after `conversations`. torch is touched only through what the user's collator returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """What the collator made of some examples.

    Attributes:
        name: `single`, `short+long`, `two turns`, …; `where` of its rows and their `answers`, in order.
        ids, labels, mask: for each row lists of int; labels are None where the batch has none.
        grids: (frames, rows, columns) of each picture, None where the batch has no `image_grid_thw`.
        pixels: the pixel values as an array, None where there are none.
        raw: the batch itself.
    """

    name: str
    where: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    ids: list[list[int]]
    labels: list[list[int]] | None
    mask: list[list[int]]
    grids: list[tuple[int, int, int]] | None
    pixels: np.ndarray | None = field(repr=False)
    raw: Any = field(repr=False)
    pictures: tuple[int, ...] = ()

    @property
    def padded_left(self) -> bool:
        """Does a row of this batch begin with padding?"""
        return any(row and not row[0] and any(row) for row in self.mask)


@dataclass(frozen=True)
class Supervised:
    """One row of a batch: which tokens carry loss.

    Attributes:
        batch: name of the batch; where: of the row; answers: texts that should carry loss.
        ids: of the whole row; places: those that carry loss; learnt: their labels, in order.
        text: `learnt` decoded, special tokens kept.
    """

    batch: str
    where: str
    answers: tuple[str, ...]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    mask: tuple[int, ...]
    places: tuple[int, ...]
    learnt: tuple[int, ...]
    text: str


def read_batch(
    raw: Any, name: str, where: Sequence[str], answers: Sequence[tuple[str, ...]], pictures: Sequence[int] = ()
) -> Batch:
    """Read what a collator returned.

    Raises:
        NotAvailable: it has no `input_ids` of two dimensions.
    """
    if not hasattr(raw, "keys"):
        raise NotAvailable(f"a collator that returns a dict with input_ids, not {type(raw).__name__}")
    values: Mapping[str, Any] = raw
    keys = set(values.keys())
    if "input_ids" not in keys:
        raise NotAvailable(f"input_ids in the batch; it has {', '.join(sorted(map(str, keys)))}")
    ids = _rows(values["input_ids"])
    labels = _rows(values["labels"]) if "labels" in keys and values["labels"] is not None else None
    mask = (
        _rows(values["attention_mask"]) if "attention_mask" in keys and values["attention_mask"] is not None else None
    )
    if mask is None or [len(row) for row in mask] != [len(row) for row in ids]:
        mask = [[1] * len(row) for row in ids]
    grid = values["image_grid_thw"] if "image_grid_thw" in keys else None
    pixels = values["pixel_values"] if "pixel_values" in keys else None
    return Batch(
        name=name,
        where=tuple(where),
        answers=tuple(answers),
        ids=ids,
        labels=labels,
        mask=[[int(bool(one)) for one in row] for row in mask],
        grids=None if grid is None else [(int(t), int(h), int(w)) for t, h, w in as_array(grid).reshape(-1, 3)],
        pixels=None if pixels is None else as_array(pixels),
        raw=raw,
        pictures=tuple(pictures),
    )


def as_array(value: Any) -> np.ndarray:
    """Return a tensor, list of tensors or array as a numpy array; bfloat16 becomes float32."""
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape"):
        arrays = [as_array(one) for one in value]
        return (
            np.stack(arrays)
            if len({one.shape for one in arrays}) == 1
            else np.concatenate([one.ravel() for one in arrays])
        )
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):
            value = value.float()
        return value.numpy()
    return np.asarray(value)


def _rows(value: Any) -> list[list[int]]:
    if isinstance(value, (list, tuple)) and value and not hasattr(value, "shape"):
        return [[int(one) for one in as_array(row).ravel()] for row in value]
    array = as_array(value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise NotAvailable(f"input_ids and labels of two dimensions; they have {array.ndim}")
    return [[int(one) for one in row] for row in array]


def supervised_of(batch: Batch, tokenizer: Any) -> list[Supervised]:
    """Decode the tokens that carry loss of every row of a batch.

    Raises:
        NotAvailable: the batch has no labels.
    """
    if batch.labels is None:
        raise NotAvailable("labels in the batch")
    rows = []
    vocabulary = len(tokenizer)
    for i, (ids, labels, mask) in enumerate(zip(batch.ids, batch.labels, batch.mask, strict=True)):
        places = tuple(place for place, label in enumerate(labels) if label != IGNORED)
        learnt = tuple(labels[place] for place in places)
        text = tokenizer.decode([one for one in learnt if 0 <= one < vocabulary], skip_special_tokens=False)
        answers = batch.answers[i] if i < len(batch.answers) else ()
        where = batch.where[i] if i < len(batch.where) else f"row {i}"
        rows.append(
            Supervised(batch.name, where, answers, tuple(ids), tuple(labels), tuple(mask), places, learnt, text)
        )
    return rows
