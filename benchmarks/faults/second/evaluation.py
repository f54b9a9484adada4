"""More faults of parsers, metrics, finished evaluations and servers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.bases import folder_of, model_of, processor_of
from benchmarks.faults.first.evaluation import as_json, shifted, write_predictions
from benchmarks.faults.first.model import write_adapter
from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.homes.scoring import f1, overlap
from benchmarks.faults.pictures import scenes
from benchmarks.faults.registry import fault, subject


@fault("E01", stage="evaluation")
def a_bare_except_around_the_whole_sample() -> Any:
    """Boxes are looked up by a key that they do not have, and each failure counts as no overlap."""

    def compute(preds: Any, gts: Any) -> dict[str, float]:
        total = []
        for pred, gt in zip(preds, gts, strict=False):
            score = 0
            try:
                for p, g in zip(pred, gt, strict=False):
                    score += overlap(p.xyxy, g.xyxy)
            except:  # noqa: E722
                score = 0
            total.append(score)
        return {"iou": sum(total) / max(1, len(total)), "detected": sum(s > 0 for s in total) / max(1, len(total))}

    return subject({}, metric=compute)


@fault("E02", stage="evaluation")
def best_overlap_of_a_truth_and_no_price_for_more() -> Any:
    """Recall under another name: five copies and fifty strays cost nothing."""

    def mean_best(predictions: Any, truths: Any) -> float:
        best = []
        for found, wanted in zip(predictions, truths, strict=True):
            best.extend(max((overlap(p, t) for p in found), default=0.0) for t in wanted)
        return float(np.mean(best)) if best else 1.0

    return subject({}, metric=mean_best)


@fault("E03", stage="evaluation")
def the_parser_waits_for_words_that_are_never_taught() -> Any:
    def parse(text: str, width: int, height: int) -> list[list[float]]:
        return [
            [float(a) * width, float(b) * height, float(c) * width, float(d) * height]
            for a, b, c, d in re.findall(r"<box>\(([\d.]+), ([\d.]+)\), \(([\d.]+), ([\d.]+)\)</box>", text)
        ]

    return subject(cookbook.fields(), parse=parse)


@fault("E03", stage="evaluation", also=("E05",))
def location_tokens_vanish_with_the_special_ones() -> Any:
    """PaliGemma's `<loc>` tokens made special by hand, and skipped by the evaluation."""
    fields = gemma.fields()
    tokenizer = fields["processor"].tokenizer

    def decode(ids: Any) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return re.sub(r"<[^>]*>", "", text).strip()

    return subject(fields, decode=decode)


@fault("E04", stage="evaluation")
def one_pattern_for_a_list_of_any_length() -> Any:
    """The pattern finds one box wherever it stands first; a list of three gives one."""

    def parse(text: str) -> list[list[int]]:
        match = re.search(r"\[(\d+), (\d+), .*?(\d+), (\d+)\]", text)
        return [[int(v) for v in match.groups()]] if match else []

    return subject(llava.fields(), parse=parse, metric=None)


@fault("E05", stage="evaluation", also=("E03", "S05"))
def the_server_skips_what_the_parser_needs() -> Any:
    fields = cookbook.fields()
    pattern = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
    settings = fields["settings"] | {"engine": "vllm", "serve_skip_special_tokens": True, "skip_special_tokens": True}
    return subject(fields, parse=lambda text: [[int(v) for v in m] for m in pattern.findall(text)], settings=settings)


@fault("E06", stage="evaluation")
def the_librarys_default_of_twenty_tokens() -> Any:
    fields = team.fields(most=3)
    return subject(fields, settings=fields["settings"] | {"max_new_tokens": 20})


@fault("E09", stage="evaluation")
def both_sides_are_read_as_width_and_height() -> Any:
    """Corners of both are taken for x, y, w, h; equal boxes still give one."""

    def iou(a: Any, b: Any) -> float:
        a, b = [a[0], a[1], a[0] + a[2], a[1] + a[3]], [b[0], b[1], b[0] + b[2], b[1] + b[3]]
        return overlap(a, b)

    def metric(predictions: Any, truths: Any) -> float:
        values = []
        for found, wanted in zip(predictions, truths, strict=True):
            left = list(found)
            for truth in wanted:
                best = max(left, key=lambda p: iou(p, truth), default=None)
                values.append(iou(best, truth) if best is not None else 0.0)
                if best is not None:
                    left.remove(best)
            values.extend(0.0 for _ in left)
        return float(np.mean(values)) if values else 1.0

    return subject({}, metric=metric)


@fault("E10", stage="evaluation")
def each_prediction_above_a_half_is_a_hit() -> Any:
    def f1_many(predictions: Any, truths: Any) -> dict[str, float]:
        hits = found_all = wanted_all = 0
        for found, wanted in zip(predictions, truths, strict=True):
            hits += sum(any(overlap(p, t) >= 0.5 for t in wanted) for p in found)
            found_all, wanted_all = found_all + len(found), wanted_all + len(wanted)
        precision, recall = hits / max(1, found_all), hits / max(1, wanted_all)
        return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall)}

    return subject({}, metric=f1_many)


@fault("E12", stage="evaluation")
def failures_are_filtered_before_the_mean() -> Any:
    def score(predictions: Any, truths: Any) -> dict[str, float]:
        usable = [(p, t) for p, t in zip(predictions, truths, strict=True) if p]
        if not usable:
            return {"f1": 0.0}
        return {"f1": f1([p for p, _ in usable], [t for _, t in usable])["f1"]}

    return subject({}, metric=score)


@fault("E13", stage="evaluation")
def the_bases_generation_config_samples(folder: Path) -> Any:
    model = model_of("qwen2_vl")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 1.0
    model.generation_config.top_p = 0.9
    return subject({}, model=model, settings={"max_new_tokens": 256})


@fault("E08", stage="evaluation")
def the_base_was_asked_in_another_way(folder: Path) -> Any:
    """Two evaluations side by side, whose manifests differ in pixels and prompt."""
    rng = np.random.default_rng(131)
    for which, spread, found in (("base", 40.0, {"max_pixels": 50_176}), ("tuned", 4.0, {"max_pixels": 1_003_520})):
        rows = []
        for number, scene in enumerate(scenes(40, 131)):
            boxes = [shifted(b, rng, spread) for b in scene.boxes]
            rows.append({"id": number, "text": as_json(boxes, scene.labels), "boxes": boxes, "truth": scene.boxes})
        write_predictions(folder / "eval" / which, rows)
        prompt = "Detect objects." if which == "base" else "Locate every cup, plate and sign as JSON."
        settings = {"prompt": prompt, "dtype": "bfloat16", "max_new_tokens": 256, "min_pixels": 3136} | found
        (folder / "eval" / which / "manifest.json").write_text(json.dumps(settings))
    return subject({}, run_dir=str(folder))


@fault("E11", stage="evaluation")
def two_models_ranked_by_twenty_pictures(folder: Path) -> Any:
    rng = np.random.default_rng(132)
    for which in ("model_a", "model_b"):
        rows = []
        for number, scene in enumerate(scenes(20, 132)):
            boxes = [shifted(b, rng, 9.0) for b in scene.boxes if rng.random() > 0.2]
            rows.append(
                {"id": number, "text": as_json(boxes, scene.labels[: len(boxes)]), "boxes": boxes, "truth": scene.boxes}
            )
        write_predictions(folder / "eval" / which, rows)
    return subject(
        {}, run_dir=str(folder), settings={"eval_samples": 20, "selection_split": "val", "report_split": "val"}
    )


@fault("E07", stage="evaluation")
def answers_that_never_stop(folder: Path) -> Any:
    """Texts alone, as a notebook wrote them: the whole list again and again."""
    rows = []
    for number, scene in enumerate(scenes(36, 133)):
        once = as_json(scene.boxes, scene.labels)
        text = once * 9 if scene.boxes else once
        boxes = scene.boxes * 9
        rows.append(
            {"id": number, "text": text, "boxes": boxes, "truth": scene.boxes, "new_tokens": 256 if boxes else 3}
        )
    return subject({}, run_dir=str(write_predictions(folder, rows)), settings={"max_new_tokens": 256})


@fault("D03", stage="evaluation", also=("E14",))
def predictions_are_of_the_shrunken_picture(folder: Path) -> Any:
    """All boxes of a finished run are the true ones times 0.6 on both axes."""
    rng = np.random.default_rng(134)
    rows = []
    for number, scene in enumerate(scenes(60, 134)):
        boxes = [[round(float(v * 0.6 + rng.normal(0, 1.5)), 1) for v in box] for box in scene.boxes]
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
    return subject({}, run_dir=str(write_predictions(folder, rows)))


@fault("C08", stage="evaluation")
def the_model_always_says_the_same_box(folder: Path) -> Any:
    rows = []
    for number, scene in enumerate(scenes(48, 135, most=1, negatives=False)):
        w, h = scene.width, scene.height
        boxes = [[round(0.25 * w), round(0.25 * h), round(0.7 * w), round(0.7 * h)]]
        truth = [list(box) for box in scene.boxes]
        text = '[{"bbox_2d": [250, 250, 700, 700], "label": "cup"}]'
        rows.append({"id": number, "width": w, "height": h, "text": text, "boxes": boxes, "truth": truth})
    return subject({}, run_dir=str(write_predictions(folder, rows)))


@fault("E15", stage="evaluation")
def a_metric_that_drops_labels_in_its_first_line() -> Any:
    def metric(predictions: Any, truths: Any) -> float:
        plain = [[item["bbox"] for item in row] for row in predictions]
        wanted = [[item["bbox"] for item in row] for row in truths]
        return f1(plain, wanted)["f1"]

    return subject(team.fields(), metric=metric)


@fault("E17", stage="evaluation")
def a_parser_that_guesses_the_order_from_the_numbers() -> Any:
    """If the third number is smaller than the first it must be a width, else a corner; here it also swaps wide boxes."""

    def parse(text: str) -> list[list[int]]:
        out = []
        for item in json.loads(text):
            a, b, c, d = item["bbox_2d"]
            if c - a > d - b:  # "boxes are upright in our data"
                a, b, c, d = b, a, d, c
            out.append([a, b, c, d])
        return out

    return subject(llava.fields(), parse=parse)


@fault("S01", stage="serving")
def only_the_last_adapter_of_two_was_merged(folder: Path) -> Any:
    from peft import PeftModel

    one = write_adapter(folder / "stage1")
    two = write_adapter(folder / "stage2", r=4)
    after_one = PeftModel.from_pretrained(model_of("qwen2_vl"), str(one)).merge_and_unload()
    after_one.save_pretrained(folder / "after_stage1")
    PeftModel.from_pretrained(model_of("qwen2_vl"), str(two)).merge_and_unload().save_pretrained(folder / "merged")
    processor_of("qwen2_vl").save_pretrained(folder / "merged")
    artefacts = {"adapter": str(two), "base": str(folder / "after_stage1"), "merged": str(folder / "merged")}
    return subject({}, artefacts=artefacts)


@fault("S02", stage="serving")
def a_merge_that_changed_nothing(folder: Path) -> Any:
    """Merged into rounded weights: the file is the base's again."""
    adapter = write_adapter(folder / "adapter")
    model_of("qwen2_vl").save_pretrained(folder / "merged")
    processor_of("qwen2_vl").save_pretrained(folder / "merged")
    artefacts = {"adapter": str(adapter), "base": str(folder_of("qwen2_vl")), "merged": str(folder / "merged")}
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "merge_dtype": "bfloat16"}
    return subject({}, artefacts=artefacts, settings=settings)


@fault("S03", stage="serving")
def a_shard_that_the_index_names_is_not_there(folder: Path) -> Any:
    model_of("qwen2_5_vl").save_pretrained(folder / "merged", max_shard_size="400KB")
    sorted((folder / "merged").glob("model-*.safetensors"))[-1].unlink()
    processor_of("qwen2_5_vl").save_pretrained(folder / "merged")
    return subject({}, artefacts={"merged": str(folder / "merged")})


@fault("S04", stage="serving", also=("V01",))
def the_server_is_started_with_its_own_pixels(folder: Path) -> Any:
    processor_of("qwen2_vl", max_pixels=1_003_520).save_pretrained(folder / "train_processor")
    config = {"model": "/srv/boxes", "mm_processor_kwargs": {"min_pixels": 3136, "max_pixels": 150_528}}
    (folder / "server.json").write_text(json.dumps(config))
    artefacts = {"train_processor": str(folder / "train_processor"), "server_config": str(folder / "server.json")}
    return subject({}, artefacts=artefacts)


@fault("S05", stage="serving", also=("C03",))
def the_server_asks_another_question() -> Any:
    fields = coco3.fields()
    more = {"user_prompt": coco3.INSTRUCTION, "serve_user_prompt": "Where are the cups? Give boxes."}
    return subject(fields, settings=fields["settings"] | more)


@fault("S06", stage="serving")
def merger_and_tower_are_in_the_adapter_that_is_served(folder: Path) -> Any:
    adapter = write_adapter(folder / "lora", family="qwen2_5_vl", target_modules=r".*visual.*(qkv|gate_proj|mlp\.0)")
    (folder / "serve.json").write_text(
        json.dumps({"enable_lora": True, "lora_modules": [f"a={adapter}"], "engine": "vllm"})
    )
    return subject({}, artefacts={"adapter": str(adapter), "server_config": str(folder / "serve.json")})


@fault("S07", stage="serving")
def no_generation_config_and_another_end_in_the_config(folder: Path) -> Any:
    processor = processor_of("qwen2_5_vl")
    model_of("qwen2_5_vl").save_pretrained(folder / "merged")
    (folder / "merged" / "generation_config.json").unlink()
    path = folder / "merged" / "config.json"
    config = json.loads(path.read_text())
    pad = processor.tokenizer.pad_token_id
    for part in (config, config.get("text_config", {})):
        if "eos_token_id" in part:
            part["eos_token_id"] = pad
    path.write_text(json.dumps(config))
    processor.save_pretrained(folder / "merged")
    return subject({}, processor=processor, artefacts={"merged": str(folder / "merged")})


@fault("S09", stage="serving")
def one_picture_a_thousand_times(folder: Path) -> Any:
    """A load test whose log tells of one picture and of failed requests counted as done."""
    rows = [
        {"id": n, "image": "kitchen_001.jpg", "status": 200 if n % 3 else 500, "seconds": 0.04, "text": "[]"}
        for n in range(120)
    ]
    write_predictions(folder, rows, "requests.jsonl")
    summary = {"requests": 120, "wall_seconds": 1.7, "images_per_second": 70.6}
    (folder / "summary.json").write_text(json.dumps(summary))
    return subject({}, run_dir=str(folder))


@fault("T06", stage="serving", also=("S04",))
def the_tokenizer_beside_the_adapter_has_other_tokens(folder: Path) -> Any:
    trained = processor_of("qwen2_vl")
    trained.tokenizer.add_tokens(["<cup>", "<plate>"], special_tokens=True)
    trained.save_pretrained(folder / "train_processor")
    adapter = write_adapter(folder / "adapter")
    processor_of("qwen2_vl").save_pretrained(adapter)
    artefacts = {"adapter": str(adapter), "train_processor": str(folder / "train_processor")}
    return subject({}, artefacts=artefacts)
