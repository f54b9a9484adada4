"""Faults of what the model gets to see."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.bases import MIN_PIXELS, processor_of
from benchmarks.faults.homes import coco3, cookbook, llava, team
from benchmarks.faults.registry import fault, subject


@fault("V01", stage="vision")
def the_evaluation_sees_a_quarter_of_the_pixels() -> Any:
    fields = team.fields()
    settings = fields["settings"] | {"eval_min_pixels": MIN_PIXELS, "eval_max_pixels": 28 * 28 * 12}
    return subject(fields, settings=settings)


@fault("V03", stage="vision")
def the_converter_shrinks_and_the_processor_enlarges_again() -> Any:
    """200 pixels at the long side by the converter, then a lower bound of the processor above that."""
    processor = processor_of("qwen2_vl", min_pixels=300 * 300, max_pixels=600 * 600)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        small = row["image"].copy()
        small.thumbnail((200, 200))
        return example | {"image": small}

    return subject(cookbook.fields(), convert=convert, processor=processor)


@fault("V04", stage="vision")
def no_ceiling_for_large_photographs() -> Any:
    """The published ceiling of 12,845,056 pixels, and photographs of two million."""
    processor = processor_of("qwen2_vl", min_pixels=3136, max_pixels=12_845_056)
    rows = cookbook.dataset(8, 41)
    for row in rows:
        factor = 1900 // max(row["image"].size)
        row["image"] = row["image"].resize((row["width"] * factor, row["height"] * factor), 0)
        row["objects"]["bbox"] = [[v * factor for v in box] for box in row["objects"]["bbox"]]
        row["width"], row["height"] = row["image"].size
    settings = {"model_type": "qwen2_vl", "per_device_train_batch_size": 4}
    return subject(
        cookbook.fields(), rows=rows, processor=processor, settings=settings, decode=None, parse=None, metric=None
    )


@fault("V06", stage="vision")
def the_pixels_are_an_empty_canvas() -> Any:
    """`convert("RGB")` of a new picture of the same size instead of the picture."""
    from PIL import Image

    class Blank(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> Any:
            canvas = Image.new("RGB", sample["image"].size)
            return super().one(sample | {"image": canvas})

    return subject(llava.fields(), collate=Blank)


@fault("V06", stage="vision")
def pictures_are_sorted_by_size_and_texts_are_not() -> Any:
    """Same sizes, so nothing crashes: the pictures of a batch go to other rows than their own."""
    processor = processor_of("qwen3_vl")
    rows = coco3.coco_rows(12, 42, negatives=False)
    for row in rows:
        w, h = row["image"].size
        for ann in row["annotations"]:
            x, y, bw, bh = ann["bbox"]
            ann["bbox"] = [x * 192 / w, y * 192 / h, bw * 192 / w, bh * 192 / h]
        row["image"] = row["image"].resize((192, 192))
        row["width"] = row["height"] = 192
    inner = coco3.PromptLengthCollator(processor)

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = inner(features)
        pictures = sorted((f["images"][0] for f in features), key=lambda image: image.tobytes())
        batch["pixel_values"] = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch

    return subject(coco3.fields(), rows=rows, processor=processor, collate=collate)


@fault("V07", stage="vision")
def read_by_opencv_in_blue_green_red() -> Any:
    import numpy as np
    from PIL import Image

    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            turned = []
            for example in examples:
                pixels = np.asarray(example["image"].convert("RGB"))[:, :, ::-1]
                turned.append(example | {"image": Image.fromarray(np.ascontiguousarray(pixels))})
            return super().__call__(turned)

    return subject(cookbook.fields(), collate=Collator)


@fault("V07", stage="vision")
def fractions_are_divided_by_255_again() -> Any:
    import numpy as np

    processor = processor_of("qwen2_5_vl")
    inner = team.make_collate(processor)

    def collate(batch: list[dict[str, Any]]) -> Any:
        scaled = [np.asarray(item["images"][0], dtype=np.float32) / 255.0 for item in batch]
        out = inner(batch)
        out["pixel_values"] = processor.image_processor(images=scaled, return_tensors="pt")["pixel_values"]
        return out

    return subject(team.fields(), processor=processor, collate=collate)


@fault("V05", stage="vision")
def room_for_pictures_is_reckoned_without_the_merger() -> Any:
    class Turns(llava.TurnCollator):
        def __init__(self, processor: Any, model: Any = None, side: str = "left") -> None:
            super().__init__(processor, model, side)
            self.merge = 2

    return subject(llava.fields(), collate=Turns)


@fault("V12", stage="vision")
def max_pixels_by_the_environment_and_never_saved(folder: Any) -> Any:
    """The run was made under MAX_PIXELS=50176; the saved processor has the default."""
    processor = processor_of("qwen2_vl", max_pixels=12_845_056)
    processor.save_pretrained(folder)
    settings = {"model_type": "qwen2_vl", "env": {"MAX_PIXELS": "50176"}, "max_pixels": 50_176}
    return subject({}, settings=settings, artefacts={"processor": str(folder)})
