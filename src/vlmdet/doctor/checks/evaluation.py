"""Checks of the stage evaluation."""

from __future__ import annotations

from vlmdet.doctor.checks import Check

CHECKS: tuple[Check, ...] = ()
