"""Labels of hand-made batches: one token a character, control tokens above 200."""

from __future__ import annotations

import pytest

from vlmdet.doctor.checks.mask import (
    Difference,
    Row,
    Span,
    Tokens,
    above_ordinary,
    compare,
    constant_share,
    control_masked,
    find_answers,
    show,
)

CONTROL = {200: "<|end|>", 201: "<|start|>", 202: "<|box|>", 203: "<|pic|>", 204: "<|pad|>"}
TOKENS = Tokens(
    pieces=lambda one: CONTROL.get(one) or chr(one),
    ends=frozenset({200}),
    control=frozenset(CONTROL),
    pictures=frozenset({203}),
    pad=204,
    ordinary=200,
)


def ids(text: str) -> list[int]:
    for number, name in CONTROL.items():
        text = text.replace(name, chr(number))
    return [ord(letter) for letter in text]


PROMPT = "<|start|>u\n<|pic|><|pic|>find a<|end|>\n<|start|>a\n"
ANSWER = "<|box|>(1,22)"


def make(prompt: str, answers: list[str], learnt: str, *, pad: int = 0, left: bool = False, joint: str = "\n") -> Row:
    """Build a row; `learnt` has one sign a token: 1 where it carries loss."""
    body = ids(prompt) + [one for answer in answers for one in [*ids(answer), 200, *ids(joint)]]
    labels = [one if sign == "1" else -100 for one, sign in zip(body, learnt, strict=True)]
    padding, ignored = [204] * pad, [-100] * pad
    whole = padding + body if left else body + padding
    marks = ignored + labels if left else labels + ignored
    mask = [0] * pad + [1] * len(body) if left else [1] * len(body) + [0] * pad
    return Row("row", tuple(whole), tuple(marks), tuple(mask), tuple(answers))


N, A = len(ids(PROMPT)), len(ids(ANSWER))
RIGHT = "0" * N + "1" * A + "1" + "0"


def look(learnt: str, **more: object) -> Difference:
    return compare(make(PROMPT, [ANSWER], learnt, **more), TOKENS)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"pad": 5}, {"pad": 5, "left": True}])
def test_answer_and_end_token_are_right(more: dict[str, object]) -> None:
    assert look(RIGHT, **more).right
    assert look("0" * N + "1" * A + "1" + "1", **more).right  # the template's newline


def test_each_difference_is_seen() -> None:
    assert look("0" * len(RIGHT)).none
    assert look("0" * N + "1" * A + "00").ends == 1
    # the newline before the answer belongs to the template, as the one behind it does
    prompt = look("1" * len(RIGHT))
    assert len(prompt.extra) == N - 1 and len(prompt.pictures) == 2 and not prompt.right
    cut = look("0" * N + "0" + "1" * (A - 1) + "10")
    assert cut.missing == (N,) and cut.ends == 0
    assert look("0" * N + "1" * A + "10").supervised == A + 1


def test_padding_that_is_the_end_token_hides_nothing() -> None:
    row = make(PROMPT, [ANSWER], RIGHT)
    masked = Row(
        "row",
        row.ids,
        tuple(-100 if one == 200 else label for one, label in zip(row.ids, row.labels, strict=True)),
        row.mask,
        (ANSWER,),
    )
    assert compare(masked, TOKENS).ends == 1


def test_an_answer_without_an_end_token_at_all() -> None:
    whole = tuple(ids(PROMPT + ANSWER))
    row = Row("row", whole, (-100,) * N + whole[N:], (1,) * len(whole), (ANSWER,))
    found = compare(row, TOKENS)
    assert found.absent == 1 and found.ends == 0


def test_two_turns() -> None:
    body = PROMPT
    second = "<|start|>u\nmore<|end|>\n<|start|>a\n"
    whole = ids(body) + ids("one<|end|>\n") + ids(second) + ids("two<|end|>\n")
    row = Row("row", tuple(whole), tuple([-100] * (len(whole) - 5) + whole[-5:]), (1,) * len(whole), ("one", "two"))
    assert compare(row, TOKENS).turns == (False, True)
    assert find_answers(row, TOKENS)[0] == Span(N, N + 3, N + 3)


def test_the_answers_words_in_the_prompt_are_no_answer() -> None:
    row = make("say (1,22) here ", ["(1,22)"], "0" * 16 + "1" * 7 + "0")
    assert compare(row, TOKENS).right
    early = make("say (1,22) here ", ["(1,22)"], "0000" + "1" * 6 + "0" * 14)
    found = compare(early, TOKENS)
    assert len(found.extra) == 6 and len(found.missing) == 6


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_labels(by: int) -> None:
    row = make(PROMPT, [ANSWER], RIGHT)
    moved = list(row.labels[by:]) + [-100] if by == 1 else [-100, *row.labels[:-1]]
    found = compare(Row("row", row.ids, tuple(moved), row.mask, row.answers), TOKENS)
    assert found.shifted == by and not found.right


def test_what_kind_of_token_is_masked() -> None:
    no_control = "0" * N + "0" + "1" * (A - 1) + "00"
    row = make(PROMPT, [ANSWER], no_control)
    assert control_masked(row, TOKENS, compare(row, TOKENS)) == (True, False)
    assert above_ordinary(row, TOKENS, compare(row, TOKENS))
    digits = "0" * N + "00101100"[:A] + "00"
    digits = "0" * N + "".join("1" if one.isdigit() else "0" for one in ["?", *ANSWER[len("<|box|>") :]]) + "00"
    row = make(PROMPT, [ANSWER], digits)
    assert control_masked(row, TOKENS, compare(row, TOKENS)) == (False, True)
    assert not above_ordinary(row, TOKENS, compare(row, TOKENS))


def test_a_decoders_labels() -> None:
    row = Row("row", (), (*ids(ANSWER), 200, -100), (), (ANSWER,))
    assert compare(row, TOKENS).right
    assert compare(Row("row", (), (*ids(ANSWER), -100, -100), (), (ANSWER,)), TOKENS).ends == 1
    assert compare(Row("row", (), (*ids("(9,9)"), 200), (), (ANSWER,)), TOKENS).missing


def test_an_answer_that_was_cut_is_lost() -> None:
    row = make(PROMPT, [ANSWER], RIGHT)
    assert compare(Row("row", row.ids[: N + 3], row.labels[: N + 3], row.mask[: N + 3], (ANSWER,)), TOKENS).lost == 1


def test_share_of_tokens_that_are_the_same_in_every_row() -> None:
    one = make("ab", ["x1"], "111110")
    two = make("ab", ["y22"], "1111110")
    assert constant_share([one, two]) == pytest.approx(2 / 5.5)
    assert constant_share([one]) == 0.0


def test_shown_with_marks_and_short_runs() -> None:
    row = make("<|pic|><|pic|><|pic|><|pic|>", ["(1)"], "0000" + "1111" + "0")
    assert show(row, TOKENS) == "<|pic|><|pic|>(×4)⟦(1)<|end|>⟧\n"
