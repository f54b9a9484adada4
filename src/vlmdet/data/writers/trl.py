"""Write training files of TRL: the hub's Parquet with a prompt and a completion in every row.

When: ONCE, by `write_dataset(…, to="trl")`. A row of `data/train-00000-of-00001.parquet` is that of `parquet.py`, and

    "prompt": [{"role": "system", "content": "You find …"}, {"role": "user", "content": "Detect every cat …"}]
    "completion": [{"role": "assistant", "content": "[{\\"bbox_2d\\": [66, 98, 318, 431], \\"label\\": \\"cat\\"}]"}]

`SFTTrainer` puts the picture of the column `image` before the question, and lays loss on the completion alone. `datasets`
turns pictures upright when it opens them. Pixels are those of the picture that the family's processor makes under the
pixel limits: where the trainer's processor has other limits, they are wrong. Source: TRL 1.16, `trainer/sft_trainer.py`
(DataCollatorForVisionLanguageModeling) and `data_utils.py` (prepare_multimodal_messages).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmdet.data.writers.conversation import (
    PROCESSORS,
    Training,
    check_training,
    converse,
    describe,
    limits,
    processor_view,
)
from vlmdet.data.writers.files import Writing
from vlmdet.data.writers.parquet import hub_features, hub_row, split_path, write_rows
from vlmdet.errors import DataError

if TYPE_CHECKING:
    import datasets

ROUNDING = "boxes within 3e-8 of the picture (float32); the answer's text within half a step of the codec's grid"


def write(writing: Writing, training: Training) -> dict[str, Any]:
    """Write every split; returns what is assumed."""
    check_training(writing, training)
    asked = writing.dataset.labels
    numbers = {label: number for number, label in enumerate(asked)}
    processor = PROCESSORS.get(training.codec)
    low, high = limits(training, processor[1:] if processor else (0, 0))
    view_of = processor_view(training.codec, low, high)

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for row in writing.rows(split, None):
            try:
                view = view_of(row.width, row.height)
            except DataError as error:  # longer than the processor takes
                writing.leave_out(split, row, "too_long_image", error.message)
                continue
            talk = converse(row, asked, training.codec, view)
            yield {
                **hub_row(row, numbers),
                "prompt": [{"role": "system", "content": talk.system}, {"role": "user", "content": talk.question}],
                "completion": [{"role": "assistant", "content": talk.answer}],
            }

    for split in writing.dataset.splits:
        write_rows(split_path(writing, split), rows(split), _features(asked))
    use = ['load_dataset("parquet", data_dir="<this folder>/data")', "SFTConfig(max_length=None)"]
    if processor is None:
        return describe(writing, training, resize="none: the numbers do not depend on the size", use=use)
    size = f'{{"shortest_edge": {low}, "longest_edge": {high}}}'
    return describe(
        writing,
        training,
        resize=f"the family's processor: multiples of {processor.factor} between the pixel limits",
        use=[*use, f"processor.image_processor.size = {size}"],
        min_pixels=low,
        max_pixels=high,
        size_factor=processor.factor,
    )


def _features(labels: tuple[str, ...]) -> datasets.Features:
    from datasets import Features, Value

    turns = [{"role": Value("string"), "content": Value("string")}]
    return Features({**hub_features(labels), "prompt": turns, "completion": turns})
