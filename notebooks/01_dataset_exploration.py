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
# # 1. Look at the data set
#
# Most of what goes wrong in a detection fine-tune can be seen before it starts: boxes in another order than was
# thought, classes with five examples, objects that are smaller than the model's smallest unit, the same picture in
# train and in test. This notebook looks for each of them.
#
# It runs on drawn pictures (food packages, where the object is the nutrition table), so it needs no download. Put the
# path of your own set into `SOURCE`: COCO, YOLO, Pascal VOC, JSON lines, CSV, Parquet, or a hub id. `vlmdet inspect
# SOURCE` makes the same figures as a screen and as one HTML page.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here

import io
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from IPython.display import HTML, Image, display

from vlmdet.boxes import BoxFormat
from vlmdet.data.explore import FAMILIES, format_summary, summarise
from vlmdet.data.explore.charts import CHARTS, draw_chart
from vlmdet.data.explore.page import choose_pictures
from vlmdet.data.pictures import look_over
from vlmdet.data.readers import open_dataset
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.utils import html
from vlmdet.utils.visualization import class_colors, draw_classes, image_grid

os.chdir(tempfile.mkdtemp())  # leave this out with data of your own
SOURCE = write_drawn_set(Path("drawn"), train=120, val=24, test=24)


def show(image):
    """Show a picture as a JPEG, a tenth of the size of the PNG that a notebook makes of it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    display(Image(data=file.getvalue()))


def show_chart(summary, name):
    """Draw one chart of `vlmdet.data.explore.charts`, and say in words what it shows."""
    figure = draw_chart(summary, name)
    figure.patch.set(facecolor="white", alpha=1)
    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    display(Image(data=file.getvalue()))
    print(CHARTS[name].words(summary))


# %% [markdown]
# ## Loading and structure
#
# A reader turns whatever the files say into one form: named splits of samples, each with a picture that stays closed,
# boxes, and labels. **How the boxes are written is decided, not assumed.** COCO and Pascal VOC define it; a Parquet
# file does not, and `decided_by` says what the reader went by. When the numbers do not settle it, the set is refused
# until you say it (`--box-format`), because boxes that are read in the wrong order look like boxes, and train a model
# to be wrong.

# %%
dataset = open_dataset(SOURCE)
print("splits: ", {split: len(samples) for split, samples in dataset.splits.items()})
print("classes:", dataset.labels)
print("boxes:  ", dataset.box_format, "-", dataset.decided_by)
print("trouble:", len(dataset.problems), "boxes or rows")

# %% [markdown]
# ## One sample
#
# Boxes are held as fractions of the upright picture, always x1, y1, x2, y2. Every other way to write them is a
# conversion of that, and needs the picture's size.

# %%
sample = next(sample for sample in dataset.splits["train"] if len(sample.boxes) > 1)
print("id:       ", sample.id)
print("from:     ", Path(sample.source).name)
print("size:     ", sample.width, "x", sample.height)
print("labels:   ", sample.labels)
print("fractions:", sample.boxes.xyxy.round(3).tolist())
print("pixels:   ", sample.boxes.to_array(BoxFormat("xyxy", "pixel"), sample.width, sample.height).round(1).tolist())
colors = class_colors(dataset.labels)
show(draw_classes(sample.image, sample.boxes, sample.labels, colors))

# %% [markdown]
# ## A grid of pictures with their boxes
#
# No figure replaces this. Look for boxes that are shifted, mirrored or turned with respect to the object (order, EXIF),
# for objects without a box, and for boxes around nothing. The choice prefers rare classes, and takes at least one
# picture without any box.

# %%
chosen = choose_pictures(dataset, count=12)
drawn = [draw_classes(one.image, one.boxes, one.labels, colors) for one in chosen]
show(image_grid(drawn, [f"{one.split}: {len(one.boxes)} boxes" for one in chosen], columns=4, cell=(200, 200)))

# %% [markdown]
# ## Open every picture once
#
# `look_over` finds files that are truncated, turned by their EXIF tag, in an odd mode, or of another size than the row
# states; the same bytes twice; and the same picture in two splits although its bytes differ. The last is the one that
# flatters a score: what is held out is then not new. (In the public blood-cell set BCCD it finds one scene,
# photographed twice at another focus, once in train and once in val.)

# %%
looked = look_over([one for samples in dataset.splits.values() for one in samples])
dataset = replace(dataset, problems=[*dataset.problems, *looked.problems])
summary = summarise(dataset, limits=FAMILIES["tiny"])
print(format_summary(summary))

# %% [markdown]
# ## Sizes of the pictures
#
# A Qwen-VL model resizes each picture so that its area lies between two limits. Pictures above the upper limit lose
# detail, and the cost of a step follows what is left. Very different sizes make batches with much padding.

# %%
show_chart(summary, "picture_sizes")

# %% [markdown]
# ## Boxes per picture
#
# The answer that the model has to write grows with every box. The right end of this chart sets `max_new_tokens`; bar 0
# says whether the model will ever see a picture with nothing in it. If that bar is empty, it learns that there is
# always something.

# %%
show_chart(summary, "boxes_per_image")

# %% [markdown]
# ## Sizes of the boxes and coverage
#
# Two questions in one: how large is an object, and how much of the picture is object? Where coverage is near 1, "the
# whole picture" is a good guess, and a mean IoU of .6 says little. Compare scores with that guess.

# %%
show_chart(summary, "box_side")
show_chart(summary, "coverage")

# %% [markdown]
# ## Aspect ratios
#
# Long thin boxes are hard: a shift of a few pixels across the short side costs much of the IoU. A peak at exactly 1
# among photographs can mean that boxes were rounded to squares by some tool.

# %%
show_chart(summary, "aspect_ratio")

# %% [markdown]
# ## Where the boxes are
#
# If most centres fall on one spot, a model can score without looking. Horizontal flips and crops spread them, as long
# as the boxes move along.

# %%
show_chart(summary, "centers")

# %% [markdown]
# ## Categories
#
# The label is text that the model must write letter by letter, so names matter: `WBC` means nothing to it, "white blood
# cell" does (`--rename`). A class with a handful of boxes will be scored on one or two.

# %%
rows = [(one["name"], one["boxes"], one["images"]) for one in summary.classes]
most = max(one["boxes"] for one in summary.classes)
bars = [one["boxes"] / most for one in summary.classes]
display(HTML(html.table(("class", "boxes", "in pictures"), rows, numbers=(1, 2), bars=bars)))

# %% [markdown]
# ## What the model sees
#
# The vision tower merges 2 x 2 patches of 14 pixels into one token. A box smaller than one token, 28 x 28 pixels *after
# the resize*, shares its token with its surroundings. The cure is a higher `max_pixels`, which costs tokens: compare the
# two limits.

# %%
show_chart(summary, "model_side")
for name in ("tiny", "qwen2-vl"):
    found = summarise(dataset, limits=FAMILIES[name])
    tokens = found.quantiles["tokens"]
    print(
        f"{name}: {tokens['p50']:.0f} image tokens a picture (p95 {tokens['p95']:.0f}); {found.under_one_patch:.1%} of the "
        f"boxes are under one token, {found.under_two_patches:.1%} under two by two"
    )

# %% [markdown]
# ## What follows for training
#
# Read off the figures above, in this order:
#
# 1. **Boxes drawn where the objects are?** If not, stop: nothing after this can be right.
# 2. **`max_pixels`**: the lowest limit that leaves few boxes under two by two tokens.
# 3. **`max_new_tokens`**: about 25 tokens for each box of the fullest picture, and some room.
# 4. **Splits**: no near-duplicates across them; a validation split of its own, so that the test split chooses nothing.
# 5. **Negatives**: some pictures without a box, or the model will never answer "none".
# 6. **A naive guess to beat**: the mean box of the centre heatmap, or the whole picture where coverage is high.

# %%
fullest = int(summary.quantiles["boxes_per_image"]["max"])
overlaps = sum(summary.problems.get(kind, {}).get("kept", 0) for kind in ("near_duplicate", "group_overlap"))
print(f"max_new_tokens: at least {25 * fullest} for {fullest} boxes")
print(f"pictures without a box: {summary.empty} of {summary.images}")
print(f"rows that are in two splits: {overlaps}; rows that train would leave out: {summary.rows_dropped}")
