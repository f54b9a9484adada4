"""Constrained decoding: whatever the logits say, an answer parses and keeps to the labels; the rest is the model's choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmdet.boxes import Boxes
from vlmdet.data.dataset import build_messages, messages_of
from vlmdet.grounding import CODECS, View
from vlmdet.grounding.grammar import answer_pattern
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask
from vlmdet.models.constrain import Constraint, boxes_that_fit
from vlmdet.models.inference import hf_engine
from vlmdet.models.loader import load, make_contract
from vlmdet.models.processors import seen_size
from vlmdet.models.tiny import TINY_DIR
from vlmdet.records import Sample

VIEW = View(1000, 500, 1036, 504)
LABELS = ["cup", "cup holder", "a ; b", "plan (1,2)", "a<|im_end|>b", '"x"', "杯"]
LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_DIR)


def locating(codec: str) -> Any:
    """A tokenizer that has the location tokens of a family, as its own has, and each as one token."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(TINY_DIR)
    forms = {"paligemma": [f"<loc{i:04d}>" for i in range(1024)], "florence2": [f"<loc_{i}>" for i in range(1000)]}
    own.add_tokens(forms.get(codec, []))
    return own


def starts_of_none(tokenizer: Any) -> list[int]:
    return [token for word in ("n", "no", "non", "none") for token in tokenizer(word)["input_ids"][:1]]


@pytest.fixture(scope="module")
def ends(tokenizer: Any) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def write(constraint: Constraint, views: Sequence[View], logits: Any, *, steps: int = 2000) -> list[list[int]]:
    """Decode greedily from logits that do not depend on anything: `logits(step, rows)`."""
    choose = constraint.start(views)
    ids: list[list[int]] = [[] for _ in views]
    live = list(range(len(views)))
    for step in range(steps):
        tokens = choose(logits(step, len(live)), live, [ids[row] for row in live]).argmax(dim=-1).tolist()
        for row, token in zip(live, tokens, strict=True):
            ids[row].append(token)
        live = [row for row in live if ids[row][-1] not in constraint.ends]
        if not live:
            return ids
    raise AssertionError(f"no end after {steps} tokens")


def check(text: str, codec: str, labels: Sequence[str], view: View, max_boxes: int) -> int:
    parsed = CODECS[codec].parse(text, view)
    assert re.fullmatch(answer_pattern(codec, labels, view, max_boxes), text)
    assert parsed.status in ("ok", "none") and set(parsed.labels) <= set(labels)
    assert {problem.kind for problem in parsed.problems} <= {"zero_area"}
    return len(parsed.boxes)


@pytest.mark.parametrize("codec", CODECS)
def test_hostile_logits(codec: str, tokenizer: Any, ends: list[int]) -> None:
    """Noise, the end last of all: as many boxes as may be, spelled letter by letter; a row that rules out all that is allowed."""
    constraint = Constraint(tokenizer, codec=codec, labels=LABELS, max_boxes=3, ends=ends)
    generator = torch.Generator().manual_seed(0)
    views = [VIEW, View(100, 100, 56, 84), *[VIEW] * 6]

    def noise(step: int, rows: int) -> torch.Tensor:
        logits = torch.randn((rows, len(tokenizer) + 5), generator=generator)
        logits[:, ends] -= 100
        logits[:, starts_of_none(tokenizer)] -= 50
        logits[:1] -= torch.inf
        return logits

    counts = []
    for view, ids in zip(views, write(constraint, views, noise), strict=True):
        counts.append(check(tokenizer.decode(ids[:-1]), codec, LABELS, view, 3))
    assert max(counts) == 3


@pytest.mark.parametrize("codec", CODECS)
def test_the_end_is_allowed_where_an_answer_may_end_and_nowhere_else(codec: str, ends: list[int]) -> None:
    """Along an answer as it is written, in the tokens of training: each of them is allowed, at every step."""
    tokenizer = locating(codec)
    constraint = Constraint(tokenizer, codec=codec, labels=LABELS, max_boxes=2, ends=ends)
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]))
    for labels in (["cup", "cup holder"], ["plan (1,2)"], ["杯", "a<|im_end|>b"], []):
        text = CODECS[codec].encode(labels, boxes[: len(labels)], VIEW)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        choose = constraint.start([VIEW])
        for count in range(len(ids) + 1):
            flags = torch.isfinite(choose(torch.zeros(1, len(tokenizer)), [0], [ids[:count]]))[0]
            whole = re.fullmatch(answer_pattern(codec, LABELS, VIEW, 2), tokenizer.decode(ids[:count])) is not None
            assert flags[ends].tolist() == [whole] * 2
            assert count == len(ids) or flags[ids[count]]
        assert whole


def test_what_the_model_wants_stands_where_it_may(tokenizer: Any, ends: list[int]) -> None:
    constraint = Constraint(tokenizer, codec="qwen2_vl", labels=["cup"], max_boxes=2, ends=ends)
    text = CODECS["qwen2_vl"].encode(["cup"], Boxes(np.array([[0.1, 0.2, 0.3, 0.4]])), VIEW)
    wanted = [*tokenizer(text)["input_ids"], ends[0]]

    def logits(step: int, rows: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([wanted[step]] * rows), len(tokenizer)).float()

    assert write(constraint, [VIEW] * 2, logits) == [wanted] * 2
    flags = torch.isfinite(constraint.start([VIEW])(logits(0, 1), [0], [[]]))[0].nonzero()[:, 0].tolist()
    texts = {tokenizer.decode([token]) for token in flags}
    assert "<|object_ref_start|>" in texts and texts - {"<|object_ref_start|>"} <= {"n", "no", "non", "none"}


def test_a_row_that_has_ended_is_left_alone_with_its_padding(tokenizer: Any, ends: list[int]) -> None:
    constraint = Constraint(tokenizer, codec="florence2", labels=["cup"], max_boxes=2, ends=ends[:1], lead=[7, 8])
    choose = constraint.start([VIEW])
    none = tokenizer("none")["input_ids"]
    zeros = torch.zeros(1, len(tokenizer))
    assert torch.isfinite(choose(zeros, [0], [[]])).nonzero()[:, 1].tolist() == [7]
    assert torch.isfinite(choose(zeros, [0], [[7]])).nonzero()[:, 1].tolist() == [8]
    assert torch.isfinite(choose(zeros, [0], [[7, 8, *none]])).nonzero()[:, 1].tolist() == ends[:1]
    for more in ([ends[0]], [ends[0], ends[1]], [ends[0], ends[1], ends[1]]):
        assert torch.isfinite(choose(zeros, [0], [[7, 8, *none, *more]])).all()


@pytest.mark.parametrize(
    ("codec", "edges"), [("paligemma", ["<loc0000>", "<loc1023>"]), ("florence2", ["<loc_0>", "<loc_999>"])]
)
def test_location_tokens_are_single_tokens(codec: str, edges: list[str], ends: list[int]) -> None:
    own = locating(codec)
    first, last = own.convert_tokens_to_ids(edges)
    constraint = Constraint(own, codec=codec, labels=["cup", "cup holder"], max_boxes=2, ends=ends)
    generator = torch.Generator().manual_seed(1)

    def noise(step: int, rows: int) -> torch.Tensor:
        logits = torch.randn((rows, len(own)), generator=generator)
        logits[:, first : last + 1] -= 10  # where they are not the only way, another one is taken
        logits[:, [*ends, *starts_of_none(own)]] -= 100
        return logits

    answers = write(constraint, [VIEW] * 8, noise)
    counts = [check(own.decode(ids[:-1]), codec, ["cup", "cup holder"], VIEW, 2) for ids in answers]
    assert [sum(first <= token <= last for token in ids) for ids in answers] == [4 * count for count in counts]
    assert max(counts) == 2


@pytest.mark.parametrize("plain", [False, True], ids=["own loop", "generate"])
def test_an_untrained_model_answers_in_the_notation(small_base: Path, tmp_path: Path, plain: bool) -> None:
    """By itself it writes nothing that could be read; not to constrain it is the default."""
    loaded = load(str(small_base), **LIMITS)
    labels = ["sign", "red sign"]
    contract = make_contract(loaded, labels=labels, box_order="raster", max_new_tokens=250, data_fingerprint="")
    rng = np.random.default_rng(0)
    asks = []
    for i in range(4):
        file = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (60, 60 + 30 * i, 3), dtype=np.uint8)).save(file)
        view = plan_view(60 + 30 * i, 60, **LIMITS)
        asks.append(Ask(i, Sample(str(i), file, 60 + 30 * i, 60, Boxes.empty(), ()), build_messages(labels), view))
    free = dict(hf_engine(loaded, contract=contract, max_new_tokens=40, plain=plain)(asks))
    bound = dict(
        hf_engine(loaded, contract=contract, max_new_tokens=250, constrain=True, plain=plain, batch_size=3)(asks)
    )
    for ask in asks:
        one, other = free[ask.index], bound[ask.index]
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert CODECS["qwen2_vl"].parse(one.text, ask.view).status == "parse_failure"
        assert not other.truncated
        check(other.text, "qwen2_vl", labels, ask.view, 100)


def test_the_real_vocabulary(qwen_processor: Any) -> None:
    tokenizer = qwen_processor.tokenizer
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    labels = [f"kind {number}" for number in range(1200)]
    constraint = Constraint(tokenizer, codec="qwen3_vl", labels=labels, max_boxes=2, ends=ends)
    generator = torch.Generator().manual_seed(0)

    def noise(step: int, rows: int) -> torch.Tensor:
        logits = torch.randn((rows, 151_936), generator=generator)
        logits[:, ends] -= 100
        return logits

    for ids in write(constraint, [VIEW] * 2, noise):
        assert check(tokenizer.decode(ids[:-1]), "qwen3_vl", labels, VIEW, 2) in (0, 1, 2)


def test_boxes_that_fit_by_hand(tokenizer: Any) -> None:
    """Numbers of three digits are the longest but for 1000, which is rounded to only within half a step of the edge."""
    one = tokenizer(CODECS["qwen2_vl"].encode(["cup"], Boxes(np.full((1, 4), 0.9989)), VIEW))["input_ids"]
    for boxes in (1, 2, 5):
        assert boxes_that_fit(tokenizer, "qwen2_vl", ["cup"], boxes * len(one) + 1) == boxes
    assert boxes_that_fit(tokenizer, "qwen2_vl", ["cup"], 2 * len(one)) == 1  # no room for the end
    assert boxes_that_fit(tokenizer, "qwen2_vl", ["cup"], 3) == 1
    few, many = (boxes_that_fit(tokenizer, "qwen3_vl", labels, 250) for labels in (["cup", "x " * 30], ["cup"]))
    assert few < many


def test_what_makes_no_answer_is_refused(tokenizer: Any, ends: list[int]) -> None:
    for labels, boxes, stops in (([], 1, ends), (["cup"], 0, ends), (["cup"], 1, [])):
        with pytest.raises(ValueError):
            Constraint(tokenizer, codec="qwen2_vl", labels=labels, max_boxes=boxes, ends=stops)


@pytest.mark.parametrize("model_type", ["paligemma", "florence2", "internvl", "idefics3"])
def test_other_families(other_base: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    """By `generate`; Florence-2 has an encoder, and learnt to begin its answers with `<s>`."""
    folder = str(other_base(model_type))
    width, height = seen_size(AutoProcessor.from_pretrained(folder))
    loaded = load(folder, min_pixels=width * height, max_pixels=width * height)
    labels = ["cup", "red sign"]
    contract = make_contract(loaded, labels=labels, box_order="raster", max_new_tokens=300, data_fingerprint="")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    sample = Sample("0", tmp_path / "0.png", 80, 60, Boxes.empty(), ())
    ask = Ask(0, sample, messages_of(contract.system_prompt, contract.user_prompt), View(80, 60, width, height))
    ((_, answer),) = hf_engine(loaded, contract=contract, max_new_tokens=300, constrain=True)([ask])
    assert isinstance(answer, Answer) and not answer.truncated
    assert answer.text.startswith("<s>") == (model_type == "florence2")
    check(answer.text.removeprefix("<s>"), contract.codec, labels, ask.view, 100)
