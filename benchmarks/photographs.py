"""Drawn pictures of 2 megapixels as JPEG files, with boxes: what the benchmarks of training read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LONG, SHORT = 1632, 1224


def draw(folder: Path, count: int, *, seed: int = 0) -> None:
    """Write `0000.jpg`, … (1632 x 1224 or 1224 x 1632 pixels, quality 90) and `rows.json`.

    Picture i depends on the seed and on i alone, so a longer set begins with the shorter one.
    """
    from vlmdet.data.synthetic.packages import draw_package

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, sequence in enumerate(np.random.SeedSequence(seed).spawn(count)):
        package = draw_package(np.random.default_rng(sequence))
        lying = package.image.width > package.image.height
        size = (LONG, SHORT) if lying else (SHORT, LONG)
        file = folder / f"{i:04d}.jpg"
        package.image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        rows.append({"id": str(i), "path": str(file), "boxes": package.boxes.tolist(), "size": size})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def read(folder: Path, count: int) -> list[dict[str, Any]]:
    """Read the first rows of `draw`: `id`, `path`, `boxes` (xyxy fractions) and `size` (width, height)."""
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return rows[:count]


def training_rows(folder: Path, count: int) -> Any:
    """Make the rows of `data.dataset` from the first pictures: a `datasets.Dataset`."""
    from datasets import Dataset

    from vlmdet.boxes import FRACTIONS, Boxes
    from vlmdet.data.dataset import build_messages, conversation_features

    label = "nutrition table"
    rows = read(folder, count)
    boxes = [Boxes.from_array(row["boxes"], FRACTIONS, 1, 1) for row in rows]
    columns = {
        "id": [row["id"] for row in rows],
        "messages": [build_messages([label], boxes=one, labels=[label] * len(one)) for one in boxes],
        "image": [{"path": row["path"], "bytes": None} for row in rows],
        "boxes": [row["boxes"] for row in rows],
        "labels": [[label] * len(one) for one in boxes],
    }
    return Dataset.from_dict(columns, features=conversation_features())


def prompt_completion_rows(folder: Path, count: int) -> Any:
    """Make the same rows as TRL reads them, in prompt-completion form: a `datasets.Dataset` with a column of pictures."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    from vlmdet.data.dataset import IMAGE_PLACEHOLDER

    rows = training_rows(folder, count).cast_column("image", ImageFeature(decode=False))

    def plain(message: dict[str, Any]) -> dict[str, Any]:
        parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
        parts = [{"type": "image"} if part.get("image") == IMAGE_PLACEHOLDER else part for part in parts]
        return {"role": message["role"], "content": parts}

    made = []
    for row in rows:
        messages = [plain(message) for message in row["messages"]]
        made.append({"prompt": messages[:-1], "completion": messages[-1:], "image": row["image"]["path"]})
    return Dataset.from_list(made).cast_column("image", ImageFeature())


def mask_newline(batch: Any) -> Any:
    r"""Take the loss off the last supervised token of each row, in place: TRL also trains the `\n` after `<|im_end|>`."""
    import torch

    labels = batch["labels"]
    places = torch.arange(labels.shape[1]).expand_as(labels)
    last = places.where(labels != -100, -1).amax(dim=1)
    labels[torch.arange(len(labels)), last] = -100
    return batch
