"""Checks of the stage template."""

from __future__ import annotations

from vlmdet.doctor.checks import Check

CHECKS: tuple[Check, ...] = ()
