"""Ask an engine about samples and make one row per picture: the only maker of `predictions.jsonl`.

When: AFTER training, and in the evaluation callback during it; base and tuned take the same way. No torch: the engine may be a
model in this process (`models.inference.hf_engine`) or a server (`evaluation.server.openai_engine`).

Rows are stored as they come, in `predictions.jsonl.part`, whose first line says under what they were made. A run that was broken
off, however it ended, goes on from there; a row that was an error is asked again. The file gets its own name when it is whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.contract import Contract
from vlmdet.data.dataset import messages_of
from vlmdet.errors import DataError, VlmdetError
from vlmdet.evaluation.files import write_predictions
from vlmdet.evaluation.parts import Part, finish, header_of, read_finished, read_parts
from vlmdet.grounding import Parsed, View, get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, Engine, RowError
from vlmdet.records import Sample

MAX_ERROR_SHARE = 0.05
"""Above this share of rows that could not be run, a prediction fails as a whole."""

Row = dict[str, Any]
Gather = Callable[[Any], list[Any]]
"""From this process's value to those of all processes, on each of them; see `training.processes.gather`."""


def predict(
    engine: Engine,
    samples: Sequence[Sample],
    *,
    contract: Contract,
    path: Path | None = None,
    made_with: Mapping[str, Any] | None = None,
    max_errors: float = MAX_ERROR_SHARE,
    score: Callable[[Parsed, Answer, View], list[float]] | None = None,
    score_source: str | None = None,
    map_label: Callable[[str | None], str | None] | None = None,
    gather: Gather | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Predict boxes for samples.

    When: once per model and split.

    Input: an engine; the `contract` that says what is asked for, at which pixel limits, and by which codec answers are read;
    `path` of `predictions.jsonl`, None to store nothing; `made_with`, what else the rows depend on (weights, decoding; JSON
    values): rows on disk are used only where contract, samples and this are equal; `max_errors`, the share of rows that may
    be errors; `score`, from what was parsed, the answer and its view to a score per box, whose kind is `score_source`;
    `map_label`, from an answer's label to the one that it means; `gather`, where several processes run this: each asks about
    its share, and all get all rows; `progress(done, all)`, after each row.
    Output: rows of `predictions.jsonl` (architecture, "Data model") in the order of `samples`; boxes are xyxy fractions of
    the upright picture. A picture that cannot be opened, is too long and narrow for the model, or on which the engine fails,
    gives a row with `status` "error" and its reason, without boxes: it is left out of the scores, and counted.

    Raises:
        DataError: more rows are errors than are allowed; what is there stays in the part file.
        VlmdetError: the engine cannot go on.
    """
    header = header_of(contract, samples, made_with or {}) if path is not None else ""
    rank, size = process() if gather is not None else (0, 1)
    rows: dict[int, Row] = {}
    if path is not None:
        whole = read_finished(path, header)
        if whole is not None:
            return whole
        rows = {i: row for i, row in read_parts(path, header).items() if row["status"] != "error"}
    if gather is not None:
        gather(None)  # all have read what is there before one of them writes
    todo = [i for i in range(len(samples)) if i not in rows][rank::size]
    total = len(rows) + len(todo)
    failure: VlmdetError | None = None
    part = Part(path, header, rank) if path is not None else None
    try:
        for i, sample, answer, parsed, view in _ask(engine, samples, todo, contract):
            if isinstance(answer, RowError):
                row = _row(sample, status="error", error=answer.reason)
            else:
                row = _row(sample, answer=answer, status=parsed.status) | {
                    "boxes": parsed.boxes.tolist(),
                    "labels": [map_label(label) for label in parsed.labels] if map_label else parsed.labels,
                    "problems": [{"kind": kind, "detail": detail} for kind, detail in parsed.problems],
                    "scores": score(parsed, answer, view) if score is not None else None,
                    "score_source": score_source if score is not None else None,
                }
            rows[i] = row
            if part is not None:
                part.add(i, row)
            if progress is not None:
                progress(len(rows), total)
    except VlmdetError as error:
        if gather is None:
            raise
        failure = error  # raised on every process below, so that none waits for the others for ever
    finally:
        if part is not None:
            part.close()
    if gather is not None:
        for others, stopped in gather((rows, failure)):
            rows |= others
            failure = failure or stopped
        if failure is not None:
            raise failure
    result = [rows[i] for i in range(len(samples))]
    refuse_errors(result, max_errors)
    if path is not None and rank == 0:
        write_predictions(path, result)
        finish(path, header)
    if gather is not None:
        gather(None)  # none goes on before the file is whole
    return result


def process() -> tuple[int, int]:
    """Return the number of this process, and how many were launched together."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_errors(rows: Sequence[Mapping[str, Any]], share: float) -> None:
    """Stop where more rows are errors than are allowed.

    Raises:
        DataError: their number, and the reason of the first.
    """
    errors = [row for row in rows if row["status"] == "error"]
    if len(errors) > share * len(rows):
        raise DataError(
            f"{len(errors)} of {len(rows)} pictures could not be run, {share:.0%} may; the first: {errors[0]['error']}",
            "mend that and run the same command again, which asks about these alone; or allow more with --max-errors",
        )


def _ask(
    engine: Engine, samples: Sequence[Sample], todo: Sequence[int], contract: Contract
) -> Iterator[tuple[int, Sample, Answer | RowError, Any, Any]]:
    """Ask about the samples `todo`; gives each with its answer, and what was parsed under which view where there is one."""
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels, "factor": contract.size_factor}
    messages = messages_of(contract.system_prompt, contract.user_prompt)
    codec = get_codec(contract.codec)
    asks: dict[int, Ask] = {}
    for i in todo:
        try:  # refuses a strip 200 times as long as wide
            view = plan_view(samples[i].width, samples[i].height, **limits)
        except DataError as error:
            yield i, samples[i], RowError(str(error)), None, None
            continue
        asks[i] = Ask(i, samples[i], messages, view)
    if not asks:
        return
    for i, answer in engine(list(asks.values())):
        ask = asks.pop(i)
        parsed = None if isinstance(answer, RowError) else codec.parse(answer.text, ask.view)
        yield i, ask.sample, answer, parsed, ask.view
    if asks:
        raise RuntimeError(f"the engine gave no answer about {len(asks)} of the pictures")


def truth_row(sample: Sample) -> Row:
    """Make a row of a sample that nobody was asked about: its truth, and no box."""
    return _row(sample, status="none")


def _row(sample: Sample, *, answer: Answer | None = None, status: str, error: str | None = None) -> Row:
    return {
        "id": sample.id,
        "image": str(sample.picture) if not callable(sample.picture) else sample.source,
        "width": sample.width,
        "height": sample.height,
        "truth": {
            "boxes": [*sample.boxes.tolist(), *sample.crowd.tolist()],
            "labels": [*sample.labels, *sample.crowd_labels],
            "ignore": [False] * len(sample.labels) + [True] * len(sample.crowd_labels),
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
