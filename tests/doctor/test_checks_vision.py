"""Checks of the stage vision on user-style collators, each with one fault; and on healthy ones, which must stay silent."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLImageProcessor

from vlmdet.doctor import Subject
from vlmdet.doctor.checks.vision import CHECKS
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.models.tiny import TINY_DIR

torch.set_num_threads(1)  # as in the process that checks run in

SIZES = ((640, 480), (480, 640), (800, 450), (300, 400))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 255, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(cells, np.ones((40, 40, 1), np.uint8))[:height, :width])


def make_rows(sizes: tuple[tuple[int, int], ...] = SIZES, number: int = 5) -> list[dict[str, Any]]:
    rows = []
    for i in range(number):
        boxes = [[20 + 30 * j, 30 + 20 * j, 120 + 30 * j + i, 160 + 20 * j] for j in range(1 + i % 3)]
        objects = {"bbox": boxes, "category": ["logo"] * len(boxes)}
        rows.append({"image": picture(*sizes[i % len(sizes)], seed=i), "objects": objects})
    return rows


ROWS = make_rows()


def convert(row: dict[str, Any]) -> dict[str, Any]:
    width, height = row["image"].size
    boxes = row["objects"]["bbox"]
    answer = "; ".join(
        f"logo {x1 * 1000 // width},{y1 * 1000 // height},{x2 * 1000 // width},{y2 * 1000 // height}"
        for x1, y1, x2, y2 in boxes
    )
    question = [{"type": "image"}, {"type": "text", "text": "Detect every logo."}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"messages": messages, "images": [row["image"]]}


def make_processor(low: int = 56 * 56, high: int = 1_003_520, **more: Any) -> Any:
    processor = AutoProcessor.from_pretrained(TINY_DIR)
    processor.image_processor = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high}, **more)
    return processor


PROCESSOR = make_processor()


def make_collate(
    processor: Any = PROCESSOR,
    *,
    before: Callable[[Image.Image], Any] = lambda image: image,
    order: Callable[[list[Any]], list[Any]] = lambda images: images,
    after: Callable[[Any], Any] = lambda batch: batch,
    **more: Any,
) -> Callable[[list[Any]], Any]:
    def collate(examples: list[Any]) -> Any:
        texts = [processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
        images = order([before(one["images"][0]) for one in examples])
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True, **more)
        batch["labels"] = batch["input_ids"].clone()
        return after(batch)

    return collate


def examined(*ids: str, **fields: Any) -> dict[str, dict[str, Any]]:
    """Run the checks of the ids and return the findings by id."""
    given = {
        "rows": ROWS,
        "convert": convert,
        "processor": PROCESSOR,
        "collate": make_collate(),
        "box_format": "xyxy/pixel",
    }
    evidence = Evidence(Subject(**{name: value for name, value in {**given, **fields}.items() if value is not None}))
    results = [one for check in CHECKS if not ids or set(ids) & set(check.ids) for one in run_check(check, evidence)]
    broken = [values for kind, values in results if kind == "not_run" and "itself failed" in values["needs"]]
    assert not broken
    return {values["id"]: values for kind, values in results if kind == "finding"}


def with_key(key: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(batch: Any) -> Any:
        batch[key] = change(batch)
        return batch

    return changed


# ---- healthy --------------------------------------------------------------------------------------------------------


def asked_plainly(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": row["image"]}, {"type": "text", "text": "Detect every logo."}],
        }
    ]


def through_utils(examples: list[Any], **options: Any) -> Any:
    from qwen_vl_utils.vision_process import fetch_image

    texts = [PROCESSOR.apply_chat_template(one["messages"], tokenize=False) for one in examples]
    patch = options.pop("image_patch_size", 14)
    images = [fetch_image({"image": one["images"][0], **options}, image_patch_size=patch) for one in examples]
    batch = PROCESSOR(text=texts, images=images, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].clone()
    return batch


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"render": asked_plainly},
        {"settings": {"max_pixels": 1_003_520, "eval_max_pixels": 1_003_520, "packing": False}},
        {"processor": make_processor(784, 50_176), "collate": make_collate(make_processor(784, 50_176))},
        {"collate": through_utils},
        {
            "processor": AutoProcessor.from_pretrained(TINY_DIR),
            "collate": make_collate(AutoProcessor.from_pretrained(TINY_DIR)),
        },
    ],
    ids=["plain", "render", "settings", "small", "qwen_vl_utils", "tiny"],
)
def test_healthy(fields: dict[str, Any]) -> None:
    assert examined(**fields) == {}


@pytest.mark.parametrize("side", ["left", "right"])
def test_healthy_padding(side: str) -> None:
    processor = make_processor()
    processor.tokenizer.padding_side = side
    assert examined(processor=processor, collate=make_collate(processor)) == {}


def test_healthy_trl() -> None:
    collator = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForVisionLanguageModeling
    assert examined(collate=collator(PROCESSOR)) == {}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_healthy_qwen(kind: str, family_base: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(family_base(kind))
    assert examined(processor=processor, collate=make_collate(processor), model=str(family_base(kind))) == {}


@pytest.mark.parametrize("kind", ["internvl", "idefics3"])
def test_healthy_without_grids(kind: str, other_base: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(other_base(kind))

    def collate(examples: list[Any]) -> Any:
        texts = [processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
        images = [[one["images"][0]] for one in examples]
        return processor(text=texts, images=images, return_tensors="pt", padding=True)

    assert examined(processor=processor, collate=collate, model=str(other_base(kind))) == {}


@pytest.mark.parametrize("kind", ["paligemma", "florence2"])
def test_healthy_prefix_suffix(kind: str, other_base: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(other_base(kind))

    def as_pair(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prefix": "detect logo",
            "suffix": convert(row)["messages"][1]["content"][0]["text"],
            "image": row["image"],
        }

    def collate(examples: list[Any]) -> Any:
        mark = "<image>" if kind == "paligemma" else ""
        texts = [mark + one["prefix"] for one in examples]
        images = [one["image"] for one in examples]
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
        answers = processor.tokenizer([one["suffix"] for one in examples], return_tensors="pt", padding=True)
        batch["labels"] = answers["input_ids"]
        return batch

    assert examined(convert=as_pair, processor=processor, collate=collate, model=str(other_base(kind))) == {}


# ---- V01, V02, V03, V04, V12: sizes ---------------------------------------------------------------------------------


def test_v01_settings_of_evaluation_differ() -> None:
    found = examined("V01", settings={"max_pixels": 1_003_520, "eval_max_pixels": 200_704})["V01"]
    assert "max_pixels=1003520" in found["evidence"] and "eval_max_pixels=200704" in found["evidence"]
    assert "640 x 480" in found["evidence"] or "800 x 450" in found["evidence"] or "480 x 640" in found["evidence"]


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"max_pixels": 1_003_520}, "serve": {"max_pixels": 200_704}},
        {"max_pixels": 1_003_520, "base_max_pixels": 602_112},
        {"min_pixels": 3136, "eval": {"min_pixels": 401_408}},
        {"max_pixels": 1_003_520, "mm_processor_kwargs": {"max_pixels": 200_704}},
        {"image_size": 896, "eval_image_size": 448},
    ],
)
def test_v01_settings_alone(settings: dict[str, Any]) -> None:
    assert "V01" in examined("V01", rows=None, convert=None, processor=None, collate=None, settings=settings)


@pytest.mark.parametrize(
    "collate",
    [
        make_collate(size={"shortest_edge": 3136, "longest_edge": 100_352}),
        make_collate(make_processor(3136, 100_352)),
        make_collate(make_processor(1_003_520, 2_007_040)),
    ],
)
def test_v01_collator_and_processor(collate: Any) -> None:
    found = examined("V01", collate=collate)["V01"]
    assert "your collator makes grid (1, " in found["evidence"] and "your processor" in found["evidence"]


def asked_small(row: dict[str, Any]) -> list[dict[str, Any]]:
    part = {"type": "image", "image": row["image"], "max_pixels": 50_176}
    return [{"role": "user", "content": [part, {"type": "text", "text": "Detect every logo."}]}]


def asked_resized(row: dict[str, Any]) -> list[dict[str, Any]]:
    return asked_plainly({"image": row["image"].resize((224, 224))})


@pytest.mark.parametrize("render", [asked_small, asked_resized])
def test_v01_render(render: Any) -> None:
    assert "at inference" in examined("V01", render=render)["V01"]["evidence"]


def test_v01_saved_processor(tmp_path: Path) -> None:
    limits = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 200_704}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    assert "200,704" in examined("V01", artefacts={"merged": tmp_path})["V01"]["evidence"]


@pytest.mark.parametrize(
    "fields",
    [
        {"settings": {"max_pixels": 200_704}},
        {"settings": {"max_pixels": 200_704}, "collate": None},
        {"settings": {"max_pixels": 2_007_040}},
    ],
)
def test_v02(fields: dict[str, Any]) -> None:
    # a picture of 4:3 with 1,003,520 pixels: 30 x 41 image tokens, 840 x 1148 pixels
    assert (
        "(1, 60, 82), 1148 x 840 pixels = 964,320 pixels, 1,230 image tokens"
        in examined("V02", **fields)["V02"]["evidence"]
    )


def test_v02_is_obeyed() -> None:
    processor = make_processor(3136, 200_704)
    assert examined("V02", processor=processor, collate=make_collate(processor), settings={"max_pixels": 200_704}) == {}


def test_v02_the_call_is_not_obeyed() -> None:
    class Deaf(Qwen2VLImageProcessor):
        def preprocess(self, images: Any, **more: Any) -> Any:
            return super().preprocess(images, **{**more, "size": {"shortest_edge": 3136, "longest_edge": 1_003_520}})

    processor = make_processor()
    processor.image_processor = Deaf()
    collate = make_collate(processor, size={"shortest_edge": 3136, "longest_edge": 200_704})
    assert "in your collator's call" in examined("V02", processor=processor, collate=collate)["V02"]["evidence"]
    assert examined("V02", collate=make_collate(size={"shortest_edge": 3136, "longest_edge": 200_704})) == {}


def shrunk(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((500, 500))
    return image


def convert_shrunk(row: dict[str, Any]) -> dict[str, Any]:
    return {**convert(row), "images": [shrunk(row["image"])]}


@pytest.mark.parametrize(
    ("fields", "who"),
    [
        ({"collate": make_collate(before=shrunk)}, "your collator"),
        ({"convert": convert_shrunk}, "your converter"),
        (
            {"collate": lambda examples: through_utils(examples, image_patch_size=16, max_pixels=196_000)},
            "your collator",
        ),
    ],
)
def test_v03(fields: dict[str, Any], who: str) -> None:
    assert who in examined("V03", **fields)["V03"]["cause"]


def test_v03_shrunk_and_enlarged_again_to_the_size_it_would_have_had() -> None:
    processor = make_processor(700 * 700, 700 * 700)  # one number of pixels for every picture

    def small(image: Image.Image) -> Image.Image:
        return image.resize((image.width // 4, image.height // 4))

    lost = examined("V03", processor=processor, collate=make_collate(processor, before=small))["V03"]
    assert lost["severity"] == 3
    assert examined("V03", processor=processor, collate=make_collate(processor)) == {}


def test_v03_a_bias_that_relative_boxes_forgive_is_loud_only() -> None:
    collate = make_collate(before=lambda image: image.resize((image.width - 20, image.height - 20)))
    assert examined("V03", collate=collate)["V03"]["severity"] == 2


def test_v04() -> None:
    processor = make_processor(3136, 12_845_056)
    rows = make_rows(((1600, 1200),), 3)  # 57 x 43 image tokens
    found = examined("V04", rows=rows, processor=processor, collate=None)["V04"]
    assert "2,451 image tokens at the median" in found["evidence"]


def test_v12_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PIXELS", "200704")
    found = examined("V12", "V01", collate=make_collate(size={"shortest_edge": 3136, "longest_edge": 200_704}))
    assert "MAX_PIXELS=200704" in found["V12"]["evidence"] and found["V01"]["consequence_of"] == "V12"
    processor = make_processor(3136, 200_704)
    assert examined("V12", processor=processor, collate=make_collate(processor)) == {}


def test_v12_set_by_the_collator(monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(examples: list[Any]) -> Any:
        monkeypatch.setenv("MAX_PIXELS", "200704")
        return make_collate(size={"shortest_edge": 3136, "longest_edge": 200_704})(examples)

    monkeypatch.setenv("MAX_PIXELS", "")
    assert "V12" in examined("V12", collate=collate)


def test_v12_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("qwen_vl_utils.vision_process")
    monkeypatch.setattr(module, "MAX_PIXELS", 200_704, raising=False)
    assert "vision_process.MAX_PIXELS=200704" in examined("V12")["V12"]["evidence"]


def test_v12_saved_without_limits(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    assert "V12" in examined("V12", settings={"max_pixels": 1_003_520}, artefacts={"merged": tmp_path})


# ---- V05, V06, V07, V11: numbers, order, colours --------------------------------------------------------------------


def cut(batch: Any) -> Any:
    for key in ("input_ids", "attention_mask", "labels"):
        batch[key] = batch[key][:, :100]
    return batch


def test_v05() -> None:
    found = examined("V05", collate=make_collate(after=cut))["V05"]
    assert "so in" in found["evidence"] and "the row is 100 tokens long" in found["evidence"]


def backwards(batch: Any) -> Any:
    lengths = [int(one.prod()) for one in batch["image_grid_thw"]]
    return torch.cat(torch.split(batch["pixel_values"], lengths)[::-1])


def of_the_next_row(row: dict[str, Any]) -> dict[str, Any]:
    place = next(i for i, one in enumerate(ROWS) if one["image"] is row["image"])
    return {**convert(row), "images": [ROWS[(place + 1) % len(ROWS)]["image"]]}


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        (
            {"collate": make_collate(after=lambda batch: {k: v for k, v in batch.items() if k != "pixel_values"})},
            "not hand pictures",
        ),
        (
            {"collate": make_collate(after=with_key("pixel_values", lambda batch: 0 * batch["pixel_values"]))},
            "constant",
        ),
        ({"collate": make_collate(before=lambda image: picture(*image.size))}, "same pixels"),
        ({"collate": make_collate(order=lambda images: images[::-1])}, "order"),
        ({"collate": make_collate(order=lambda images: images[:1] * len(images))}, "another row's"),
        ({"collate": make_collate(after=with_key("pixel_values", backwards))}, ""),
        ({"convert": of_the_next_row}, "other rows"),
    ],
    ids=["missing", "zero", "same", "reversed", "first", "pixels reversed", "converter"],
)
def test_v06(fields: dict[str, Any], cause: str) -> None:
    assert cause in examined("V06", **fields)["V06"]["cause"]


def test_v06_explains_rows_that_change() -> None:
    assert examined("V06", "V11", collate=make_collate(order=lambda images: images[::-1])).keys() == {"V06"}


def without_attention(batch: Any) -> Any:
    return batch["attention_mask"] * (batch["input_ids"] != PROCESSOR.image_token_id)


def test_v06_a_picture_that_is_masked_out() -> None:
    found = examined("V06", collate=make_collate(after=with_key("attention_mask", without_attention)))
    assert "exactly the same after a red and after a blue picture" in found["V06"]["evidence"]


def as_fractions(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 255


IMAGENET = make_processor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
BARE = make_processor(do_normalize=False)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"collate": make_collate(before=lambda image: Image.fromarray(np.asarray(image)[..., ::-1].copy()))}, "BGR"),
        ({"collate": make_collate(before=as_fractions)}, "twice"),
        ({"collate": make_collate(do_rescale=False)}, "not divided by 255"),
        ({"collate": make_collate(IMAGENET), "processor": IMAGENET}, "ImageNet"),
        ({"collate": make_collate(BARE), "processor": BARE}, "between 0 and 1"),
        ({"collate": make_collate(before=lambda image: image.convert("L").convert("RGB"))}, "colour"),
    ],
    ids=["BGR", "rescaled twice", "not rescaled", "ImageNet", "not normalised", "grey"],
)
def test_v07(fields: dict[str, Any], cause: str) -> None:
    assert cause in examined("V07", **fields)["V07"]["cause"]


def together(examples: list[Any], *, cut_to_shortest: bool) -> Any:
    batches = [make_collate()([one]) for one in examples]
    length = min(one["input_ids"].shape[1] for one in batches) if cut_to_shortest else None
    pictures = ("pixel_values", "image_grid_thw")
    return {
        key: torch.cat([one[key] for one in batches])
        if key in pictures
        else torch.stack([one[key][0][:length] for one in batches])
        for key in batches[0]
    }


@pytest.mark.parametrize("cut_to_shortest", [False, True])
def test_v11(cut_to_shortest: bool) -> None:
    found = examined("V11", collate=lambda examples: together(examples, cut_to_shortest=cut_to_shortest))["V11"]
    assert ("tokens alone" if cut_to_shortest else "raised RuntimeError") in found["evidence"]


# ---- V08, V09, V10: positions, calls, packing -----------------------------------------------------------------------


def flat_positions(batch: Any) -> Any:
    rows, columns = batch["input_ids"].shape
    return torch.arange(columns).expand(rows, columns)


@pytest.mark.parametrize(
    ("fields", "evidence"),
    [
        (
            {
                "collate": make_collate(
                    after=with_key("image_grid_thw", lambda batch: batch["image_grid_thw"][:, [0, 2, 1]])
                )
            },
            "image_grid_thw",
        ),
        ({"collate": make_collate(after=with_key("position_ids", flat_positions))}, "one axis"),
        (
            {"collate": make_collate(after=with_key("mm_token_type_ids", lambda batch: 0 * batch["input_ids"]))},
            "mm_token_type_ids is 0",
        ),
        ({"settings": {"transformers_version": "4.55.2"}}, "4.55.2"),
    ],
)
def test_v08(fields: dict[str, Any], evidence: str) -> None:
    assert evidence in examined("V08", **fields)["V08"]["evidence"]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(TINY_DIR)


def broken(model: Any, change: Callable[[type[Any]], type[Any]]) -> Any:
    model = copy.deepcopy(model)
    model.model.__class__ = change(type(model.model))
    return model


def test_v08_model(model: Any) -> None:
    def change(kind: type[Any]) -> type[Any]:
        class Exchanged(kind):  # type: ignore[misc]
            def get_rope_index(self, ids: Any, image_grid_thw: Any = None, **more: Any) -> Any:
                return super().get_rope_index(ids, image_grid_thw=image_grid_thw[:, [0, 2, 1]], **more)

        return Exchanged

    assert "rows 0 to" in examined("V08", model=broken(model, change))["V08"]["evidence"]
    assert examined("V08", "V09", model=model) == {}


def test_v09(model: Any) -> None:
    def change(kind: type[Any]) -> type[Any]:
        class Stale(kind):  # type: ignore[misc]
            kept: Any = None

            def get_rope_index(self, ids: Any, **more: Any) -> Any:
                """Use the offset of the first call for every later one."""
                positions, deltas = super().get_rope_index(ids, **more)
                if self.kept is None:
                    self.kept = deltas
                    return positions, deltas
                return torch.arange(ids.shape[1]).expand(3, len(ids), -1) + self.kept, self.kept

        return Stale

    assert "then" in examined("V09", model=broken(model, change))["V09"]["evidence"]


def packed(batch: Any) -> Any:
    real = batch["attention_mask"].bool()
    flat = {key: batch[key][real][None] for key in ("input_ids", "labels")}
    return {**flat, "pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}


def test_v10() -> None:
    assert "packing=True" in examined("V10", settings={"packing": True})["V10"]["evidence"]
    found = examined("V10", collate=make_collate(after=packed))["V10"]
    assert "logits of the second row differ" in found["evidence"]
    assert examined("V10") == {}


def test_v10_borders_of_the_wrong_type() -> None:
    borders = with_key("cu_seqlens", lambda batch: batch["attention_mask"].sum(1).cumsum(0))
    assert "cu_seqlens is torch.int64" in examined("V10", collate=make_collate(after=borders))["V10"]["evidence"]
