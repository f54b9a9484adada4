"""Faults of decoding, parsing and of metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.homes.scoring import overlap
from benchmarks.faults.pictures import scenes
from benchmarks.faults.registry import fault, subject


@fault("E01", stage="evaluation")
def every_exception_is_a_zero() -> Any:
    def evaluate(predictions: Any, truths: Any) -> float:
        scores = []
        for found, wanted in zip(predictions, truths, strict=True):
            try:
                scores.append(overlap(found["boxes"][0], wanted[0]))
            except Exception:
                scores.append(0.0)
        return float(np.mean(scores))

    return subject({}, metric=evaluate)


@fault("E02", stage="evaluation")
def the_first_box_stands_for_all() -> Any:
    def mean_iou(predictions: Any, truths: Any) -> float:
        values = []
        for found, wanted in zip(predictions, truths, strict=True):
            if not wanted:
                values.append(1.0 if not found else 0.0)
            else:
                values.append(overlap(found[0], wanted[0]) if found else 0.0)
        return sum(values) / len(values)

    return subject(cookbook.fields(), metric=mean_iou)


@fault("E03", stage="evaluation", also=("E05",))
def box_tokens_are_skipped_and_then_looked_for() -> Any:
    processor = cookbook.fields()["processor"]
    pattern = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")

    def parse(text: str) -> list[list[int]]:
        return [[int(v) for v in match] for match in pattern.findall(text)]

    return subject(
        cookbook.fields(),
        processor=processor,
        decode=lambda ids: processor.decode(ids, skip_special_tokens=True),
        parse=parse,
    )


@fault("E04", stage="evaluation")
def one_search_for_many_boxes() -> Any:
    def parse(text: str, width: int, height: int) -> list[list[float]]:
        match = cookbook.BOX.search(text)
        if match is None:
            return []
        a, b, c, d = map(int, match.groups())
        return [[a * width / 1000, b * height / 1000, c * width / 1000, d * height / 1000]]

    return subject(cookbook.fields(), parse=parse)


@fault("E06", stage="evaluation")
def forty_eight_new_tokens_for_long_lists() -> Any:
    fields = coco3.fields()
    return subject(fields, settings=fields["settings"] | {"max_new_tokens": 48})


@fault("E10", stage="evaluation")
def many_predictions_find_one_truth() -> Any:
    def recall_and_precision(predictions: Any, truths: Any) -> dict[str, float]:
        tp = total = count = 0
        for found, wanted in zip(predictions, truths, strict=True):
            tp += sum(1 for box in found for truth in wanted if overlap(box, truth) > 0.5)
            total += len(wanted)
            count += len(found)
        return {"recall": tp / max(total, 1), "precision": tp / max(count, 1)}

    return subject({}, metric=recall_and_precision)


@fault("E12", stage="evaluation")
def pictures_without_an_answer_are_left_out_of_the_mean() -> Any:
    def score(predictions: Any, truths: Any) -> float:
        values = []
        for found, wanted in zip(predictions, truths, strict=True):
            if len(found) == 0:
                continue
            matrix = np.array([[overlap(f, w) for w in wanted] for f in found]) if wanted else np.zeros((len(found), 1))
            total = 0.0
            while matrix.size and matrix.max() > 0:
                i, j = np.unravel_index(matrix.argmax(), matrix.shape)
                total += matrix[i, j]
                matrix[i, :] = 0
                matrix[:, j] = 0
            values.append(total / max(len(found), len(wanted)))
        return float(np.mean(values)) if values else 0.0

    return subject({}, metric=score)


@fault("E09", stage="evaluation")
def the_evaluator_turns_the_truth() -> Any:
    """The evaluator believes that truths are y1, x1, y2, x2, which they are not."""

    def metric(predictions: Any, truths: Any) -> float:
        values = []
        for found, wanted in zip(predictions, truths, strict=True):
            if not wanted or not found:
                values.append(float(not wanted and not found))
                continue
            best = []
            for truth in wanted:
                t = (truth[1], truth[0], truth[3], truth[2])
                best.append(max(overlap(f, t) for f in found))
            values.append(sum(best) / max(len(wanted), len(found)))
        return sum(values) / len(values)

    return subject({}, metric=metric)


@fault("E14", stage="evaluation")
def pixels_of_the_seen_picture_drawn_on_the_original() -> Any:
    """The parser returns what the model wrote, in pixels of the resized picture, as pixels of the file."""
    from benchmarks.faults.bases import processor_of

    rows = team.load_rows(12, 51)
    for row in rows:
        row["image"] = row["image"].resize((row["image"].width * 3, row["image"].height * 3))
    processor = processor_of("qwen2_5_vl", max_pixels=448 * 448)

    def parse(text: str, width: int, height: int) -> list[dict[str, Any]]:
        return [{"bbox": item["bbox_2d"], "label": item["label"]} for item in json.loads(text)]

    return subject(team.fields(), rows=rows, processor=processor, collate=team.make_collate(processor), parse=parse)


@fault("E15", stage="evaluation")
def labels_are_carried_along_and_never_looked_at() -> Any:
    def f1(predictions: Any, truths: Any) -> float:
        hits = total = 0
        for found, wanted in zip(predictions, truths, strict=True):
            left = list(wanted)
            total += len(found) + len(wanted)
            for item in found:
                near = [t for t in left if overlap(item["bbox"], t["bbox"]) >= 0.5]
                if near:
                    hits += 1
                    left = [t for t in left if t is not near[0]]
        return 2 * hits / total if total else 1.0

    return subject(gemma.fields(), metric=f1)


@fault("E13", stage="evaluation")
def answers_are_sampled() -> Any:
    fields = llava.fields()
    return subject(fields, settings=fields["settings"] | {"do_sample": True, "temperature": 0.7, "top_p": 0.8})


@fault("E17", stage="evaluation")
def corners_are_parsed_as_width_and_height() -> Any:
    def parse(text: str) -> list[list[int]]:
        boxes = []
        for item in json.loads(text):
            x, y, w, h = item["bbox_2d"]
            boxes.append([x, y, x + w, y + h])
        return boxes

    return subject(llava.fields(), parse=parse)


def write_predictions(folder: Path, rows: list[dict[str, Any]], name: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shifted(box: list[int], rng: Any, spread: float = 4.0) -> list[float]:
    return [round(float(v + rng.normal(0, spread)), 1) for v in box]


def as_json(boxes: list[Any], labels: list[str]) -> str:
    return json.dumps([{"bbox_2d": b, "label": label} for b, label in zip(boxes, labels, strict=True)])


@fault("E07", stage="evaluation")
def the_same_box_until_the_limit(folder: Path) -> Any:
    rng = np.random.default_rng(52)
    rows = []
    for number, scene in enumerate(scenes(40, 52)):
        boxes, labels = [shifted(b, rng) for b in scene.boxes], list(scene.labels)
        runaway = bool(boxes) and number % 3 != 0
        if runaway:
            boxes += [boxes[-1]] * 14
            labels += [labels[-1]] * 14
        text = as_json(boxes, labels)
        rows.append(
            {
                "id": f"val-{number}",
                "width": scene.width,
                "height": scene.height,
                "text": text[:-9] if runaway else text,
                "boxes": boxes,
                "labels": labels,
                "truth": scene.boxes,
                "truth_labels": scene.labels,
                "new_tokens": 512 if runaway else 20 + 30 * len(boxes),
                "truncated": runaway,
            }
        )
    return subject({}, run_dir=str(write_predictions(folder, rows)), settings={"max_new_tokens": 512})


@fault("E16", stage="evaluation")
def the_tuned_model_says_what_the_base_says(folder: Path) -> Any:
    rng = np.random.default_rng(53)
    rows = []
    for number, scene in enumerate(scenes(40, 53)):
        boxes = [shifted(b, rng, 22.0) for b in scene.boxes]
        rows.append(
            {
                "id": number,
                "width": scene.width,
                "height": scene.height,
                "text": as_json(boxes, scene.labels),
                "boxes": boxes,
                "truth": scene.boxes,
            }
        )
    write_predictions(folder / "eval" / "base", rows)
    changed = [dict(row) for row in rows]
    changed[7]["text"] += " "
    write_predictions(folder / "eval" / "tuned", changed)
    return subject({}, run_dir=str(folder))


@fault("D01", stage="evaluation", also=("E09",))
def predictions_lie_over_the_diagonal(folder: Path) -> Any:
    """A finished run whose boxes are right after x and y are exchanged."""
    rng = np.random.default_rng(54)
    rows = []
    for number, scene in enumerate(scenes(60, 54)):
        w, h = scene.width, scene.height
        truth = [[a / w, b / h, c / w, d / h] for a, b, c, d in scene.boxes]
        boxes = [[round(float(v + rng.normal(0, 0.012)), 4) for v in (b, a, d, c)] for a, b, c, d in truth]
        rows.append(
            {
                "id": number,
                "width": w,
                "height": h,
                "text": as_json(boxes, scene.labels),
                "boxes": boxes,
                "truth": truth,
            }
        )
    return subject({}, run_dir=str(write_predictions(folder, rows)))
