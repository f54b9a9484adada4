# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. What a run is worth
#
# Figures with intervals, base against tuned on the same pictures, where the boxes lie, what went wrong, and several recipes
# side by side. All of it reads `predictions.jsonl` and `results.json`: a model is needed once, to predict.
#
# Training takes minutes, so the models here are stand-ins, made in a second: `tuned` is the embedded base as it is, asked for
# stars, which it knows; `base` is the same with noise on its weights. With a run of yours, start at "Loading a run".

# %%
import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import contextlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.synthetic.shapes import draw_scene
from vlmdet.evaluation.compare import paired_difference
from vlmdet.evaluation.comparison import compare_entries, format_document, read_entries, write_comparison
from vlmdet.evaluation.evaluate import evaluate
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.scoring import format_comparison, format_difference
from vlmdet.models.loader import load, make_contract
from vlmdet.records import Sample
from vlmdet.utils.visualization import draw_truth_and_prediction, image_grid

folder = Path(tempfile.mkdtemp())
LABEL = "star"

# %% [markdown]
# ## A small run
#
# Forty drawn pictures; in some there is no star. `vlmdet eval RUN --base` writes the same files.

# %%
rng = np.random.default_rng(0)
(folder / "pictures").mkdir()
samples = []
while len(samples) < 40:
    scene = draw_scene(rng, 196, 196, objects=2, smallest=0.3, largest=0.6)
    boxes = [box for box, names in zip(scene.boxes, scene.names(), strict=True) if LABEL in names]
    if not boxes and len(samples) % 8:
        continue
    path = folder / "pictures" / f"{len(samples):02}.png"
    scene.image.save(path)
    truth = Boxes.from_array(boxes, FRACTIONS, 196, 196)
    samples.append(Sample(path.name, path, 196, 196, truth, (LABEL,) * len(boxes), source=str(path)))

place = folder / "run" / "eval" / "test"
for name, noise in (("base", 1.0), ("halfway", 0.25), ("tuned", 0.0)):
    loaded = load("tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in loaded.model.parameters():
            weights.add_(torch.randn_like(weights) * weights.std(correction=0) * noise)
    contract = make_contract(
        loaded, labels=[LABEL], box_order="raster", max_new_tokens=32, data_fingerprint="drawn stars"
    )
    with contextlib.redirect_stderr(io.StringIO()):  # the bar of progress
        evaluate(loaded, samples, contract=contract, folder=place / name, name=name, split="test", max_new_tokens=32)
print(sorted(path.name for path in (place / "tuned").iterdir()))

# %% [markdown]
# ## Loading a run
#
# `results.json` has every figure with its 95 % interval, taken over pictures; `predictions.jsonl` has what the model said,
# so that each of them can be computed again.

# %%
results = {name: json.loads((place / name / "results.json").read_text()) for name in ("base", "halfway", "tuned")}
rows = {name: read_predictions(place / name / "predictions.jsonl") for name in results}
row = rows["tuned"][0]
print(row["id"], "|", row["text"], "| scores", np.round(row["scores"] or [], 3))
print(format_comparison({name: part["figures"] for name, part in results.items()}, list(results)))

# %% [markdown]
# ## Base against tuned
#
# Two intervals that overlap say little. What counts is the difference on the same pictures: hard pictures are hard for both,
# and pairing takes that out. Where its interval covers 0, the two are not separable.

# %%
for metric in ("f1_50", "mean_best_iou"):
    change = paired_difference(rows["base"], rows["tuned"], metric=metric, labels_asked=[LABEL])
    print(format_difference(metric, change), "| better on", change["wins"], "worse on", change["losses"])
write_comparison(place, labels_asked=[LABEL])
print((place / "comparison.json").stat().st_size, "bytes of comparison.json, which the report reads")

# %% [markdown]
# ## Where the boxes lie
#
# The IoU of every matched pair. A heap just above 0.5 is a model that sees the object and not its edges: F1@0.5 is high, the
# mean of F1 over .5 to .95 is low.

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for name in ("base", "tuned"):
    histogram = results[name]["iou_histogram"]
    edges = np.asarray(histogram["edges"])
    axes.stairs(histogram["counts"], edges, label=name, fill=name == "tuned", alpha=0.7)
axes.set(xlabel="IoU of matched pairs", ylabel="boxes")
axes.legend()
plt.close(figure)
display(figure)

# %% [markdown]
# ## What went wrong
#
# Each false or missed box has one cause, and what F1@0.5 would gain without that cause is its cost.

# %%
print(f"{'':14}{'boxes':>6}   F1@0.5 gained")
for kind, entry in results["tuned"]["errors"].items():
    print(f"{kind:14}{entry['count']:>6}   {entry['cost']['value'] or 0:.3f}")

matches = [json.loads(line) for line in (place / "tuned" / "matches.jsonl").read_text().splitlines()]
kinds = Counter(box["kind"] for match in matches for box in match["predictions"])
print("predictions:", dict(kinds))

# %% [markdown]
# The pictures to look at first are the worst ones. Truth is green and dashed, the prediction red.

# %%
worst = sorted((i for i, match in enumerate(matches) if match["f1"] is not None), key=lambda i: matches[i]["f1"])[:8]
pictures, titles = [], []
for i in worst:
    row = rows["tuned"][i]
    image = Image.open(folder / "pictures" / samples[i].id)
    pictures.append(draw_truth_and_prediction(image, row["truth"]["boxes"], row["boxes"]))
    titles.append(f"{row['id']}  F1 {matches[i]['f1']:.2f}")
display(image_grid(pictures, titles, 4, cell=(180, 180)).quantize(64))  # a palette, so that the notebook stays small

# %% [markdown]
# ## Several recipes
#
# `vlmdet compare RUN RUN …` does this for runs, and with `--truth GT.json` for result files of other tools. Contracts must
# agree: other prompts or other pixels would be compared, and not recipes. Intervals are not corrected for the number of pairs.

# %%
entries, labels = read_entries([str(place / name) for name in ("base", "halfway", "tuned")])
document = compare_entries(entries, labels_asked=labels, all_pairs=True)
print(format_document(document))

# %%
names = [run["name"] for run in document["runs"]]
values = [run["metrics"]["f1_50"] for run in document["runs"]]
figure, axes = plt.subplots(figsize=(7, 1.8))
middle = np.array([value["value"] for value in values])
spread = [middle - [value["low"] for value in values], [value["high"] for value in values] - middle]
axes.errorbar(middle, names, xerr=spread, fmt="o", capsize=4)
axes.set(xlabel="F1@0.5 with its 95 % interval", xlim=(-0.02, 1.02))
axes.margins(y=0.3)
plt.close(figure)
display(figure)
