"""What the figures come to, in one plain sentence a split, with what they are figures of.

When: AFTER, first thing on the report. Nothing is computed: the interval of a difference is that of comparison.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmdet.report.reading import Run, Scored, Split, mapping, number_of, sequence

METRICS = {
    "f1_50": "F1@0.5",
    "f1": "F1@[.5:.95]",
    "precision_50": "precision@0.5",
    "recall_50": "recall@0.5",
    "mean_best_iou": "mean best IoU",
    "mean_matched_iou": "mean matched IoU",
    "detection_rate": "detection rate",
    "boxes_per_image": "boxes per picture",
    "count_error": "count error",
    "correct_empty_rate": "correct-empty rate",
    "parse_failure_rate": "parse failures",
    "off_list_rate": "off-list labels",
    "duplicate_rate": "duplicates",
    "truncation_rate": "truncated answers",
    "error_rate": "errors",
}
"""Names of figures in results.json, and how they are called on the page; in this order."""

NAMES = {"base": "base", "base_native": "base, own prompt", "tuned": "tuned"}
"""How the models of a run are called on the page."""


_FIRST = "95\u00a0% interval "  # said once in a sentence


@dataclass(frozen=True)
class Pair:
    """A paired difference of comparison.json: b - a."""

    metric: str
    difference: Mapping[str, Any]
    separable: bool


def called(model: Scored) -> str:
    """Return how a model is called on the page."""
    return NAMES.get(model.name, model.name)


def plain(value: object, digits: int = 3) -> str:
    """Write a figure: `0.938`; a dash where it is undefined."""
    number = number_of(value)
    return "–" if number is None else f"{number:.{digits}f}".replace("-", "−")


def span(figure: Mapping[str, Any], digits: int = 3) -> str:
    """Write the interval of a figure: `0.892 to 0.980`; nothing where there is none."""
    low, high = figure.get("low"), figure.get("high")
    if number_of(low) is None or number_of(high) is None:
        return ""
    return f"{plain(low, digits)} to {plain(high, digits)}"


def signed(value: object) -> str:
    """Write a difference: `+0.938`, `−0.010`."""
    number = number_of(value)
    return f"+{number:.3f}" if number is not None and number > 0 else plain(value)


def find_pairs(split: Split, a: str, b: str) -> dict[str, Pair]:
    """Return the differences b - a by metric; empty where comparison.json has none of these two."""
    found = {}
    for pair in sequence(split.comparison.get("pairs")):
        pair = mapping(pair)
        difference, metric = mapping(pair.get("difference")), str(pair.get("metric"))
        if (pair.get("a"), pair.get("b")) == (a, b) and number_of(difference.get("value")) is not None:
            found[metric] = Pair(metric, difference, pair.get("separable", difference.get("separable")) is True)
    return found


def verdict(split: Split, folder: str) -> str:
    """Say in one sentence whether training helped.

    Input: a split with at least one model; `folder`, to name the next command.
    """
    main, base = split.main, split.base
    figure = mapping(mapping(main.results.get("figures")).get("f1_50"))
    n = mapping(main.results.get("meta")).get("n", figure.get("n"))
    where = f"On {n} pictures of the split {split.name}"
    reached = f"F1@0.5 is {plain(figure.get('value'))}{_interval(figure, _FIRST)}"
    if base is None:
        return (
            f"{where}, the model {called(main)} was scored alone: {reached}. What training gained is not known until "
            f"the untuned base is scored too: vlmdet eval {folder} --base."
        )
    of_base = mapping(mapping(base.results.get("figures")).get("f1_50"))
    against = f"{reached} against {plain(of_base.get('value'))}{_interval(of_base)}"
    pair = find_pairs(split, base.name, main.name).get("f1_50")
    if pair is None:
        return (
            f"{where}, {against} of the untuned base. Whether that difference is more than chance is not known, since "
            f"there is no paired comparison: vlmdet eval {folder} --base writes comparison.json."
        )
    difference = f"the paired difference is {signed(pair.difference.get('value'))}{_interval(pair.difference)}"
    if not pair.separable:
        return (
            f"{where}, the {called(main)} model is not separable from its untuned base: {against}, and {difference}, "
            "an interval that covers 0."
        )
    word = "better" if (number_of(pair.difference.get("value")) or 0) > 0 else "worse"
    return (
        f"{where}, the {called(main)} model finds objects {word} than its untuned base: {against}; {difference}, and "
        "separable from 0."
    )


def tone(split: Split) -> str:
    """Tell how a verdict is marked: `better`, `worse` or `open`."""
    pair = find_pairs(split, split.base.name, split.main.name).get("f1_50") if split.base else None
    if pair is None or not pair.separable:
        return "open"
    return "better" if (number_of(pair.difference.get("value")) or 0) > 0 else "worse"


def native_note(split: Split) -> str:
    """Say what the base reaches in its own prompt; nothing where it was not asked."""
    native = next((model for model in split.models if model.name == "base_native"), None)
    if native is None or native is split.main:
        return ""
    figure = mapping(mapping(native.results.get("figures")).get("f1_50"))
    meta = mapping(native.results.get("meta"))
    prompt = f" (“{meta['user_prompt']}”)" if meta.get("user_prompt") else ""
    value = f"{plain(figure.get('value'))}{_interval(figure)}"
    return f"Asked in its own native prompt{prompt}, the base reaches F1@0.5 of {value} on {split.name}."


def conditions(run: Run, split: Split) -> Iterator[tuple[str, str]]:
    """List what the figures of a split are figures of: name and value."""
    meta = {**run.contract, **mapping(split.main.results.get("meta"))}
    decoding = meta.get("decoding")
    if isinstance(decoding, Mapping):
        decoding = ", ".join(f"{key} {value}" for key, value in decoding.items())
    sources = {str(row["score_source"]) for row in split.main.rows.values() if row.get("score_source")}
    yield "pictures", str(meta.get("n", "not recorded"))
    yield "split", split.name
    yield "base model", str(meta.get("base_model") or "not recorded")
    yield "codec", str(meta.get("codec_version") if "codec" not in meta else meta["codec"])
    if meta.get("system_prompt"):
        yield "system prompt", str(meta["system_prompt"])
    yield "prompt", str(meta.get("user_prompt") or "not recorded")
    yield "prompt version", str(meta.get("prompt_version") or "not recorded")
    yield "max_pixels", str(meta.get("max_pixels") or "not recorded")
    yield "decoding", str(decoding or "not recorded")
    yield "dtype", str(meta.get("dtype") or "not recorded")
    source = str(meta.get("score_source") or ", ".join(sorted(sources)))
    calibrated = meta.get("score_calibrated")  # what it was fitted on, false, or not recorded
    how = f", calibrated on the split {calibrated.get('split')}" if isinstance(calibrated, Mapping) else ""
    how = ", not calibrated" if calibrated is False else how
    yield "score_source", source + how if source else "none: boxes have no scores"
    for name, values in mapping(meta.get("allow")).items():
        yield f"--allow {name}", f"trained: {mapping(values).get('trained')}; now: {mapping(values).get('now')}"
    intervals = f"95 %, {meta['resamples']} resamples of pictures" if meta.get("resamples") else "95 %"
    yield "intervals", intervals


def _interval(figure: Mapping[str, Any], before: str = "") -> str:
    text = span(figure)
    return f" ({before}{text})" if text else ""
