"""Write the tool's own JSON lines: one line a picture, nothing rounded.

When: ONCE, by `write_dataset(…, to="jsonl")`. One line of `train.jsonl`:

    {"id": "000001", "image": "images/000001.jpg", "width": 640, "height": 480,
     "boxes": [[0.1, 0.2, 0.5, 0.9]], "box_format": "xyxy/fraction", "labels": ["cat"],
     "split": "train", "group": "", "meta": {}}

Boxes are on the upright picture; pictures keep their EXIF turn, which the row's `width` and `height` have undone. The
class names stand in `classes.txt`, one a line and in order; one with a line break in it as a JSON string.
"""

from __future__ import annotations

import json

from vlmdet.boxes import FRACTIONS
from vlmdet.data.writers.files import Writing

ROUNDING = "none"


def write(writing: Writing) -> None:
    """Write every split and `classes.txt`."""
    for split in writing.dataset.splits:
        path = writing.root / f"{writing.split_file(split)}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row in writing.rows(split, "images"):
                line = {
                    "id": row.sample.id,
                    "image": row.file,
                    "width": row.width,
                    "height": row.height,
                    "boxes": row.sample.boxes.tolist(),
                    "box_format": str(FRACTIONS),
                    "labels": list(row.sample.labels),
                    "split": split,
                    "group": row.sample.group,
                    "meta": row.sample.meta,
                }
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    names = [json.dumps(label) if len(label.splitlines()) > 1 else label for label in writing.dataset.labels]
    (writing.root / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
