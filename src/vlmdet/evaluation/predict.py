"""Run a model over samples and write one row per picture: the only maker of `predictions.jsonl`.

When: AFTER training, and in the evaluation callback during it; base and tuned take the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlmdet.contract import Contract
from vlmdet.data.dataset import build_messages
from vlmdet.errors import DataError
from vlmdet.grounding import get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.inference import MAX_NEW_TOKENS, Answer, generate_answers
from vlmdet.records import Sample

MAX_ERROR_SHARE = 0.05
"""Above this share of rows that could not be run, a prediction fails as a whole."""


def predict(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    contract: Contract,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Predict boxes for samples.

    Input: a loaded model and processor; the `contract` that says what is asked for, at which pixel limits, and by which codec
    answers are read; `progress(done, all)`, called after each batch.
    Output: rows of `predictions.jsonl` (architecture, "Data model") in the order of `samples`; boxes are xyxy fractions of
    the upright picture. A picture that cannot be opened, or is too long and narrow for the model, gives a row with
    `status` "error" and its reason.

    Raises:
        DataError: over 5 % of the rows are errors.
    """
    rows: list[dict[str, Any] | None] = [None] * len(samples)
    # rows of like length together: less padding
    order = sorted(range(len(samples)), key=lambda i: samples[i].width / samples[i].height)
    pixels = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    messages = build_messages(contract.labels, codec=contract.codec)
    done = 0
    for batch in _batches(order, batch_size):
        ready, images = [], []
        for i in batch:
            try:
                image = samples[i].image
                plan_view(
                    *image.size, **pixels, factor=contract.size_factor
                )  # refuses a strip 200 times as long as wide
                images.append(image)
                ready.append(i)
            except DataError as error:
                rows[i] = _row(samples[i], status="error", error=str(error))
        if ready:
            answers = generate_answers(
                model,
                processor,
                [messages] * len(ready),
                images,
                **pixels,
                max_new_tokens=max_new_tokens,
            )
            for i, image, answer in zip(ready, images, answers, strict=True):
                view = plan_view(*image.size, **pixels, factor=contract.size_factor)
                parsed = get_codec(contract.codec).parse(answer.text, view)
                rows[i] = _row(samples[i], answer=answer, status=parsed.status) | {
                    "boxes": parsed.boxes.tolist(),
                    "labels": parsed.labels,
                    "problems": [{"kind": kind, "detail": detail} for kind, detail in parsed.problems],
                }
        done += len(batch)
        if progress is not None:
            progress(done, len(samples))
    result = [row for row in rows if row is not None]
    errors = [row for row in result if row["status"] == "error"]
    if len(errors) > MAX_ERROR_SHARE * len(result):
        raise DataError(f"{len(errors)} of {len(result)} pictures could not be run; the first: {errors[0]['error']}")
    return result


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _row(sample: Sample, *, answer: Answer | None = None, status: str, error: str | None = None) -> dict[str, Any]:
    return {
        "id": sample.id,
        "image": str(sample.picture) if not callable(sample.picture) else sample.source,
        "width": sample.width,
        "height": sample.height,
        "truth": {
            "boxes": sample.boxes.tolist(),
            "labels": list(sample.labels),
            "ignore": [False] * len(sample.labels),
        },
        "text": answer.text if answer else "",
        "boxes": [],
        "labels": [],
        "scores": None,
        "score_source": None,
        "problems": [],
        "status": status,
        "tokens": {
            "prompt": answer.prompt_tokens if answer else 0,
            "image": answer.image_tokens if answer else 0,
            "answer": answer.answer_tokens if answer else 0,
        },
        "truncated": answer.truncated if answer else False,
        "ms": round(answer.milliseconds, 2) if answer else 0.0,
        "error": error,
    }


def print_progress(what: str) -> Callable[[int, int], None]:
    """Return a progress function that rewrites one line on stderr, or stays silent where that is no terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
