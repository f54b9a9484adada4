"""Subjects of a command line: the user's own functions by `file.py:name`, and our own pipeline wherever none is named.

When: by `vlmdet doctor` and `vlmdet train`. User code is imported only where `make_subject` is called: in the forked process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.dataset import build_messages, build_row
from vlmdet.doctor.calls import as_boxes
from vlmdet.doctor.examine import examine
from vlmdet.doctor.findings import Report
from vlmdet.doctor.sampling import every
from vlmdet.doctor.subject import Subject
from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.files import write_whole
from vlmdet.grounding import View, get_codec
from vlmdet.records import DetectionDataset, Sample
from vlmdet.settings import Settings

ROWS = 1000
"""Rows of each split that are taken, at most, evenly chosen."""


def load_object(text: str, flag: str) -> Any:
    """Import `file.py:name`; the file's folder is on the path while it is imported.

    Raises:
        ConfigError: no such file or name, or the file raises when it is imported.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file or not name or path.suffix != ".py":
        raise ConfigError(f"{flag} {text}", f"write it as file.py:name, e.g. {flag} train.py:convert")
    if not path.is_file():
        raise ConfigError(f"{flag} {text}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{flag} {text}: not a Python file")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        raise ConfigError(f"{flag} {text}: importing it raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        names = [one for one in vars(module) if not one.startswith("_")]
        raise ConfigError(f"{flag} {text}: no '{name}' in it", did_you_mean(name, names))
    if not callable(getattr(module, name)):
        raise ConfigError(f"{flag} {text}: '{name}' is no function", "name a function or a class")
    return getattr(module, name)


def raw_rows(dataset: DetectionDataset, *, limit: int = ROWS) -> dict[str, list[dict[str, Any]]]:
    """Write samples of our readers as raw rows: `{"id", "image", "width", "height", "objects": {"bbox", "category"}}`."""
    splits = {name: [_raw(sample) for sample in every(samples, limit)] for name, samples in dataset.splits.items()}
    return {name: rows for name, rows in splits.items() if rows}


def _raw(sample: Sample) -> dict[str, Any]:
    held = sample.picture if isinstance(sample.picture, Path) else sample.picture()
    image = {"path": str(held), "bytes": None} if isinstance(held, Path) else {"path": None, "bytes": held}
    row: dict[str, Any] = {"id": sample.id, "image": image, "width": sample.width, "height": sample.height}
    row["objects"] = {"bbox": sample.boxes.tolist(), "category": list(sample.labels)}
    if sample.group:
        row["group"] = sample.group
    return row


def our_parts(processor: Any, labels: Sequence[str], settings: Settings, *, model_type: str) -> dict[str, Any]:
    """Return our own converter, renderer, collator, decoder, parser and metric, as fields of a `Subject`.

    When: where the user names none; they are what `vlmdet train` and `vlmdet eval` use.
    """
    from vlmdet.data.collators import Qwen2VLCollatorV3
    from vlmdet.data.collators_other import PromptAnswerCollator
    from vlmdet.grounding.sizes import plan_view
    from vlmdet.models.families import codec_of
    from vlmdet.models.processors import is_other_family, pixel_limits

    low, high, factor = pixel_limits(processor)
    codec = codec_of(model_type, settings.model.codec)

    def view_of(width: int, height: int) -> View:
        if is_other_family(processor):
            return View(width, height, width, height)
        return plan_view(width, height, min_pixels=low, max_pixels=high, factor=factor)

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        image = row["image"]
        picture = Path(image["path"]) if image["bytes"] is None else (lambda: image["bytes"])
        objects = row["objects"]
        boxes = Boxes.from_array(objects["bbox"], FRACTIONS, row["width"], row["height"])
        sample = Sample(str(row["id"]), picture, row["width"], row["height"], boxes, tuple(objects["category"]))
        return build_row(
            sample,
            labels=labels,
            codec=codec,
            box_order=settings.data.box_order,
            view=view_of(row["width"], row["height"]),
        )

    def render(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return build_messages(labels, codec=codec)

    def decode(ids: Any) -> str:
        ends = {processor.tokenizer.eos_token, processor.tokenizer.pad_token}
        text = processor.tokenizer.decode(ids, skip_special_tokens=False)
        for word in ends - {None}:
            text = text.replace(word, "")
        return text

    def parse(text: str, width: int, height: int) -> list[dict[str, Any]]:
        parsed = get_codec(codec).parse(text, view_of(width, height))
        return [{"bbox": box, "label": label} for box, label in zip(parsed.boxes.tolist(), parsed.labels, strict=True)]

    collator = PromptAnswerCollator if is_other_family(processor) else Qwen2VLCollatorV3
    return {
        "convert": convert,
        "render": render,
        "collate": collator(processor, min_pixels=low, max_pixels=high),
        "decode": decode,
        "parse": parse,
        "metric": our_metric,
    }


def our_metric(predictions: Sequence[Any], truths: Sequence[Any]) -> dict[str, float]:
    """Score predictions against truths, lists of boxes or of `{"bbox", "label"}` per picture, with `evaluation.metrics`."""
    from vlmdet.evaluation.metrics import score_rows

    read = [[as_boxes(one) for one in side] for side in (predictions, truths)]
    top = max((abs(number) for side in read for one in side for _, box in one for number in box), default=1.0) or 1.0
    rows: list[Any] = []
    for i, (predicted, true) in enumerate(zip(*read, strict=True)):
        sides = [
            ([[n / top for n in box] for _, box in one], [label or "object" for label, _ in one])
            for one in (predicted, true)
        ]
        (boxes, labels), (true_boxes, true_labels) = sides
        truth = {"boxes": true_boxes, "labels": true_labels, "ignore": [False] * len(true_boxes)}
        rows.append(
            {
                "id": str(i),
                "image": "",
                "width": 1,
                "height": 1,
                "truth": truth,
                "text": "",
                "boxes": boxes,
                "labels": labels,
                "scores": None,
                "score_source": None,
                "problems": [],
                "status": "ok" if boxes else "none",
                "tokens": {"prompt": 0, "image": 0, "answer": 0},
                "truncated": False,
                "ms": 0,
                "error": None,
            }
        )
    asked = sorted({label for one in read[1] for boxes in one for label in [boxes[0] or "object"]} | {"object"})
    figures = score_rows(rows, labels_asked=asked, resamples=0)
    return {
        name: float(value) for name in ("f1_50", "f1", "mean_best_iou") if (value := figures[name]["value"]) is not None
    }


def subject_of(
    dataset: DetectionDataset, settings: Settings, processor: Any, *, model_type: str, **more: Any
) -> Subject:
    """Return our own pipeline on a data set as a subject; `more` are fields of the user's that take the place of ours."""
    fields: dict[str, Any] = {
        "splits": more.pop("splits", None) or raw_rows(dataset),
        "box_format": str(FRACTIONS),
        "processor": processor,
        "settings": flat_settings(settings, model_type=model_type),
        **our_parts(processor, list(dataset.labels), settings, model_type=model_type),
    }
    return Subject(**{**fields, **more})


CHEAP = ("data", "conversation", "template", "labels", "vision")
"""Stages that are checked before a run: they take seconds, on some hundred rows."""


def examine_before(
    dataset: DetectionDataset,
    settings: Settings,
    processor: Any,
    *,
    model_type: str,
    rows: int = 200,
    timeout: float = 20,
) -> Report:
    """Examine our own pipeline on a data set with the cheap checks.

    When: by `vlmdet train` and `vlmdet demo`, after the data and the processor are there and before anything is trained.

    Input: `rows` of each split that are looked at, evenly chosen; `timeout` in seconds for all checks.
    """
    subject = subject_of(dataset, settings, processor, model_type=model_type, splits=raw_rows(dataset, limit=rows))
    return examine(subject, stages=CHEAP, timeout=timeout)


def check_before(
    dataset: DetectionDataset,
    settings: Settings,
    processor: Any,
    *,
    model_type: str,
    folder: Path,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Examine before a run is paid for: say what was found, write `doctor.json`, refuse what is silent and fatal.

    When: by `vlmdet train` and `vlmdet demo`, after `prepare` and before a step is made.

    Input: `folder` of the run; `force`, go on whatever is found.

    Raises:
        ConfigError: a finding of severity 4 and a certainty of at least one half, unless `force`.
    """
    report = examine_before(dataset, settings, processor, model_type=model_type)
    write_whole(folder / "doctor.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    causes = [one for one in report.findings if one.consequence_of is None]
    if causes:
        for one in causes:
            say(f"doctor: {one.id} {one.title} (severity {one.severity}): {' '.join(one.evidence.split())[:300]}")
            say(f"  {one.cause}; {one.fix}")
    else:
        say(
            f"doctor: a clean bill; {len(report.checked)} checks of data, conversation, labels and vision found nothing"
        )
    say(
        f"  {len(report.checked)} fine, {len(report.not_run)} not run, {report.seconds:.1f} s: {folder / 'doctor.json'}"
    )
    fatal = [one for one in causes if one.severity >= 4 and one.certainty >= 0.5]
    if fatal and not force:
        raise ConfigError(
            f"the doctor found what is silent and fatal: {', '.join(f'{one.id} {one.title}' for one in fatal)}",
            f"mend it, or train all the same with --force; everything that was found: {folder / 'doctor.json'}",
        )
    return report


def flat_settings(settings: Settings, *, model_type: str = "") -> dict[str, Any]:
    """Return our settings under the names that the doctor reads; those that are not set are left out."""
    from vlmdet.binding import as_plain

    plain = as_plain(settings)
    model, training = plain["model"], plain["training"]
    values = {
        "model_name": model["name"],
        "model_type": model_type,
        "min_pixels": model["min_pixels"],
        "max_pixels": model["max_pixels"],
        "max_new_tokens": plain["evaluation"]["max_new_tokens"],
        "do_sample": False,
        "seed": training.get("seed"),
    }
    return {key: value for key, value in values.items() if value not in (None, "")}


def make_subject(
    source: str | None,
    *,
    settings: Settings,
    names: Mapping[str, str],
    run_dir: str | None,
    read: Callable[[], DetectionDataset],
) -> Subject:
    """Build the subject of a command line.

    When: in the process that examines it.

    Input: `names`, field -> `file.py:name` of the user's own code; `read`, opens the data set.
    Output: with a source our own pipeline, with the user's functions in place of ours; without one what was named alone.
    """
    flags = {
        "convert": "--convert",
        "collate": "--collator",
        "parse": "--parse",
        "metric": "--metric",
        "build_trainer": "--trainer",
    }
    own = {field: load_object(text, flags[field]) for field, text in names.items()}
    if source is None:
        return Subject(run_dir=run_dir, **own)
    own["run_dir"] = run_dir
    model = settings.model
    from vlmdet.models.loader import load_processor

    processor = load_processor(model.name, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    kind = _type_of(model.name)
    own = {key: value for key, value in own.items() if value is not None}
    path = Path(source)
    if "convert" in own and path.suffix in (".jsonl", ".json") and path.is_file():
        # the user's converter reads the user's rows: as they stand in the file
        rows = _rows_of(path)
        mine = Subject(rows=rows, processor=processor, settings=flat_settings(settings, model_type=kind))
        declared = settings.data.box_format
        extra = {"box_format": declared} if declared not in (None, "auto", "") else {}
        return Subject(**{**{k: v for k, v in vars(mine).items() if v is not None}, **extra, **own})
    dataset = read()
    ours = subject_of(dataset, settings, processor, model_type=kind)
    fields = {key: value for key, value in vars(ours).items() if value is not None}
    if "convert" in own:  # what he writes, he reads: ours would be judged on another format
        for key in ("parse", "decode", "render"):
            fields.pop(key, None)
    return Subject(**{**fields, **own})


def _rows_of(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: not a list of rows", "leave --convert out, or name a .jsonl")
    return rows


def _type_of(name: str) -> str:
    from vlmdet.models.loader import _config_of

    return str(_config_of(name)[1].model_type)
