"""Grounding codecs: one file per model family, boxes to its text and back; prompts; resize rules.

When: ALWAYS; no torch.
"""

from __future__ import annotations

from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.grounding import qwen2_vl
from vlmdet.grounding.codec import Codec, Parsed, ParseProblem, View

CODECS: dict[str, Codec] = {"qwen2_vl": qwen2_vl}


def get_codec(name: str) -> Codec:
    """Return the codec of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown codec '{name}'", did_you_mean(name, CODECS))
    return CODECS[name]


__all__ = ["CODECS", "Codec", "ParseProblem", "Parsed", "View", "get_codec"]
