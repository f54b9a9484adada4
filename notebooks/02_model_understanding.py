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
# # 2. Look at the model
#
# What a box costs in tokens, which layers a recipe trains and what their names are, what four bits do to a model, and how
# an answer comes about, step by step. Everything runs on `tiny`, the embedded Qwen2-VL of 5.7 million parameters, or on
# skeletons: models of the true size without weights, which need a second and no memory.

# %%
import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks by the old name
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel, and says so at import

import io
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from IPython.display import HTML, Image, display
from peft import get_peft_model

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.config import find_recipe, load_stages
from vlmdet.data.collators import collate_prompts, render_prompt, restore_images_in_conversations
from vlmdet.data.dataset import build_messages
from vlmdet.data.synthetic.shapes import draw_scene
from vlmdet.grounding import CODECS, get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.families import AREAS, FAMILIES, ROLES, area_of, parameters_by_area, resolve_targets
from vlmdet.models.inference import generate_answers
from vlmdet.models.loader import build_skeleton, load
from vlmdet.models.lora import build_lora_config, train_only
from vlmdet.models.tiny import CONTROL_TOKENS, TINY_MAX_PIXELS, TINY_MIN_PIXELS
from vlmdet.utils import html
from vlmdet.utils.visualization import draw_truth_and_prediction, image_grid

folder = Path(tempfile.mkdtemp())
limits = {"min_pixels": TINY_MIN_PIXELS, "max_pixels": TINY_MAX_PIXELS}


def show(image):
    """Show a picture as a JPEG, a tenth of the size of the PNG that a notebook makes of it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    display(Image(data=file.getvalue()))


def show_table(head, rows):
    display(HTML(html.table(head, rows, numbers=range(1, len(head)))))


# %% [markdown]
# ## Tokenizer and control tokens
#
# A control token is one id that no text can make: it tells the model where a turn, a picture, a name or a box begins. If a
# processor splits one into letters, the model reads noise; so the first check of any checkpoint is that each is one id.

# %%
base = load("tiny")
tokenizer = base.processor.tokenizer
show_table(
    ("control token", "id", "pieces"),
    [
        (token, tokenizer.convert_tokens_to_ids(token), len(tokenizer.encode(token, add_special_tokens=False)))
        for token in CONTROL_TOKENS
    ],
)

# %% [markdown]
# ## What one box costs
#
# The same box in the notation of each family. Tokens are paid twice: in memory and time while training, and one forward
# pass each while generating. They are counted with the vocabulary of `tiny`, in which any number from 0 to 999 is one
# token; Qwen's own writes each digit as a token, so its figures are higher (a column of its own where that vocabulary is in
# the hub cache of this machine). Control tokens of other families (`<loc…>`, `<box>`) are spelled out here: in PaliGemma
# and Florence-2 each location is one token.

# %%
view = plan_view(640, 480, min_pixels=4 * 28 * 28, max_pixels=1280 * 28 * 28)
box = Boxes.from_array([[0.382, 0.15, 0.578, 0.302]], FRACTIONS, view.width, view.height)
vocabularies = {"tiny": tokenizer}
try:
    vocabularies["Qwen2-VL"] = transformers.AutoTokenizer.from_pretrained(
        "Qwen/Qwen2-VL-2B-Instruct", local_files_only=True
    )
except OSError:
    print("Qwen2-VL's own vocabulary is not in the hub cache of this machine")
rows = []
for name in CODECS:
    text = get_codec(name).encode(["nutrition table"], box, view)
    rows.append((name, text, *(len(one.encode(text, add_special_tokens=False)) for one in vocabularies.values())))
display(HTML(html.table(("codec", "one box", *vocabularies), rows, numbers=range(2, 2 + len(vocabularies)))))

# %% [markdown]
# And the picture beside it: one token for each 28 x 28 pixels (32 x 32 in Qwen3-VL) after the resize.

# %%
for name, pixels in (("tiny", TINY_MAX_PIXELS), ("the recipes for 2B and 7B", 1003520)):
    seen = plan_view(1600, 1200, min_pixels=12544, max_pixels=pixels)
    tokens = seen.resized_width * seen.resized_height // 28**2
    print(f"{name}: 1600 x 1200 -> {seen.resized_width} x {seen.resized_height} pixels, {tokens} image tokens")

# %% [markdown]
# ## Module names by area
#
# Parameters lie in six areas. An adapter names layers by **roles**, because the same layer has another name in each family:
# a pattern written for Qwen2-VL (`fc1`) matches nothing in the vision tower of Qwen2.5-VL, and PEFT would say nothing as
# long as some other part of the pattern matches. The configurations below are written out, so nothing is downloaded.

# %%
decoder = {"vocab_size": 151936, "num_hidden_layers": 28, "tie_word_embeddings": True}
tower = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
CONFIGURATIONS = {
    "Qwen2-VL-2B": transformers.Qwen2VLConfig(
        text_config=decoder
        | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
        vision_config=tower | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 1536},
        tie_word_embeddings=True,
    ),
    "Qwen2.5-VL-3B": transformers.Qwen2_5_VLConfig(
        text_config=decoder
        | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"num_hidden_layers": 36},
        vision_config=tower | {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
        tie_word_embeddings=True,
    ),
    "Qwen3-VL-2B": transformers.Qwen3VLConfig(
        text_config=decoder
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128},
        vision_config=tower
        | {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048, "patch_size": 16}
        | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
        tie_word_embeddings=True,
    ),
}
skeletons = {"tiny": build_skeleton("tiny")}
for name, config in CONFIGURATIONS.items():
    config.save_pretrained(folder / name)
    skeletons[name] = build_skeleton(str(folder / name))


def kinds(model, role):
    """The layers of a role: how many, and the name of the first."""
    if role not in FAMILIES[model.config.model_type].roles:
        return "-"
    names = resolve_targets(model, [role])
    return f"{len(names)} x {names[0].removeprefix('model.')} … {names[-1].rpartition('.')[2]}"


display(
    HTML(
        html.table(("role", *skeletons), [(role, *(kinds(one, role) for one in skeletons.values())) for role in ROLES])
    )
)
totals = {
    name: {area: count["trainable"] for area, count in parameters_by_area(one.named_parameters()).items()}
    for name, one in skeletons.items()
}
show_table(
    ("parameters", *totals),
    [(area, *(f"{one[area]:,}" for one in totals.values())) for area in AREAS]
    + [("all", *(f"{sum(one.values()):,}" for one in totals.values()))],
)

# %% [markdown]
# ## Parameters by area and recipe
#
# What each recipe trains on Qwen2-VL-2B. An adapter's numbers stand in the area of the layer that it sits on. A recipe of
# two stages trains one after the other. The head is tied to the embeddings here, so it has no numbers of its own.

# %%
rows = []
for recipe in ("r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint", "merger-only", "lora-light", "lora-heavy"):
    stages = load_stages(find_recipe(recipe))
    for number, settings in enumerate(stages, 1):
        model = build_skeleton(str(folder / "Qwen2-VL-2B"), quantization=settings.model.quantization)
        if settings.training.method == "lora":
            adapter = build_lora_config(model, **asdict(settings.lora))
            counts = parameters_by_area(get_peft_model(model, adapter).named_parameters())
        else:
            counts = train_only(model, settings.training.areas)
        name = recipe if len(stages) == 1 else f"{recipe}, stage {number}"
        trained = {area: count["trainable"] for area, count in counts.items()}
        four_bits = sum(count["quantised"] for count in counts.values())
        rows.append((name, *(f"{trained[area]:,}" for area in ("vision", "merger", "language")), f"{four_bits:,}"))
show_table(("recipe", "vision", "merger", "language", "held in 4 bits"), rows)

# %% [markdown]
# ## What four bits do
#
# NF4 keeps blocks of 64 weights as 16 levels and a scale. It is there for the frozen weights under an adapter. The vision
# tower stays whole unless asked. Here `tiny` three times: whole, with its language model in four bits, and with the vision
# tower and the merger in four bits too. Embeddings and norms are never quantised. In Qwen2-VL-7B four fifths of all weights
# are in the language model's layers, here half, so there more is saved.


# %%
def held(weight):
    """Bytes of a parameter as it lies in memory; of a quantised one with its scales."""
    state = getattr(weight, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.code, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in (weight.data, *scales))


def bytes_by_area(model):
    sums = dict.fromkeys(AREAS, 0)
    for name, weight in model.named_parameters():
        sums[area_of(name)] += held(weight)
    return sums


models = {
    "float32": base,
    "NF4": load("tiny", quantization="nf4"),
    "NF4, vision too": load("tiny", quantization="nf4", quantize_vision=True),
}
memory = {name: bytes_by_area(one.model) for name, one in models.items()}
show_table(
    ("KiB", *models),
    [(area, *(f"{one[area] / 1024:,.0f}" for one in memory.values())) for area in AREAS if memory["float32"][area]]
    + [("all", *(f"{sum(one.values()) / 1024:,.0f}" for one in memory.values()))],
)

# %% [markdown]
# Sixteen drawn scenes with objects that `tiny` knows by name. First the logits at every place of the prompt's text: how far
# they move, and how often the most likely next token stays the same. Then what counts: the boxes that are generated.

# %%
rng = np.random.default_rng(0)
questions = []
while len(questions) < 16:
    scene = draw_scene(rng, 224, 224, objects=2, smallest=0.3, largest=0.6)
    label = sorted(scene.names()[0], key=len)[0]
    truth = [box for box, names in zip(scene.boxes, scene.names(), strict=True) if label in names]
    questions.append((scene.image, label, Boxes.from_array(truth, FRACTIONS, 224, 224)))
images = [image for image, _, _ in questions]
messages = [build_messages([label]) for _, label, _ in questions]
batch = collate_prompts(base.processor, messages, images, **limits)
is_text = (batch["attention_mask"] == 1) & (batch["input_ids"] != base.processor.image_token_id)


def logits_of(loaded):
    with torch.inference_mode():
        return loaded.model(**batch).logits[is_text]


def answers_of(loaded):
    return generate_answers(loaded.model, loaded.processor, messages, images, **limits, max_new_tokens=64)


def best_iou(answer, truth):
    """IoU of each true box with the best box of the answer, on average."""
    found = get_codec("qwen2_vl").parse(answer.text, plan_view(224, 224, **limits)).boxes
    return float(truth.iou(found).max(axis=1).mean()) if len(found) else 0.0


whole = logits_of(base)
answers = {name: answers_of(one) for name, one in models.items()}
rows = []
for name, one in models.items():
    moved = logits_of(one)
    same = (moved.argmax(dim=-1) == whole.argmax(dim=-1)).float().mean()
    ious = [best_iou(answer, truth) for answer, (_, _, truth) in zip(answers[name], questions, strict=True)]
    equal = sum(a.text == b.text for a, b in zip(answers[name], answers["float32"], strict=True))
    rows.append(
        (
            name,
            f"{(moved - whole).abs().max():.2f}",
            f"{(moved - whole).abs().mean():.3f}",
            f"{same:.1%}",
            f"{equal} of {len(questions)}",
            f"{np.mean(ious):.3f}",
        )
    )
show_table(
    ("weights", "largest logit difference", "mean", "same next token", "same answer", "mean best IoU, n = 16"), rows
)

# %% [markdown]
# Sixteen pictures are too few to rank the three; they show the kind of change. `vlmdet merge` measures it on a whole split
# for a model that was trained on four bits. Dashed green is the truth, solid red the answer: above in float32, below in
# NF4.


# %%
def drawn(answer, image, label, truth):
    found = get_codec("qwen2_vl").parse(answer.text, plan_view(224, 224, **limits))
    return draw_truth_and_prediction(
        image, truth, found.boxes, truth_labels=[label] * len(truth), prediction_labels=found.labels
    )


pictures = [
    drawn(answer, *question)
    for name in ("float32", "NF4")
    for answer, question in zip(answers[name][:6], questions[:6], strict=True)
]
show(image_grid(pictures, [name for name in ("float32", "NF4") for _ in range(6)], columns=6, cell=(150, 150)))

# %% [markdown]
# ## Inference, step by step
#
# 1. The question becomes a conversation, and the chat template a text that ends where the answer begins. A model that was
#    tuned under this text must be asked with this text, to the letter.

# %%
image, label, truth = questions[0]
conversation = build_messages([label])
(restored,) = restore_images_in_conversations([conversation], [image])
print(render_prompt(base.processor, restored))

# %% [markdown]
# 2. The picture is resized and cut into patches; the one `<|image_pad|>` is repeated as often as there are image tokens.

# %%
one = collate_prompts(base.processor, [conversation], [image], **limits)
seen = plan_view(*image.size, **limits)
print("picture:     ", image.size, "->", (seen.resized_width, seen.resized_height))
print("grid:        ", one["image_grid_thw"].tolist(), "frames, rows, columns of patches of 14 x 14")
print("image tokens:", int((one["input_ids"] == base.processor.image_token_id).sum()))
for key, value in one.items():
    print(f"{key:18} {tuple(value.shape)!s:14} {value.dtype}")

# %% [markdown]
# 3. The model writes one token after the other, always the likeliest (greedy: the same answer each time), until the end
#    token. Beside each stands its probability: control tokens are certain; a coordinate shares its chance with the
#    numbers next to it, for one more or less is nearly as likely.

# %%
with torch.inference_mode():
    output = base.model.generate(
        **one, max_new_tokens=64, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
ids = output.sequences[0, one["input_ids"].shape[1] :].tolist()
chances = [scores.softmax(dim=-1)[0, token].item() for scores, token in zip(output.scores, ids, strict=True)]
show_table(
    ("token", "id", "probability"), [(tokenizer.decode([i]), i, f"{p:.3f}") for i, p in zip(ids, chances, strict=True)]
)

# %% [markdown]
# 4. The codec reads the text back. Decode with the control tokens (`skip_special_tokens=False`): they say where a box is.

# %%
text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
parsed = get_codec("qwen2_vl").parse(text, seen)
print(text)
print("status:", parsed.status, "| labels:", parsed.labels, "| problems:", parsed.problems)
print("boxes, as fractions:", parsed.boxes.xyxy.round(3).tolist())
print("truth:              ", truth.xyxy.round(3).tolist())
print("IoU:                ", truth.iou(parsed.boxes).round(2).tolist())

# %% [markdown]
# 5. Models do not always write what they should. A parser never raises and never guesses silently: what it repaired or
#    lost is a problem with a name, and "no box" is told apart from "no box could be read".

# %%
start = "<|object_ref_start|>star<|object_ref_end|><|box_start|>"
BROKEN = {
    "as it should be": start + "(100,200),(300,400)<|box_end|>",
    "the explicit none": "none",
    "cut off by max_new_tokens": start + "(100,200),(300,",
    "right and left swapped": start + "(300,200),(100,400)<|box_end|>",
    "a number off the grid": start + "(100,200),(300,1400)<|box_end|>",
    "control tokens lost": "star(100,200),(300,400)",
    "the notation of another family": '[{"bbox_2d": [100, 200, 300, 400], "label": "star"}]',
    "prose": "There is a star in the upper left.",
}
rows = []
for what, written in BROKEN.items():
    read = get_codec("qwen2_vl").parse(written, plan_view(224, 224, **limits))
    boxes = "; ".join(str([round(value, 3) for value in row]) for row in read.boxes.tolist()) or "-"
    rows.append((what, read.status, boxes, ", ".join(problem.kind for problem in read.problems) or "-"))
display(HTML(html.table(("answer", "status", "boxes", "problems"), rows)))
