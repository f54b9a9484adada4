"""Texts of a data set on one line."""

from __future__ import annotations

import pytest

from vlmdet.utils.text import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("white blood cell", "white blood cell"),
        ("  a\n\tb\r\n", "a b"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("a\ud800b", "a b"),
        ("a\u202eb", "a b"),  # an override of the direction of writing
        ("Nährwerte 营养成分", "Nährwerte 营养成分"),
        ("", ""),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 79 + "…"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_megabyte_is_cut_before_it_is_read() -> None:
    assert one_line("\n" * 1_000_000 + "x", 10) == ""
    assert one_line("xy" * 1_000_000, 10) == "xyxyxyxyx…"
