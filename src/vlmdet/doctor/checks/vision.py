"""Checks of the stage vision."""

from __future__ import annotations

from vlmdet.doctor.checks import Check

CHECKS: tuple[Check, ...] = ()
