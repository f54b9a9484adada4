"""Would the user's freeze policy act if names were as they once were, or as they are in another family?

When: for M06, where everything trains once the trainer is built. The trainer is built again while the user's own code,
and no library, is shown other names of parameters and parts. What it then freezes, it means to freeze, and does not.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlmdet.doctor.calls import NotAvailable, UserCodeError, _foreign
from vlmdet.doctor.evidence import Evidence

NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "as before transformers 4.52": (
        (r"(^|\.)model\.visual\.", r"\1visual."),
        (r"(^|\.)model\.vision_tower\.", r"\1vision_tower."),
        (r"(^|\.)model\.multi_modal_projector\.", r"\1multi_modal_projector."),
        (r"(^|\.)model\.language_model\.", r"\1model."),
    ),
    "as in families with a vision_tower": (
        (r"(^|\.)model\.visual\.merger\.", r"\1multi_modal_projector."),
        (r"(^|\.)model\.(visual|vision_model)\.", r"\1vision_tower."),
        (r"(^|\.)model\.connector\.", r"\1multi_modal_projector."),
        (r"(^|\.)model\.(language_model|text_model)\.", r"\1language_model.model."),
    ),
}
"""How names are shown: patterns and what they become."""

PARTS = {
    "visual": ("visual", "vision_tower", "vision_model"),
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "language_model": ("language_model", "text_model"),
}
"""Parts that code asks a model for, and what they may be called in its inner model."""


def frozen_under_other_names(evidence: Evidence) -> tuple[str, list[str]] | None:
    """Build the trainer again under other names; return which, and the parameters (by their true names) that it then freezes."""
    from vlmdet.doctor.live.trainer import build

    for told, pairs in NAMES.items():
        try:
            with _shown(lambda name, pairs=pairs: _rename(name, pairs)):  # type: ignore[misc]
                built = build(evidence)
        except (UserCodeError, NotAvailable):
            continue
        frozen = [name for name, one in built.model.named_parameters() if not one.requires_grad]
        if frozen:
            return told, frozen
    return None


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in pairs:
        name = re.sub(pattern, new, name)
    return name


@contextlib.contextmanager
def _shown(rename: Callable[[str], str]) -> Iterator[None]:
    """Show other names to the user's own code for the time of the block."""
    parameters, modules = nn.Module.named_parameters, nn.Module.named_modules

    def named_parameters(self: Any, *args: Any, **keywords: Any) -> Any:
        own = not _foreign(sys._getframe(1).f_code.co_filename)
        return ((rename(name) if own else name, one) for name, one in parameters(self, *args, **keywords))

    def named_modules(self: Any, *args: Any, **keywords: Any) -> Any:
        own = not _foreign(sys._getframe(1).f_code.co_filename)
        return ((rename(f"{name}.")[:-1] if own else name, one) for name, one in modules(self, *args, **keywords))

    def part(self: Any, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            inner = self._modules.get("model")
            if name in PARTS and inner is not None and not _foreign(sys._getframe(1).f_code.co_filename):
                for one in PARTS[name]:
                    if one in inner._modules:
                        return inner._modules[one]
            raise

    nn.Module.named_parameters, nn.Module.named_modules = named_parameters, named_modules  # type: ignore[method-assign, assignment]
    PreTrainedModel.__getattr__ = part  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.named_parameters, nn.Module.named_modules = parameters, modules  # type: ignore[method-assign]
        del PreTrainedModel.__getattr__
