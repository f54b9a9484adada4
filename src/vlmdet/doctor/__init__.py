"""Says why a fine-tune fails, with evidence from the user's own rows, code and files: `examine(Subject(…))`."""

from vlmdet.doctor.examine import examine
from vlmdet.doctor.findings import Checked, Finding, NotRun, Report
from vlmdet.doctor.subject import Subject

__all__ = ["Checked", "Finding", "NotRun", "Report", "Subject", "examine"]
