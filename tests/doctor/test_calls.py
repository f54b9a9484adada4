"""Foreign code is called with whatever signature it has, and what it returns is read in whatever usual form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlmdet.doctor.calls import NotAvailable, UserCodeError, as_boxes, build_collator, call_parse, number_of
from vlmdet.doctor.gather.options import Options
from vlmdet.doctor.gather.text_boxes import boxes_in, read_space, syntax_of

PROCESSOR = SimpleNamespace(tokenizer="T")


class ByKeyword:
    def __init__(self, model: Any, processor: Any = None, max_length: int = 5) -> None:
        self.got = (model, processor, max_length)

    def __call__(self, examples: Any) -> Any:
        return (self.got, examples)


class ByOther:
    def __init__(self, proc: Any, mdl: Any) -> None:
        self.got = (proc, mdl)

    def __call__(self, examples: Any) -> Any:
        return (self.got, examples)


class NeedsLength:
    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.got = (tokenizer, max_length)

    def __call__(self, examples: Any) -> Any:
        return (self.got, examples)


def function(examples: Any) -> Any:
    return ("function", examples)


def with_processor(examples: Any, processor: Any) -> Any:
    return (processor, examples)


def factory(processor: Any) -> Any:
    return lambda batch: (processor, batch)


@pytest.mark.parametrize(
    ("collate", "got"),
    [
        (function, "function"),
        (with_processor, PROCESSOR),
        (factory, PROCESSOR),
        (ByKeyword, ("M", PROCESSOR, 5)),
        (ByOther, (PROCESSOR, "M")),
        (NeedsLength, ("T", 77)),
        (ByOther(1, 2), (1, 2)),
    ],
)
def test_collators_of_every_make(collate: Any, got: Any) -> None:
    built = build_collator(collate, processor=PROCESSOR, model="M", settings={"max_length": 77})
    assert built([1]) == (got, [1])


@pytest.mark.parametrize(
    ("parse", "got"),
    [
        (lambda text: (text,), ("t",)),
        (lambda text, width, height: (text, width, height), ("t", 640, 480)),
        (lambda t, a, b: (t, a, b), ("t", 640, 480)),
        (lambda text, size: (text, size), ("t", (640, 480))),
        (lambda text, image_width=1, image_height=1: (text, image_width, image_height), ("t", 640, 480)),
        (lambda text, strict=True: (text, strict), ("t", True)),
    ],
)
def test_parsers_of_every_signature(parse: Any, got: Any) -> None:
    assert call_parse(parse, "t", 640, 480) == got


BOX = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ([BOX], None),
        (BOX, None),
        (np.array([BOX]), None),
        ([tuple(BOX)], None),
        ([{"bbox_2d": BOX, "label": "a"}], "a"),
        ([{"box": BOX, "class": "a"}], "a"),
        ({"boxes": [BOX], "labels": ["a"]}, "a"),
        (([BOX], ["a"]), "a"),
        ([("a", BOX)], "a"),
        ([[*BOX, "a"]], "a"),
        ([((1, 2), (3, 4))], None),
        (SimpleNamespace(boxes=SimpleNamespace(xyxy=np.array([BOX])), labels=["a"]), "a"),
    ],
)
def test_boxes_of_every_form(value: Any, label: str | None) -> None:
    assert as_boxes(value) == [(label, BOX)]


def test_no_boxes_and_no_known_form() -> None:
    assert as_boxes(None) == as_boxes([]) == as_boxes(np.zeros((0, 4))) == []
    with pytest.raises(NotAvailable):
        as_boxes("text")


def test_main_figure_of_a_metric() -> None:
    assert (
        number_of(0.5)
        == number_of(np.float32(0.5))
        == number_of((0.5, 1))
        == number_of({"n": 3, "mean_iou": 0.5})
        == 0.5
    )
    with pytest.raises(NotAvailable):
        number_of("none")


def test_a_line_of_the_users_own_file() -> None:
    def bad(text: str) -> Any:
        return int(text)

    with pytest.raises(UserCodeError) as caught:
        call_parse(bad, "x", 1, 1)
    assert caught.value.where.startswith(f"{__file__}:") and caught.value.where.endswith(", in bad")
    assert caught.value.line == "return int(text)"


@pytest.mark.parametrize(
    ("text", "boxes", "syntax"),
    [
        (
            "<|object_ref_start|>logo<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>",
            [(10, 20, 30, 40)],
            "qwen2_vl",
        ),
        (
            '[{"bbox_2d": [10, 20, 30, 40], "label": "cup 2"}, {"bbox_2d": [1, 2, 3, 4.5], "label": "b"}]',
            [(10, 20, 30, 40), (1, 2, 3, 4.5)],
            "json",
        ),
        ("<loc0010><loc0020><loc0030><loc0040> cup", [(10, 20, 30, 40)], "paligemma"),
        ("cup<loc_10><loc_20><loc_30><loc_40>", [(10, 20, 30, 40)], "florence2"),
        ("<ref>cup</ref><box>[[10, 20, 30, 40]]</box>", [(10, 20, 30, 40)], "internvl"),
        ("x1: 10, y1: 20, x2: 30, y2: 40", [(10, 20, 30, 40)], None),
        ("a box at [0.1, 0.2, 0.3, 0.4].", [(0.1, 0.2, 0.3, 0.4)], "list"),
        ("(-5, 20), (30, 40)", [(-5, 20, 30, 40)], "parentheses"),
        ("none", [], None),
    ],
)
def test_boxes_in_any_text(text: str, boxes: list[tuple[float, ...]], syntax: str | None) -> None:
    assert [one.numbers for one in boxes_in(text)] == boxes
    assert syntax_of(text) == syntax


def test_space_of_numbers() -> None:
    truth = [np.array([[0.1, 0.2, 0.5, 0.4]]), np.array([[0.3, 0.1, 0.4, 0.9], [0.0, 0.5, 0.2, 0.6]])]
    sizes = [(640, 480), (300, 600)]
    per_mille = [one * 1000 for one in truth]
    space = read_space(per_mille, truth, sizes)
    assert space is not None and str(space) == "xyxy/per_mille" and space.iou == pytest.approx(1) and space.boxes == 3
    turned = read_space([one[:, [1, 0, 3, 2]] for one in per_mille], truth, sizes)
    assert turned is not None and str(turned) == "yxyx/per_mille"
    original = read_space([one * np.tile(size, 2) for one, size in zip(truth, sizes, strict=True)], truth, sizes)
    assert original is not None and str(original) == "xyxy/pixel"
    assert read_space([np.zeros((0, 4))], [truth[0]], [(1, 1)]) is None


def test_options_under_any_name() -> None:
    options = Options(
        {"lr": 1e-4, "train": {"max_pixels": 100, "system_prompt": "a"}, "eval": {"max_pixels": 200}, "maxlen": 1}
    )
    assert options.get("learning_rate") == 1e-4
    assert options.get("max_pixels") == 100 and options.get("max_pixels", phase="eval") == 200
    assert options.get("max_pixels", phase="serve") is None
    assert options.shown("learning_rate") == "lr=0.0001"
    assert Options({"eval_max_pixels": 7}).get("max_pixels", phase="eval") == 7
    assert "max_length" not in options and not Options(None)
