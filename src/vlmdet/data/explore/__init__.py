"""Look at a data set before anything is built on it: figures, charts, and a page of pictures with their boxes.

When: ONCE, by `vlmdet inspect` and the first notebook; no torch. `summary.py` counts, `charts.py` and `page.py` draw what
was counted.
"""

from __future__ import annotations

from vlmdet.data.explore.summary import FAMILIES, Limits, Summary, check_limits, format_summary, summarise

__all__ = ["FAMILIES", "Limits", "Summary", "check_limits", "format_summary", "summarise"]
