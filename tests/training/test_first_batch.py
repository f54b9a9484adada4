"""The page of the first batch shows exactly the mask, and its check finds what is wrong with labels of any collator."""

from __future__ import annotations

import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.collators import Qwen2VLCollatorV1, Qwen2VLCollatorV2, Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages
from vlmdet.errors import TrainingError
from vlmdet.models.loader import load_processor
from vlmdet.training.first_batch import check_first_batch, write_first_batch

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
HOSTILE = "<script>alert(1)</script>"
NAMES = ["first & <b>foremost</b>", "second"]


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor("tiny", **LIMITS)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """A picture of 280 x 280 pixels, seen as 224 x 224 (64 tokens), with one box; one of 56 x 112 (8 tokens) with none."""
    labels = [HOSTILE, "白血球 é"]
    boxes = Boxes.from_array([[0.25, 0.25, 0.75, 0.75], [0, 0, 0.5, 0.1]], FRACTIONS, 1, 1)
    return [
        {
            "id": "a",
            "image": Image.new("RGB", (280, 280), "white"),
            "messages": build_messages(labels, boxes=boxes, labels=labels, size=(280, 280)),
        },
        {
            "id": "b",
            "image": Image.new("RGB", (56, 112), "white"),
            "messages": build_messages(labels, boxes=Boxes.empty()),
        },
    ]


class Tokens(HTMLParser):
    """Collect the text of every `<pre>`, apart what stands in `<mark>`; counts stand in `<i>`."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.all: list[str] = []
        self.marked: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in ("wbr", "meta", "img", "source"):
            self.stack.append(tag)
        if tag == "pre":
            self.all.append("")
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "pre" in self.stack and "i" not in self.stack:
            self.all[-1] += data
            self.marked[-1] += data if "mark" in self.stack else ""


def write(path: Path, processor: Any, rows: list[dict[str, Any]], **changes: Any) -> str:
    batch = Qwen2VLCollatorV3(processor, **LIMITS)(rows)
    keywords = {"pictures": [row["image"] for row in rows], "codec": "qwen2_vl"} | changes
    return write_first_batch(path / "train" / "page.html", batch, processor, NAMES, **keywords).read_text()


def test_marked_is_what_carries_loss(processor: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write(tmp_path, processor, rows)
    seen = Tokens()
    seen.feed(page)
    answers = [row["messages"][-1]["content"][0]["text"] + "<|im_end|>" for row in rows]
    assert [text.replace("⏎\n", "\n") for text in seen.marked] == answers
    assert "<|im_start|>user" in seen.all[0]
    assert "<|im_start|>assistant" in seen.all[0]
    assert seen.all[0].count("<|image_pad|>") == 1
    assert "<i>×64</i>" in page
    assert "<i>×8</i>" in page


def test_figures_are_those_of_the_batch(processor: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    batch = Qwen2VLCollatorV3(processor, **LIMITS)(rows)
    page = write(tmp_path, processor, rows)
    tiles = {what: value for value, what in re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', page)}
    tokens, learnt = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert tiles == {
        "rows": "2",
        "tokens": str(tokens),
        "image tokens": "72",
        "tokens with loss": str(learnt),
        "of all tokens": f"{100 * learnt / tokens:.1f}%",
        "padding": str(batch["input_ids"].numel() - tokens),
    }
    assert "280 x 280 pixels, seen as 224 x 224; 2 boxes;" in page
    assert "56 x 112 pixels, seen as 56 x 112; 0 boxes;" in page


def test_nothing_of_the_data_becomes_markup(processor: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write(tmp_path, processor, rows, findings=[f"x: {HOSTILE}"])
    seen = Tokens()
    seen.feed(page)
    assert not seen.tags & {"script", "link", "iframe"}
    assert "<b>foremost" not in page
    assert HOSTILE not in page
    assert HOSTILE in unescape(page)
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", page)
    assert "default-src 'none'" in unescape(page)
    assert "\ufffd" not in page  # letters of several tokens are put together


def test_boxes_are_drawn_from_the_labels(processor: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import base64

    page = write(tmp_path, processor, rows)
    first = re.search(r"data:image/jpeg;base64,([^\"]+)", page)
    assert first is not None
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))).convert("RGB")).astype(int)
    assert drawn.shape == (224, 224, 3)
    red = (drawn[..., 0] - drawn[..., 1]) > 100
    assert red[56:168, 56].mean() > 0.9  # the left side of the box from a quarter to three quarters
    assert red[100:120, 80:150].mean() < 0.1  # nothing within it
    unread = write(tmp_path, processor, rows, codec="qwen2_5_vl")
    assert "no boxes: qwen2_5_vl cannot read it" in unread


def test_pictures_in_storage_form(processor: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[0]["image"].save(tmp_path / "a.png")
    stored = [{"path": str(tmp_path / "a.png"), "bytes": None}, rows[1]["image"]]
    assert "280 x 280 pixels, seen as 224 x 224; 2 boxes;" in write(tmp_path, processor, rows, pictures=stored)
    with pytest.raises(ValueError, match="zip"):
        write(tmp_path, processor, rows, pictures=stored[:1])


def test_a_good_batch_has_no_findings(processor: Any, rows: list[dict[str, Any]]) -> None:
    for collator in (Qwen2VLCollatorV3(processor, **LIMITS), Qwen2VLCollatorV2(processor, **LIMITS)):
        assert check_first_batch(collator(rows), processor, ["a", "b"], collator=collator) == []


def test_loss_on_all_text_is_reported_and_not_refused(processor: Any, rows: list[dict[str, Any]]) -> None:
    collator = Qwen2VLCollatorV1(processor, **LIMITS)
    found = check_first_batch(collator(rows), processor, ["a", "b"], collator=collator)
    assert found == [
        f"{name}: the last token that carries loss is '\\n', not <|im_end|>; <|im_end|> before it does"
        for name in ("a", "b")
    ]


def blank(batch: Any) -> None:
    batch["labels"][1] = -100


def learn_the_picture(batch: Any) -> None:
    place = batch["input_ids"] == batch["input_ids"][0][batch["mm_token_type_ids"][0] == 1][0]
    batch["labels"][place] = batch["input_ids"][place]


def learn_the_padding(batch: Any) -> None:
    batch["labels"][1] = batch["input_ids"][1]


def forget_the_end(batch: Any) -> None:
    for labels in batch["labels"]:
        labels[(labels != -100).nonzero()[-1]] = -100


def shift(batch: Any) -> None:
    batch["labels"] = batch["labels"].roll(-1, dims=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (blank, "b: no token carries loss"),
        (learn_the_picture, "a: 64 tokens that stand for a picture carry loss"),
        (learn_the_padding, r"b: \d+ padding tokens carry loss"),
        (forget_the_end, r"a: the last token that carries loss is '<\|box_end\|>', not <\|im_end\|>$"),
        (shift, "a: a label is not the token at its place"),
    ],
)
def test_spoilt_labels_are_found(processor: Any, rows: list[dict[str, Any]], spoil: Any, message: str) -> None:
    batch = Qwen2VLCollatorV3(processor, **LIMITS)(rows)
    spoil(batch)
    found = check_first_batch(batch, processor, ["a", "b"], collator=object())
    assert re.search(message, found[0])
    with pytest.raises(TrainingError, match="the first batch's labels are wrong"):
        check_first_batch(batch, processor, ["a", "b"])
