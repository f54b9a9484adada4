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
# # Fine-tune a vision-language model to detect objects, with TRL
#
# The whole way: a data set, the conversation that is made of it, the loss mask, training, and scores on pictures that the
# model has not seen. On the way one question is answered by an experiment: **does it matter on which tokens the loss is
# taken?** Most scripts take it on all text, the question included. Here it is compared with the answer alone.
#
# It runs on two CPU cores in a minute or two, with nothing to download: the pictures are drawn, and the model is `tiny`, a
# Qwen2-VL of 5.7 million parameters that comes with the package. The last section has the commands for Qwen2-VL-2B on a
# GPU; they take the same way through the same code.

# %%
import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # progress bars and the library's notes about itself
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks by the old name
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import io
import json
import tempfile
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Image, display
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from vlmdet.config import find_recipe, load_settings
from vlmdet.data.collators import IGNORED, Qwen2VLCollatorV1, Qwen2VLCollatorV3
from vlmdet.data.dataset import build_rows
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import select
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.evaluation.compare import paired_difference
from vlmdet.evaluation.evaluate import evaluate
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.scoring import format_figure
from vlmdet.models.loader import load
from vlmdet.models.lora import build_lora_config, format_areas, refuse_untrainable
from vlmdet.models.tiny import TINY_MAX_PIXELS, TINY_MIN_PIXELS
from vlmdet.training.callbacks import draw_rows
from vlmdet.training.train import prepare, train
from vlmdet.utils import html
from vlmdet.utils.visualization import class_colors, draw_classes, image_grid

datasets.disable_progress_bars()
os.chdir(tempfile.mkdtemp())  # runs are written below; leave this out to keep them

TRAIN, VAL, TEST = 384, 16, 48  # few, so that this runs in CI; `vlmdet demo` takes 2,048 and 96
SEED = 0


def show(image):
    """Show a picture as a JPEG, a tenth of the size of the PNG that a notebook makes of it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    display(Image(data=file.getvalue()))


# %% [markdown]
# ## 1. The data
#
# Drawn food packages; the object is the nutrition table. The three splits share no picture, and the test split is used for
# nothing but the last scores. With data of your own, put its path here instead, and go through
# `01_dataset_exploration` first.
#
# One thing is made easy: the class is renamed to `text block`, words that `tiny` knows. A new word takes it some hundred
# steps to learn, which is more than there is time for here (`vlmdet demo` does it). A large base knows `nutrition table`.

# %%
SOURCE = write_drawn_set(Path("drawn"), train=TRAIN, val=VAL, test=TEST, seed=SEED)
RENAME = {"nutrition-table": "text block"}
dataset = select(open_dataset(SOURCE), rename=RENAME)
labels = dataset.labels
print({split: len(samples) for split, samples in dataset.splits.items()}, "pictures; to find:", labels)
few = dataset.splits["train"][:8]
colors = class_colors(labels)
drawn = [draw_classes(one.image, one.boxes, one.labels, colors) for one in few]
show(image_grid(drawn, [f"boxes: {len(one.boxes)}" for one in few], columns=4, cell=(190, 190)))

# %% [markdown]
# ## 2. From a row to a conversation
#
# A language model learns text, so boxes become text: control tokens around the name, and corners on a grid of 1,000,
# whatever the size of the picture. The same codec that writes this will read the model's answers.

# %%
rows = build_rows(dataset.splits["train"], labels=labels)
row = rows[0]
print("boxes as fractions of the picture:", [[round(value, 3) for value in box] for box in row["boxes"]])
for message in row["messages"]:
    print(f"\n{message['role']}:")
    for part in message["content"]:
        print("   ", part["text"] or "<the picture>")

# %% [markdown]
# ## 3. From a conversation to tokens and labels: two masks
#
# The trainer computes a loss wherever `labels` holds a token id, and none where it holds -100. Below is one row twice,
# token by token; marked tokens carry loss.
#
# * **All tokens** (`Qwen2VLCollatorV1`): system prompt, question and answer. Only the picture is left out.
# * **Assistant only** (`Qwen2VLCollatorV3`): the answer and the token that ends it.

# %%
processor = load("tiny").processor
limits = {"min_pixels": TINY_MIN_PIXELS, "max_pixels": TINY_MAX_PIXELS}
MASKS = {
    "all tokens": ("v1", Qwen2VLCollatorV1(processor, **limits)),
    "assistant only": ("v3", Qwen2VLCollatorV3(processor, **limits)),
}

sides = []
for name, (_, collator) in MASKS.items():
    batch = collator([row])
    ids, marked = batch["input_ids"][0], batch["labels"][0] != IGNORED
    texts = [processor.tokenizer.decode([one]) for one in ids.tolist()]
    words = int((ids != processor.image_token_id).sum())
    caption = html.paragraph(f"{name}: {int(marked.sum())} of {words} text tokens carry loss")
    sides.append(caption + html.tokens(texts, marked.tolist()))
display(HTML(html.table(list(MASKS), [sides])))

# %% [markdown]
# How much of the loss is about boxes? The question is the same in every row. Until it is known by heart, most of the
# gradient goes into learning to ask it; afterwards it adds next to nothing to the loss, and still counts in the mean, so
# that each answer token weighs less.

# %%
for name, (_, collator) in MASKS.items():
    batch = collator([rows[i] for i in range(16)])
    answer = MASKS["assistant only"][1]([rows[i] for i in range(16)])["labels"] != IGNORED
    share = answer.sum() / (batch["labels"] != IGNORED).sum()
    print(f"{name:15} {share:.0%} of the tokens with loss belong to answers")

# %% [markdown]
# ## 4. The core in plain TRL
#
# This is all that a fine-tune needs: a model, rows, a collator, and `SFTTrainer`. Four settings matter for pictures, and
# none of them is TRL's default:
#
# * `max_length=None`: a row that is cut loses image tokens or the end of the answer;
# * `remove_unused_columns=False` and `skip_prepare_dataset`: the collator reads the rows as they are;
# * `peft_config`: the adapter goes on once, by the trainer; the list of its layers is resolved to full names, so that a
#   pattern cannot miss.
#
# Six steps show that it runs. They do not make a detector.

# %%
loaded = load("tiny")
adapter = build_lora_config(
    loaded.model, rank=16, alpha=32, dropout=0.0, targets=["language.attn", "language.mlp", "merger"]
)
trainer = SFTTrainer(
    model=loaded.model,
    args=SFTConfig(
        output_dir="plain-trl",
        per_device_train_batch_size=8,
        max_steps=6,
        learning_rate=2e-3,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_checkpointing=False,
        use_cpu=True,  # leave this out on a GPU
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    ),
    train_dataset=rows,
    data_collator=Qwen2VLCollatorV3(processor, **limits),
    processing_class=processor,
    peft_config=adapter,
)
trainer.remove_callback(PrinterCallback)
print(format_areas(refuse_untrainable(trainer.model)))
trainer.train()
print("loss of each step:", [round(entry["loss"], 2) for entry in trainer.state.log_history if "loss" in entry])

# %% [markdown]
# What this leaves open is what usually goes wrong later: which prompt, pixel limits and box format the adapter was trained
# with, whether the run can be continued, and how good the result is. `vlmdet.training.train` runs the same trainer with the
# same collator, writes those things into a contract beside every checkpoint, and scores by generation.

# %% [markdown]
# ## 5. The untuned base
#
# Scored first, under the very prompt and parser of the tuned models. It knows text blocks, but has never seen a nutrition
# table.

# %%
SETTINGS = [
    f"data.source={SOURCE}",
    *(f"data.rename.{old}={new}" for old, new in RENAME.items()),
    "training.epochs=1",
    "training.batch_size=8",
    "training.learning_rate=0.01",
    f"training.eval_rows={VAL}",
    "training.eval_every=0",
    "training.overfit_gate=false",
    "training.report_to=[]",
    f"training.seed={SEED}",
]
said = []  # what the runs print; shown once below


def prepare_run(name, collator):
    settings = load_settings(
        find_recipe("tiny"), [*SETTINGS, f"name={name.replace(' ', '-')}", f"training.collator={collator}"]
    )
    return prepare(settings, new=True, say=said.append)


def score(loaded, name, contract):
    """Generate an answer for each test picture, read and score it; figures and stored rows."""
    folder = Path("scores") / name.replace(" ", "-")
    figures = evaluate(
        loaded,
        dataset.splits["test"],
        contract=contract,
        folder=folder,
        name=name,
        split="test",
        batch_size=48,
        max_new_tokens=96,
    )
    return figures, read_predictions(folder / "predictions.jsonl")


@torch.inference_mode()
def mean_losses(model):
    """Loss a token on the validation rows, in nats, under each mask: the same yardstick for every model."""
    val = build_rows(dataset.splits["val"], labels=labels)
    losses = []
    for _, collator in MASKS.values():
        batch = collator([val[i] for i in range(len(val))])
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED).item())
    return losses


prepared = {name: prepare_run(name, collator) for name, (collator, _) in MASKS.items()}
base, contract = prepared["all tokens"].base, prepared["all tokens"].contract
figures, predicted, losses = {}, {}, {"base": mean_losses(base.model)}
figures["base"], predicted["base"] = score(base, "base", contract)
print("F1@0.5 of the base:", format_figure(figures["base"]["f1_50"]), f"on {TEST} pictures")

# %% [markdown]
# ## 6. Two runs that differ in the mask alone
#
# Same recipe, seed, rows, order of rows, steps, rate. Every weight of `tiny` is trained (recipe `tiny`); adapters are for
# models that do not fit otherwise.

# %%
logs = {}
for name, run in prepared.items():
    folder = train(run, say=said.append)
    log = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    logs[name] = [entry["loss"] for entry in log if "loss" in entry]
    tuned = load(str(folder))
    losses[name] = mean_losses(tuned.model)
    figures[name], predicted[name] = score(tuned, name, contract)
lines = dict.fromkeys("\n".join(said).splitlines())  # both runs say the same
print("\n".join(line for line in lines if line.startswith(("steps:", "warm-up:", "memory"))))
assert len({len(curve) for curve in logs.values()}) == 1

# %% [markdown]
# ## 7. Two curves that cannot be compared
#
# One curve lies above the other. **That says nothing**: each is a mean over other tokens, and of those of the first mask
# most are a question that is always the same. Its loss falls as the question is learned by heart, boxes or no boxes. The
# other may look flat and the model improve: of an answer most tokens are certain, and a coordinate that is one off costs as
# much as one that is a hundred off.

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for (name, curve), color in zip(logs.items(), ("#c44e52", "#1f77b4"), strict=True):
    axes.plot(range(1, len(curve) + 1), curve, color=color, label=name)
axes.set(xlabel="step", ylabel="training loss, nats a token", ylim=(0, None))
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.patch.set(facecolor="white", alpha=1)
file = io.BytesIO()
figure.savefig(file, dpi=90)
plt.close(figure)
display(Image(data=file.getvalue()))

# %% [markdown]
# On the same tokens they can be compared. Each model, on the validation rows, under both masks:

# %%
display(
    HTML(
        html.table(
            ("model", "loss on all text tokens", "loss on answer tokens"),
            [(name, *(f"{value:.3f}" for value in pair)) for name, pair in losses.items()],
            numbers=(1, 2),
        )
    )
)

# %% [markdown]
# The model that learned the question is better at writing questions. Nobody will ask it to.
#
# ## 8. Scores on unseen pictures
#
# Answers are generated, read by the codec, and matched with the truth. In brackets: a 95 % interval, from drawing the test
# pictures again with replacement.

# %%
METRICS = ("f1_50", "mean_best_iou", "precision_50", "recall_50", "boxes_per_image", "parse_failure_rate")
display(
    HTML(
        html.table(
            ("figure", *figures),
            [(metric, *(format_figure(one[metric]) for one in figures.values())) for metric in METRICS],
            numbers=(1, 2, 3),
        )
    )
)

# %% [markdown]
# The intervals of the two tuned models may overlap and the difference be real all the same: both were scored on the same
# pictures, and the hard ones are hard for both. So the difference is taken picture by picture. Where its interval covers 0,
# these pictures do not tell which mask is better, and no figure above should be read as if they did.

# %%
for metric in ("f1_50", "mean_best_iou"):
    change = paired_difference(predicted["all tokens"], predicted["assistant only"], metric=metric, labels_asked=labels)
    verdict = "separable from 0" if change["separable"] else "NOT separable from 0"
    print(
        f"assistant only - all tokens, {metric}: {change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f}), "
        f"paired, n = {change['n']}: {verdict}"
    )

# %% [markdown]
# And one more limit of this: it is **one run of each**. The interval is over pictures, and another order of the rows would
# move both scores too. With 320 training pictures in place of 384, so 40 steps in place of 48, and everything else equal,
# these cells once gave +0.090 (+0.001 to +0.193) in F1@0.5 and +0.079 (+0.025 to +0.151) in mean best IoU, n = 48: by its
# interval separable from 0, which the run of 48 steps does not bear out. Before you believe a small difference, run both
# with three seeds.
#
# ## 9. Look at the answers
#
# Dashed green is the truth, solid red what the model wrote, with its IoU. First the mask over all tokens, then the answers
# alone, on the same test pictures.

# %%
shown = dataset.splits["test"][:8]
for name in MASKS:
    print(name)
    show(draw_rows(shown, predicted[name], columns=4).reduce(2))

# %% [markdown]
# ## 10. The same on Qwen2-VL-2B
#
# On a GPU of 24 GB, with data of your own (COCO, YOLO, Pascal VOC, JSON lines, CSV, Parquet or a hub id):
#
#     vlmdet inspect FOLDER
#     vlmdet train FOLDER --recipe all-tokens --model Qwen/Qwen2-VL-2B-Instruct --name all
#     vlmdet train FOLDER --recipe assistant-only --model Qwen/Qwen2-VL-2B-Instruct --name answer
#     vlmdet eval runs/all --base
#     vlmdet eval runs/answer --base
#
# The two recipes are one experiment too, and differ in nothing else. What changes against this notebook: an adapter of rank
# 16 on the language model instead of all weights, pictures of up to 1,280 image tokens instead of 49, bfloat16, recomputed
# activations to save memory, AdamW at 1e-4. None of it was run on a GPU by this project.

# %%
one, other = (load_settings(find_recipe(name)) for name in ("all-tokens", "assistant-only"))
for section in ("data", "model", "lora", "augment", "evaluation"):
    assert getattr(one, section) == getattr(other, section)
differ = {
    key: (value, getattr(other.training, key))
    for key, value in vars(one.training).items()
    if value != getattr(other.training, key)
}
print("the recipes differ in", differ)
