"""Write the table of docs/doctor.md anew from the doctor's catalogue and its checks.

python scripts/write_doctor_page.py            # rewrites what stands between the two marks
python scripts/write_doctor_page.py --check    # exit code 1 where the page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmdet.doctor.catalogue import ENTRIES
from vlmdet.doctor.checks import STAGES, all_checks

PAGE = Path(__file__).parents[1] / "docs" / "doctor.md"
START, END = "<!-- table: scripts/write_doctor_page.py -->", "<!-- end of the table -->"


def evidence_of() -> dict[str, list[str]]:
    """Return for each id the first lines of the docstrings of the checks that settle it."""
    told: dict[str, list[str]] = {}
    for check in all_checks():
        line = " ".join((check.run.__doc__ or "").split("\n\n")[0].split())
        for identifier in check.ids:
            told.setdefault(identifier, []).append(line)
    return told


def table() -> str:
    """Return the tables of all stages, in Markdown."""
    told = evidence_of()
    parts = []
    for stage in STAGES:
        entries = [entry for entry in ENTRIES.values() if entry.stage == stage]
        parts.append(f"\n### {stage.capitalize()}\n")
        parts.append("| id | what you see | what is wrong | how it is looked at | what to do |")
        parts.append("|---|---|---|---|---|")
        for entry in entries:
            looked = "; ".join(dict.fromkeys(told.get(entry.id, []))) or f"**not checked**: it needs {entry.unchecked}"
            cells = (
                f"{entry.id} ({entry.severity})",
                entry.symptom,
                entry.title,
                looked,
                f"{entry.fix} ({entry.reference})",
            )
            parts.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    checked = sum(entry.id in told for entry in ENTRIES.values())
    return f"{checked} of the {len(ENTRIES)} rows of the catalogue are checked.\n" + "\n".join(parts) + "\n"


def main() -> int:
    """Rewrite or compare the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = f"{before}{START}\n\n{table()}\n{END}{after}"
    if args.check:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
