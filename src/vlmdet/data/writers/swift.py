"""Write training files of ms-swift, which puts the numbers into the answer itself.

When: ONCE, by `write_dataset(…, to="swift")`. One line of `train.jsonl`, for `--codec qwen2_5_vl`:

    {"id": "000001",
     "messages": [{"role": "system", "content": "You find …"}, {"role": "user", "content": "<image>Detect every cat …"},
                  {"role": "assistant", "content": "[{\\"bbox_2d\\": <bbox>, \\"label\\": \\"cat\\"}]"}],
     "images": ["images/000001.jpg"],
     "objects": {"ref": ["cat"], "bbox": [[64.0, 96.0, 320.0, 432.0]], "bbox_type": "real"}}

`bbox` is x1, y1, x2, y2 in pixels of the original picture; ms-swift scales it to the picture that the model sees or to
a grid of 1000, whichever the template of the family says, and writes it where `<bbox>` stands. Names stand in the answer as
the codec writes them, and as they are in `ref`. A family whose numbers ms-swift writes in another way than its model card
(Florence-2, PaliGemma) gets the codec's own text, which does not depend on the size. It opens pictures without regard
to an EXIF turn. Source: ms-swift 4.6, `template/base.py` (normalize_bbox), `template/templates/qwen.py`,
`template/templates/internvl.py`, `dataset/preprocessor/core.py`; its documentation, "Custom dataset".
"""

from __future__ import annotations

import json
import re
from typing import Any

from vlmdet.data.writers.conversation import Training, check_training, converse, describe
from vlmdet.data.writers.files import Row, Writing
from vlmdet.errors import ConfigError, DataError
from vlmdet.grounding import View

ROUNDING = "boxes within .005 pixel (two decimals); what ms-swift writes, within half a step of the family's grid"
_DECIMALS = 2

_NUMBERS = {
    "qwen2_vl": re.compile(r"<\|box_start\|>[^<]*<\|box_end\|>"),
    "qwen2_5_vl": re.compile(r'(?<="bbox_2d": )\[[^\[\]]*\]'),
    "qwen3_vl": re.compile(r'(?<="bbox_2d": )\[[^\[\]]*\]'),
    "internvl": re.compile(r"<box>\[\[[^\[\]]*\]\]</box>"),
}
"""What `<bbox>` stands for in a codec's answer; ms-swift writes the same."""

_SWITCH = {"qwen2_vl": "legacy", "qwen2_5_vl": "new", "qwen3_vl": "new"}


def write(writing: Writing, training: Training) -> dict[str, Any]:
    """Write every split; returns what is assumed.

    Raises:
        ConfigError: pixel limits are given, which no number here depends on.
        DataError: a class name hides a box.
    """
    check_training(writing, training)
    if training.min_pixels is not None or training.max_pixels is not None:
        raise ConfigError(
            "pixel limits do not change files for ms-swift: it scales the boxes itself",
            "leave --min-pixels and --max-pixels out, and set MIN_PIXELS and MAX_PIXELS for swift sft",
        )
    for split in writing.dataset.splits:
        path = writing.root / f"{writing.split_file(split)}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row in writing.rows(split, "images"):
                file.write(json.dumps(_line(writing, training.codec, row), ensure_ascii=False) + "\n")
    switch = _SWITCH.get(training.codec)
    return describe(
        writing,
        training,
        resize="none: original pixels, which ms-swift scales to what the model sees",
        use=[
            "ROOT_IMAGE_DIR=<this folder>, so that the relative paths of the pictures are found",
            *([f"QWENVL_BBOX_FORMAT={switch}, so that it writes boxes as this codec does"] if switch else []),
            "swift sft --dataset <this folder>/train.jsonl",
        ],
    )


def _line(writing: Writing, codec: str, row: Row) -> dict[str, Any]:
    talk = converse(row, writing.dataset.labels, codec, View(row.width, row.height, row.width, row.height))
    answer = talk.answer
    if codec in _NUMBERS:
        answer, found = _NUMBERS[codec].subn("<bbox>", answer)
        if found != len(talk.order):
            raise DataError(
                f"{row.sample.source}: a class name of {list(row.sample.labels)} reads like a box", "rename it"
            )
    return {
        "id": row.sample.id,
        "messages": [
            {"role": "system", "content": talk.system},
            {"role": "user", "content": f"<image>{talk.question}"},
            {"role": "assistant", "content": answer},
        ],
        "images": [row.file],
        "objects": {
            "ref": [row.sample.labels[number] for number in talk.order],
            "bbox": writing.corners(row, _DECIMALS)[talk.order].tolist(),
            "bbox_type": "real",
        },
    }
