"""Grounding codecs: one file per model family, boxes to its text and back; prompts; resize rules.

When: ALWAYS; no torch.
"""

from __future__ import annotations

from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.grounding import florence2, internvl, paligemma, plain_json, qwen2_5_vl, qwen2_vl, qwen3_vl
from vlmdet.grounding.codec import Codec, Parsed, ParseProblem, View

CODECS: dict[str, Codec] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "paligemma": paligemma,
    "florence2": florence2,
    "internvl": internvl,
    "plain_json": plain_json,
}

PIXEL_CODECS = frozenset({"qwen2_5_vl"})
"""Codecs whose numbers are pixels of the resized picture: they need a `View` of the real processor's size."""


def get_codec(name: str) -> Codec:
    """Return the codec of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown codec '{name}'", did_you_mean(name, CODECS))
    return CODECS[name]


__all__ = ["CODECS", "PIXEL_CODECS", "Codec", "ParseProblem", "Parsed", "View", "get_codec"]
