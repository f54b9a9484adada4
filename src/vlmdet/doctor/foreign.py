"""Which id of the catalogue an exception of user code is, by the part that raised and by what it says.

When: wherever user code raised instead of answering.
"""

from __future__ import annotations

import re

from vlmdet.doctor.calls import UserCodeError
from vlmdet.doctor.catalogue import ENTRIES
from vlmdet.doctor.checks import found
from vlmdet.doctor.findings import Finding

USUAL = {
    "convert": "D15",
    "collate": "C06",
    "render": "C03",
    "parse": "E01",
    "decode": "E05",
    "metric": "E01",
    "build_trainer": "M02",
    "template": "T01",
    "trainer": "M08",
    "model": "V05",
}
"""Part that raised to the id where its text says nothing more."""

WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("aspect ratio",), "D17"),
    (("flat list", "nested list"), "C06"),
    (("truncat", "max_length"), "T09"),
    (
        (
            "features and image tokens",
            "image features",
            "tokens do not match",
            "mismatch in `image`",
            "mismatch in image",
        ),
        "V05",
    ),
    (
        ("rgba", "image mode", "cannot identify image", "cannot write mode", "channel dimension", "number of channels"),
        "D07",
    ),
    (("placeholder", "number of images", "images in the text", "image tokens"), "C05"),
)
"""Words of an exception's text (any of them) to an id, the first that fits; for converters, renderers and collators."""

_BUILDING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("features and image tokens", "image features"), "V05"),
    (("target modules", "target_modules"), "M04"),
    (("second time", "multiple adapters", "already exists"), "M03"),
    (("is not supported",), "M05"),
    (("empty parameter list", "no trainable", "does not require grad", "not require grad"), "M01"),
    (("require grad", "requires_grad"), "M08"),
    (
        ("save_steps", "save steps", "saving steps", "load_best_model_at_end", "evaluation strategy", "eval_steps"),
        "O05",
    ),
    (("assistant_only_loss",), "L12"),
    (("columns",), "O07"),
)

_PART = re.compile(
    r"(model|generation|causallm)' object has no attribute '\w*(vis|vit|language|text_model|merger|layers|project|tower)"
)
"""Parts of a model that freeze policies reach for, and that other releases and families call otherwise."""


def identifier_of(error: UserCodeError) -> str:
    """Return the id that fits an exception of user code best."""
    low = " ".join(str(error.error).split()).lower()  # the whole: what matters may stand at the end of a long text
    if error.what in ("build_trainer", "trainer"):
        if isinstance(error.error, AttributeError) and _PART.search(low):
            return "M06"
        for words, identifier in _BUILDING:
            if any(word in low for word in words):
                if identifier == "M04" and "not supported" in low:
                    return "M05"
                return "M08" if identifier == "M01" and error.what == "trainer" else identifier
        return USUAL[error.what]
    if error.what in ("convert", "collate", "render", "model", "template"):
        for words, identifier in WORDS:
            if any(word in low for word in words):
                return identifier
    if error.what == "collate":
        if isinstance(error.error, (KeyError, AttributeError)):
            return "D15"
        if isinstance(error.error, StopIteration) or "out of range" in low or "not enough values" in low:
            return "C05"
    return USUAL.get(error.what, "D15")


def foreign_finding(error: UserCodeError) -> Finding:
    """Make a finding of an exception of user code, at the user's own line."""
    identifier = identifier_of(error)
    severity = ENTRIES[identifier].severity
    shown = f"{error.where}\n    {error.line}\n{error.text}" if error.line else f"{error.where}\n{error.text}"
    return found(
        identifier,
        where=error.where + (f", on {error.subject}" if error.subject else ""),
        evidence=shown,
        cause=f"your {error.what} raised {error.text}",
        severity=max(severity, 3) if error.what in ("convert", "collate", "build_trainer", "trainer") else severity,
        certainty=0.9,
    )
