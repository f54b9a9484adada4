"""Texts of a data set, made safe to show on a line.

When: wherever a label or an id is printed or drawn; standard library only.
"""

from __future__ import annotations

import unicodedata

LONGEST_LINE = 80
"""Characters that are kept of a label or an id."""


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Make any text one short line: controls, half surrogates and line ends become blanks, a long one gets an ellipsis.

    When: for every text of a data set that goes to a terminal or onto a picture: an escape sequence in a label must not
    reach the terminal.
    """
    visible = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text[: 4 * longest])
    line = " ".join(visible.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
