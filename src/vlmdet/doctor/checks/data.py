"""Checks of the rows as they lie there."""

from __future__ import annotations

from vlmdet.doctor.checks import Check

CHECKS: tuple[Check, ...] = ()
