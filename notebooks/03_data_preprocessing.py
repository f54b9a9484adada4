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
# # 3. From a row to a batch
#
# Between the file and the loss lie three changes: a row becomes a conversation (once), Arrow stores it and gives it back
# slightly different (at every access), and a collator makes tokens, pixels and the loss mask of it (for every batch).
# Each is shown here before and after, on drawn pictures, with the processor of the embedded base; no weights are loaded.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here

import tempfile
from pathlib import Path
from pprint import pprint

import datasets
from IPython.display import HTML, display
from transformers import AutoProcessor

from vlmdet.data.collators import (
    IGNORED,
    Qwen2VLCollatorV1,
    Qwen2VLCollatorV2,
    Qwen2VLCollatorV3,
    restore_images_in_conversations,
)
from vlmdet.data.dataset import conversation_features, convert_to_conversation_format
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.tiny import TINY_DIR, TINY_MAX_PIXELS, TINY_MIN_PIXELS
from vlmdet.utils import html

datasets.disable_progress_bars()
folder = Path(tempfile.mkdtemp())
source = write_drawn_set(folder / "drawn", train=8, val=2) / "data" / "train-00000-of-00001.parquet"

# %% [markdown]
# ## Before `map`
#
# The raw row has the columns of `openfoodfacts/nutrition-table-detection`. Its boxes are y_min, x_min, y_max, x_max, as
# fractions. The picture is kept as bytes (`decode=False`): decoded here, it would lose the EXIF tag that says which way
# up the boxes are.

# %%
raw = datasets.Dataset.from_parquet(str(source), cache_dir=str(folder / "cache"))
raw = raw.cast_column("image", datasets.Image(decode=False))
row = raw[0]
pprint({**row, "image": {**row["image"], "bytes": f"{len(row['image']['bytes']):,} bytes"}}, sort_dicts=False)

# %% [markdown]
# ## One row, converted
#
# The conversion turns the boxes to x first, sorts them from top to bottom, and words question and answer. Where the
# picture belongs stands a placeholder: Arrow can store neither a picture inside a message, nor a part that is a picture
# in one row and text in the next.

# %%
conversation = convert_to_conversation_format(row, labels=("nutrition-table",))
print("raw:      ", row["objects"]["bbox"])
print("converted:", conversation["boxes"])
pprint(conversation["messages"], sort_dicts=False, width=110)

# %% [markdown]
# ## After `map`: the None keys
#
# A column of Arrow has one type for all rows, and a struct has all its keys. So a part that was
# `{"type": "text", "text": …}` comes back as `{"type": "text", "text": …, "image": None}`.

# %%
rows = raw.map(
    convert_to_conversation_format,
    fn_kwargs={"labels": ("nutrition-table",)},
    remove_columns=raw.column_names,
    features=conversation_features(),
)
print("columns:", rows.column_names)
pprint(rows[0]["messages"][1], sort_dicts=False, width=110)

# %% [markdown]
# That is not harmless. The chat template asks whether a key *is there* (`'image' in content`), not whether it holds
# something. With the None keys left in, it writes a picture for every part, texts included: the count below is what the
# model would be told, against the one picture that there is.

# %%
processor = AutoProcessor.from_pretrained(TINY_DIR)


def pictures_in(messages):
    return processor.apply_chat_template(messages, tokenize=False).count("<|image_pad|>")


messages = rows[0]["messages"]
restored = restore_images_in_conversations([messages], [rows[0]["image"]])[0]
print("picture tokens with the None keys:   ", pictures_in(messages))
print("picture tokens after they are removed:", pictures_in(restored))
assert pictures_in(restored) == 1

# %% [markdown]
# ## What reaches the loader
#
# The trainer hands a list of such rows to the collator. The picture is decoded at this access; `boxes` and `labels` stay
# beside `messages`, so that a flip or a crop can move the boxes and write the answer again.

# %%
for key, value in rows[0].items():
    shown = f"{value.mode} picture of {value.size}" if key == "image" else str(value)[:90]
    print(f"{key:9} {type(value).__name__:14} {shown}")

# %% [markdown]
# ## One batch, step by step
#
# 1. Each picture is resized to an area between the limits, both sides multiples of 28, and cut into patches of 14 x 14.
# 2. 2 x 2 patches become one image token: `<|image_pad|>` is repeated as often.
# 3. Texts become ids, and shorter rows are padded on the right.
# 4. `labels` is a copy of the ids with -100 wherever there is no loss.

# %%
limits = {"min_pixels": TINY_MIN_PIXELS, "max_pixels": TINY_MAX_PIXELS}
pair = [rows[0], rows[1]]
batch = Qwen2VLCollatorV3(processor, **limits)(pair)
for key, value in batch.items():
    print(f"{key:18} {tuple(value.shape)!s:14} {value.dtype}")
for one, (frames, tall, wide) in zip(pair, batch["image_grid_thw"].tolist(), strict=True):
    view = plan_view(*one["image"].size, **limits)
    tokens = frames * tall * wide // 4
    resize = f"{view.width} x {view.height} -> {view.resized_width} x {view.resized_height} pixels"
    print(f"{resize}, {wide} x {tall} patches, {tokens} image tokens")
    assert (view.resized_width, view.resized_height) == (14 * wide, 14 * tall)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()[pair.index(one)] == tokens

# %% [markdown]
# ## The label mask in colour
#
# Marked tokens carry loss. Three collators, three masks:
#
# * **V1** learns all text. Over half of it is prompt and question, the same in every row: the loss falls while the boxes
#   are still guesses.
# * **V2** searches the ids for `<|im_start|>assistant` and `<|im_end|>`. Right here, and wrong where a label or a
#   question quotes those markers.
# * **V3** knows which text is the answer because it renders the conversation turn by turn, and checks its first batch
#   against the processor and against the decoded answer. It is the default.


# %%
def show_mask(batch, row=0):
    kept = batch["attention_mask"][row] == 1
    ids, labels = batch["input_ids"][row][kept], batch["labels"][row][kept]
    texts = [processor.tokenizer.decode([one]) for one in ids.tolist()]
    learnt = (labels != IGNORED).tolist()
    display(HTML(html.tokens(texts, learnt)))
    words = sum(text != "<|image_pad|>" for text in texts)
    print(
        f"{sum(learnt)} of {len(texts)} tokens carry loss; {words} are text, {len(texts) - words} stand for the picture"
    )


for collator in (Qwen2VLCollatorV1, Qwen2VLCollatorV2, Qwen2VLCollatorV3):
    print(collator.__name__)
    show_mask(collator(processor, **limits)(pair))

# %% [markdown]
# ## The check that matters
#
# Decoded, the supervised tokens must be exactly the answer and its end token. V3 does this on its first batch and stops
# the run with the difference where they are not.

# %%
labels = batch["labels"][0]
supervised = processor.tokenizer.decode(labels[labels != IGNORED])
answer = rows[0]["messages"][-1]["content"][0]["text"]
print(supervised)
assert supervised == answer + "<|im_end|>"
