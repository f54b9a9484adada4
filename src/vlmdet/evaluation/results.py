"""Everything that is measured of a run, as one JSON document, and what became of each box.

When: AFTER generation, on stored rows; numpy only. `files.py` writes what comes out here; the report reads it and computes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmdet.contract import Contract
from vlmdet.evaluation import breakdown, curves, mistakes
from vlmdet.evaluation.match import Matching
from vlmdet.evaluation.metrics import (
    FORMULAS,
    Row,
    add_up,
    count_table,
    draw_images,
    image_figures,
    make_figure,
    match_table,
)
from vlmdet.evaluation.table import Table, lay_out, sort_rows


def summarise(
    rows: Sequence[Row],
    *,
    labels_asked: Sequence[str],
    contract: Contract | None = None,
    resamples: int = 1000,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    score_threshold: float | None = None,
) -> dict[str, Any]:
    """Measure everything of a run: the contents of `results.json`.

    When: once per run and split.

    Input: `rows` of `predictions.jsonl`, in any order; `labels_asked`, the classes of the run; `contract`, which says at
    what size the model saw the pictures (without it `by_patches` is None); `resamples` of the bootstrap over images, and its
    `seed`; `meta`, what the figures are of, JSON values; `score_threshold`, chosen on another split (see `score_curve`).
    Output: with `{"value", "low", "high", "n"}` for each figure, None where undefined:

    * `meta`; `figures` of `metrics.score_rows`;
    * `per_class`, `by_size`, `by_patches`, `by_count`, `without_objects`, `confusion` of `breakdown`;
    * `errors` of `mistakes`; `iou_histogram`, `offsets`, `score_curve` of `curves`;
    * `coco`: None, for `coco.py` to fill in.

    Rows with status `error` have a part in `error_rate` alone.

    Raises:
        ConfigError: `labels_asked` is empty.
        DataError: two rows have one id, or the boxes of a row are none.
    """
    table, matching = _matched([row for row in rows if row["status"] != "error"], labels_asked)
    explained = mistakes.explain(table, matching)
    counts = count_table(table, matching)
    drawn = draw_images(len(table.rows), resamples=resamples, seed=seed)
    sums = add_up(counts, drawn)
    figures = {name: make_figure(name, sums) for name in FORMULAS}
    failed = np.asarray([row["status"] == "error" for row in sort_rows(rows)], dtype=np.float64)
    drawn_of_all = draw_images(len(failed), resamples=resamples, seed=seed) if failed.any() else drawn
    of_all = add_up({"images": np.ones(len(failed)), "error": failed}, drawn_of_all)
    figures["error_rate"] = make_figure("error_rate", of_all)
    return {
        "meta": dict(meta or {}),
        "figures": figures,
        "per_class": breakdown.by_class(table, matching, drawn),
        "by_size": breakdown.by_size(table, matching, drawn),
        "by_patches": breakdown.by_patches(table, matching, drawn, contract) if contract else None,
        "by_count": breakdown.by_count(counts, drawn),
        "without_objects": breakdown.without_objects(counts, drawn),
        "confusion": breakdown.confusion(table, explained),
        "errors": mistakes.cost_mistakes(mistakes.count_mistakes(table, matching, explained), sums, drawn),
        "iou_histogram": curves.iou_histogram(matching),
        "offsets": curves.offsets(table, matching),
        "score_curve": curves.score_curve(table, matching, drawn, threshold=score_threshold),
        "coco": None,
    }


def list_matches(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> list[dict[str, Any]]:
    """Tell what became of each box: the lines of `matches.jsonl`.

    When: once per run and split, for the gallery of the report.

    Output: in the order of `rows`, boxes in the order of each row:

        {"id": "a", "predictions": [{"kind": "hit", "iou": 0.8, "truth": 0}],
         "truth": [{"kind": "found", "iou": 0.8, "prediction": 0}], "f1": 1.0, "mean_best_iou": 0.8}

    A prediction's `kind` is one of `mistakes.KINDS`; `truth` the true box that decided it, `iou` that with it (None and the
    highest IoU with any for `background`; for `ignored` the share of it that lies on the ignored box). A true box is `found`,
    `missed` or `ignored`; a missed one has the `prediction` of a wrong label or place that explains it, and the IoU with it,
    or None and its highest IoU with a prediction of its label. A row with status `error` was not scored: its true boxes are
    `ignored`.

    Raises:
        ConfigError, DataError: as `summarise`.
    """
    table, matching = _matched(rows, labels_asked)
    explained = mistakes.explain(table, matching)
    first_true, first_predicted = _starts(table.truth.image, table), _starts(table.predicted.image, table)
    kinds = [mistakes.KINDS[kind] for kind in explained.kind.tolist()]
    truth, iou = explained.truth.tolist(), explained.iou.tolist()
    found, prediction = explained.found.tolist(), explained.prediction.tolist()
    ignored, best = table.ignored.tolist(), np.nan_to_num(matching.best_iou).tolist()
    image_of = table.truth.image.tolist()

    def predicted_box(j: int, start: int) -> dict[str, Any]:
        return {"kind": kinds[j], "iou": iou[j], "truth": truth[j] - start if truth[j] >= 0 else None}

    def true_box(i: int) -> dict[str, Any]:
        if ignored[i]:
            return {"kind": "ignored", "iou": 0.0, "prediction": None}
        kind, j = "found" if found[i] else "missed", prediction[i]
        if j < 0:
            return {"kind": kind, "iou": best[i], "prediction": None}
        # a box that two mistakes would find names one of them, whose own truth may be another
        between = pair_iou.get((i, j), best[i])
        return {"kind": kind, "iou": between, "prediction": j - first_predicted[image_of[i]]}

    left, right, overlap = matching.overlaps
    named = np.flatnonzero(explained.prediction[left] == right)
    pair_iou = dict(
        zip(zip(left[named].tolist(), right[named].tolist(), strict=True), overlap[named].tolist(), strict=True)
    )
    place = {row["id"]: number for number, row in enumerate(table.rows)}
    lines = []
    for row, figures in zip(rows, image_figures(rows, table, count_table(table, matching)), strict=True):
        image = place[row["id"]]
        true = [true_box(i) for i in range(first_true[image], first_true[image + 1])]
        if not table.scored[image]:
            true = [{"kind": "ignored", "iou": 0.0, "prediction": None} for _ in row["truth"]["boxes"]]
        own = range(first_predicted[image], first_predicted[image + 1])
        lines.append(
            {
                "id": row["id"],
                "predictions": [predicted_box(j, first_true[image]) for j in own],
                "truth": true,
                "f1": figures["f1"],
                "mean_best_iou": figures["mean_best_iou"],
            }
        )
    return lines


def _matched(rows: Sequence[Row], labels_asked: Sequence[str]) -> tuple[Table, Matching]:
    table = lay_out(rows, labels_asked=labels_asked)
    return table, match_table(table)


def _starts(image: np.ndarray, table: Table) -> list[int]:
    """Return, for each picture and the end, the row of its first box: n + 1 numbers."""
    return np.searchsorted(image, np.arange(len(table.rows) + 1)).tolist()
