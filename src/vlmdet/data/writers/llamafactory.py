"""Write training files of LLaMA-Factory: ShareGPT JSON and the `dataset_info.json` that registers it.

When: ONCE, by `write_dataset(…, to="llamafactory")`. One row of `train.json`, for `--codec qwen2_5_vl`:

    {"id": "000001",
     "messages": [{"role": "system", "content": "You find …"}, {"role": "user", "content": "<image>Detect every cat …"},
                  {"role": "assistant", "content": "[{\\"bbox_2d\\": [66, 98, 318, 431], \\"label\\": \\"cat\\"}]"}],
     "images": ["images/000001.jpg"]}

LLaMA-Factory shrinks a picture to `image_max_pixels` (589,824 where nothing else is said) before the family's processor
resizes it again, and leaves the numbers in the answer alone. So pixels here are those of the picture after both. It opens
pictures without regard to an EXIF turn. Source: LLaMA-Factory 0.9.5, `data/mm_plugin.py` (_preprocess_image),
`hparams/model_args.py` (ProcessorArguments), `data/parser.py`, `data/converter.py` (SharegptDatasetConverter).
"""

from __future__ import annotations

import json
from typing import Any

from vlmdet.data.writers.conversation import (
    PROCESSORS,
    Training,
    check_training,
    converse,
    describe,
    limits,
    processor_view,
)
from vlmdet.data.writers.files import Row, Writing
from vlmdet.grounding import View
from vlmdet.grounding.sizes import llamafactory_size

ROUNDING = "the answer's text within half a step of the codec's grid"
DEFAULT_LIMITS = (1024, 589_824)
"""`image_min_pixels` and `image_max_pixels` where nothing is said."""


def write(writing: Writing, training: Training) -> dict[str, Any]:
    """Write every split and `dataset_info.json`; returns what is assumed."""
    check_training(writing, training)
    low, high = limits(training, DEFAULT_LIMITS)
    processor = PROCESSORS.get(training.codec)
    again = processor_view(training.codec, *(processor[1:] if processor else (low, high)))

    def line(row: Row) -> dict[str, Any]:
        first = llamafactory_size(row.width, row.height, min_pixels=low, max_pixels=high)
        seen = again(*first)
        view = View(row.width, row.height, seen.resized_width, seen.resized_height)
        talk = converse(row, writing.dataset.labels, training.codec, view)
        return {
            "id": row.sample.id,
            "messages": [
                {"role": "system", "content": talk.system},
                {"role": "user", "content": f"<image>{talk.question}"},
                {"role": "assistant", "content": talk.answer},
            ],
            "images": [row.file],
        }

    entries: dict[str, Any] = {}
    for split in writing.dataset.splits:
        name = writing.split_file(split)
        with (writing.root / f"{name}.json").open("w", encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(writing.rows(split, "images")):
                file.write(("[" if number == 0 else ",") + "\n" + json.dumps(line(row), ensure_ascii=False))
            file.write("\n]\n" if writing.images[split] else "[]\n")
        entries[f"vlmdet_{name}"] = {
            "file_name": f"{name}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
    # ASCII: LLaMA-Factory opens it in the encoding of the machine
    (writing.root / "dataset_info.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="ascii")
    use = [
        f"dataset_dir: <this folder>, dataset: {next(iter(entries), 'vlmdet_train')}",
        f"image_min_pixels: {low}, image_max_pixels: {high}",
    ]
    resize = "LLaMA-Factory's, between the pixel limits, then the family's processor as published"
    if processor is not None:
        resize += f" (multiples of {processor.factor}, {processor.min_pixels:,} to {processor.max_pixels:,} pixels)"
    return describe(writing, training, resize=resize, use=use, min_pixels=low, max_pixels=high)
