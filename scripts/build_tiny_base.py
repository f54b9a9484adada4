"""Build the embedded base `tiny` from nothing: tokenizer, weights, processor files.

When: once; the result is committed under `src/vlmdet/models/tiny_base/`. On 2 CPU cores:

    python scripts/build_tiny_base.py --bf16 --out src/vlmdet/models/tiny_base --log experiments/tiny_base.jsonl

Every step sees new pictures (`vlmdet.data.synthetic.shapes`), so the loss and IoU of the training batches are those of
unseen data. The first `--vision-steps` train the vision tower alone, the rest the whole model, on one to three questions
about each picture. Four losses are added up, the last three through heads that are thrown away afterwards, because they break
the plateau at which the coordinates of an answer otherwise stay for thousands of steps:
1. the answer's tokens; a number's target is a narrow bell over its neighbours, not one class in a thousand;
2. on every image token as it leaves the vision tower: shape and colour of the object that covers it, and which part of
   its cell the object's box fills;
3. on every image token half-way through the language model: the same part, as four numbers on the picture's own scale.
4. on three heads of the last two layers: where a number is written, they look at the cells of the edge that it states.
Matrices are trained with Muon (K. Jordan et al., 2024), which needed less than half as many steps here as AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import trl
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration

from vlmdet.data.synthetic.shapes import COLORS, POLYGON_SHAPES, SHAPES, Scene, draw_scene
from vlmdet.grounding.prompts import NONE_ANSWER, SYSTEM_PROMPT, build_user_prompt
from vlmdet.models.tiny import TINY_MAX_PIXELS, build_model, build_processor, build_tokenizer, number_ids
from vlmdet.training.optim import Muon, muon_groups

SIZES = ((196, 196), (224, 168), (168, 224), (196, 168), (168, 196), (168, 168), (196, 140), (140, 196))
"""Width and height in model pixels; one of them per batch, all within the base's pixel limits."""

OTHER_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You detect objects.", "Find what the user asks for.")
EXTRA_CORPUS = """nutrition table facts label package photo image picture white blood cell red platelets person car dog cat
animal vehicle fruit bottle box boxes detect find locate where which what is are of the and in on there [{"bbox_2d": [1,
2, 3, 4], "label": "x"}] <ref></ref><box></box> object objects region value small large left right top bottom""".split()


def raster(boxes: np.ndarray) -> np.ndarray:
    """Return the order of boxes (n, 4) from top to bottom, then left to right."""
    return np.lexsort((boxes[:, 0], boxes[:, 1]))


def answer_text(boxes: np.ndarray, label: str) -> str:
    """Write boxes (n, 4) xyxy fractions in Qwen2-VL's form, top to bottom."""
    parts = []
    grid = np.minimum(np.round(boxes * 1000), 999).astype(int)  # 1000 would be two tokens of the tiny vocabulary
    for x1, y1, x2, y2 in grid[raster(boxes)]:
        parts.append(f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
    return "".join(parts) or NONE_ANSWER


class Turn(NamedTuple):
    """One question about a scene: `label`, the objects `chosen` by it (a bool each), and their `boxes` in raster order."""

    label: str
    chosen: list[bool]
    boxes: np.ndarray


class Questions(IterableDataset):
    """A stream of batches of pictures, questions and answers.

    After the first `alone` steps, which concern the vision tower only, pictures start easy and are all hard from `ramp` on.
    """

    def __init__(self, processor: Any, *, batch: int, steps: int, alone: int, ramp: int, seed: int) -> None:
        self.processor, self.batch, self.steps = processor, batch, steps
        self.alone, self.ramp, self.seed = alone, ramp, seed

    def __iter__(self) -> Any:
        rng = np.random.default_rng(self.seed)
        for step in range(self.steps):
            yield self.make(rng, 1.0 if step < self.alone else min((step - self.alone) / self.ramp, 1.0))

    def make(self, rng: np.random.Generator, hard: float) -> dict[str, torch.Tensor]:
        width, height = SIZES[rng.integers(len(SIZES))]
        most = int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))  # one limit a batch: rows of like length, little padding
        turns = int(rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3]))
        scale = float(rng.uniform(1.0, 1.5))
        rows = []
        for _ in range(self.batch):
            easy = rng.random() > hard
            scene = draw_scene(
                rng,
                round(width * scale),
                round(height * scale),
                objects=1 if easy else int(rng.integers(1, 6)),
                smallest=0.35 if easy else 0.18,
                largest=0.75,
            )
            rows.append((scene, self.ask(rng, scene, hard, most, turns)))
        return self.collate(rng, rows, width, height)

    def ask(self, rng: np.random.Generator, scene: Scene, hard: float, most: int, turns: int) -> list[Turn]:
        """Choose at most `turns` questions, mostly with at most `most` boxes each; no two ask for the same objects."""
        names = scene.names()
        present = sorted(set().union(*names))
        wanted = {name: [name in own for own in names] for name in present}
        asked: list[Turn] = []
        for _ in range(turns):
            given = [turn.chosen for turn in asked]
            fresh = [name for name in present if wanted[name] not in given]
            choices = [name for name in fresh if sum(wanted[name]) <= most] or fresh
            if rng.random() < 0.1 * hard:
                choices = sorted({*SHAPES, *(f"{c} {s}" for c in COLORS for s in POLYGON_SHAPES)} - set(present))
            if not choices:
                break
            full = [name for name in choices if " " in name]  # mostly by colour and shape, sometimes by shape alone
            label = str(rng.choice(full if full and rng.random() < 0.7 else choices))
            chosen = wanted.get(label, [False] * len(names))
            boxes = scene.boxes[chosen]
            asked.append(Turn(label, chosen, boxes[raster(boxes)]))
        return asked

    def collate(
        self, rng: np.random.Generator, rows: list[tuple[Scene, list[Turn]]], width: int, height: int
    ) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        images = [scene.image.resize((width, height), resample=2) for scene, _ in rows]
        vision = self.processor.image_processor(images=images, return_tensors="pt")
        columns, lines = width // 28, height // 28
        picture = "<|vision_start|>" + "<|image_pad|>" * (columns * lines) + "<|vision_end|>"
        ids, labels = [], []
        for _, turns in rows:
            system = SYSTEM_PROMPT if rng.random() < 0.9 else str(rng.choice(OTHER_SYSTEM_PROMPTS))
            before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{picture}"
            row_ids, row_labels = [], []
            for turn in turns:
                prompt = f"{before}{build_user_prompt([turn.label])}<|im_end|>\n<|im_start|>assistant\n"
                head = tokenizer(prompt)["input_ids"]
                tail = tokenizer(answer_text(turn.boxes, turn.label) + "<|im_end|>")["input_ids"]
                row_ids += head + tail
                row_labels += [-100] * len(head) + tail
                before = "\n<|im_start|>user\n"
            ids.append(torch.tensor(row_ids))
            labels.append(torch.tensor(row_labels))
        # oneDNN compiles its kernels for each new shape, which costs about a step's time: few lengths
        longest = -(-max(len(row) for row in ids) // 32) * 32
        ids[0] = F.pad(ids[0], (0, longest - len(ids[0])), value=tokenizer.pad_token_id)
        pad = nn.utils.rnn.pad_sequence
        input_ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        cells = [cell_targets(scene, columns, lines) for scene, _ in rows]
        edges = [edge_targets(turn.boxes, columns, lines) for _, turns in rows for turn in turns]
        return {
            "edges": torch.cat(edges),
            "input_ids": input_ids,
            "attention_mask": (input_ids != tokenizer.pad_token_id).long(),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).int(),
            "labels": F.pad(pad(labels, batch_first=True, padding_value=-100), (0, longest), value=-100)[:, :longest],
            "pixel_values": vision["pixel_values"],
            "image_grid_thw": vision["image_grid_thw"],
            "cell_kind": torch.cat([kind for kind, _ in cells]),
            "cell_box": torch.cat([box for _, box in cells]),
        }


def cell_targets(scene: Scene, columns: int, lines: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Name what lies under each image token, and which part of it.

    Output: kinds (columns * lines, 2) int64, shape and colour index, 0 for none; boxes (columns * lines, 6) float32, the
    part of the object's box that lies in the token's cell as xyxy fractions of the picture, and the cell's centre. A
    token cannot know how far its object reaches (rotary positions are relative), but it can know its own part.
    """
    y, x = np.divmod(np.arange(columns * lines), columns)
    size = np.array([1 / columns, 1 / lines])
    low = np.stack([x, y], axis=1) * size
    kind = np.zeros((len(low), 2), np.int64)
    box = np.concatenate([np.zeros((len(low), 4)), low + size / 2], axis=1)
    most = np.full(len(low), 0.25)
    colors = list(COLORS)
    for whole, shape, color in zip(scene.boxes, scene.shapes, scene.colors, strict=True):
        first, last = np.maximum(whole[:2], low), np.minimum(whole[2:], low + size)
        share = ((last - first).clip(min=0) / size).prod(axis=1)
        inside = share >= most
        inside |= (low <= (whole[:2] + whole[2:]) / 2).all(1) & ((whole[:2] + whole[2:]) / 2 < low + size).all(1)
        most[inside] = np.maximum(most[inside], share[inside])
        kind[inside] = SHAPES.index(shape) + 1, colors.index(color) + 1 if color else 0
        box[inside, :4] = np.concatenate([first, last], axis=1)[inside]
    return torch.from_numpy(kind), torch.from_numpy(box).float()


def edge_targets(boxes: np.ndarray, columns: int, lines: int) -> torch.Tensor:
    """Say in which cells the edge lies that each number of an answer states.

    Output: (4 n, columns * lines) bool for n boxes: the cells of the left column of the box, of its top line, of its
    right column, of its bottom line; a cell of which the box fills under a quarter is passed over.
    """
    masks = np.zeros((len(boxes), 4, lines, columns), dtype=bool)
    size = np.array([columns, lines])
    for mask, box in zip(masks, boxes, strict=True):
        first = np.minimum(np.floor(box[:2] * size + 0.25).astype(int), size - 1)
        last = np.maximum(np.ceil(box[2:] * size - 0.25).astype(int) - 1, first)
        (left, top), (right, bottom) = first, last
        mask[0, top : bottom + 1, left] = mask[2, top : bottom + 1, right] = True
        mask[1, top, left : right + 1] = mask[3, bottom, left : right + 1] = True
    return torch.from_numpy(masks.reshape(-1, lines * columns))


class Helpers(nn.Module):
    """The heads of losses 2 and 3; they are not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(SHAPES) + 1 + len(COLORS) + 1)
        self.offset = nn.Linear(width, 4)
        self.norm = nn.RMSNorm(width)
        self.numbers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))


def soft_numbers(logits: torch.Tensor, value: torch.Tensor, spread: float = 4.0) -> torch.Tensor:
    """Cross entropy of logits (n, 1000) against a bell of `spread` around each value (n,); returns the mean."""
    scale = torch.arange(1000, dtype=torch.float32)
    target = torch.softmax(-((scale[None] - value[:, None]) ** 2) / (2 * spread**2), dim=1)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def losses(
    model: Any,
    helpers: Helpers,
    batch: dict[str, torch.Tensor],
    numbers: torch.Tensor,
    *,
    vision_only: bool,
    bf16: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Run one batch; returns the losses to add up, and figures to print."""
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=bf16)
    with half():
        vision = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    seen = torch.cat(vision.pooler_output).float()
    kind, box = batch["cell_kind"], batch["cell_box"]
    covered = kind[:, 0] > 0
    guess = helpers.kind(seen)
    split = len(SHAPES) + 1
    truth = (box[covered, :4] - box[covered][:, [4, 5, 4, 5]]) * 7  # about one per cell
    result = {
        "object": F.binary_cross_entropy_with_logits(guess[:, 0], covered.float()),
        "shape": F.cross_entropy(guess[covered, 1:split], kind[covered, 0] - 1),
        "color": F.cross_entropy(guess[covered, split:], kind[covered, 1]),
        "offset": F.l1_loss(helpers.offset(seen[covered]), truth) * 5,
    }
    right = guess[covered, 1:split].argmax(1) == kind[covered, 0] - 1
    figures = {"shape_right": float(right.float().mean())}
    if vision_only:
        return result, figures

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")}
    with half():
        outputs = model.model(
            **inputs,
            mm_encoder_outputs={"image": vision},
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
    table = model.get_input_embeddings().weight[numbers]
    image_tokens = batch["input_ids"] == model.config.image_token_id
    middle = helpers.norm(outputs.hidden_states[2].float()[image_tokens][covered])
    result["middle"] = (
        sum(
            soft_numbers(head(middle) @ table.T, (box[covered, j] * 1000).round().clamp(max=999))
            for j, head in enumerate(helpers.numbers)
        )
        / 4
    )

    target = batch["labels"][:, 1:]
    kept = target != -100
    logits = model.lm_head(outputs.last_hidden_state[:, :-1].float()[kept])
    target = target[kept]
    value = torch.full((model.config.text_config.vocab_size,), -1.0)
    value[numbers] = torch.arange(1000, dtype=torch.float32)
    is_number = value[target] >= 0
    result["text"] = F.cross_entropy(logits[~is_number], target[~is_number])
    inside = logits[is_number]
    in_numbers = inside[:, numbers]
    reach = (inside.logsumexp(1) - in_numbers.logsumexp(1)).mean()  # the share of probability given to other tokens
    result["number"] = soft_numbers(in_numbers, value[target[is_number]]) + reach

    row, place = kept.nonzero(as_tuple=True)
    row, place = row[is_number], place[is_number]
    start = image_tokens.int().argmax(dim=1)[row]
    cell = start[:, None] + torch.arange(batch["edges"].shape[1])
    looks = [outputs.attentions[layer][row, head, place].float() for layer, head in ((2, 0), (3, 0), (3, 1))]
    shares = torch.stack([(look.gather(1, cell) * batch["edges"]).sum(dim=1) for look in looks])
    result["look"] = -(shares + 1e-4).log().mean() if len(row) else torch.zeros(())
    with torch.no_grad():
        read = in_numbers.argmax(dim=1).float()
        found, wanted = (
            read[: len(read) // 4 * 4].view(-1, 4),
            value[target[is_number]][: len(read) // 4 * 4].view(-1, 4),
        )
        low, high = torch.maximum(found[:, :2], wanted[:, :2]), torch.minimum(found[:, 2:], wanted[:, 2:])
        both = (high - low).clamp(min=0).prod(1)
        area = (found[:, 2:] - found[:, :2]).clamp(min=0).prod(1) + (wanted[:, 2:] - wanted[:, :2]).prod(1)
        iou = (both / (area - both).clamp(min=1)).mean()
        figures["iou"] = float(iou)
    return result, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--vision-steps", type=int, default=1400)
    parser.add_argument("--start", type=Path, help="go on from the weights of this folder")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster where the CPU has AVX-512 BF16")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW takes a tenth")
    parser.add_argument(
        "--ramp", type=int, default=300, help="whole-model steps after which every picture is a hard one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()

    names = [*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES[:14])]
    corpus = [SYSTEM_PROMPT, *OTHER_SYSTEM_PROMPTS, *EXTRA_CORPUS, *(f" {word}" for word in EXTRA_CORPUS)] * 20
    corpus += [build_user_prompt([name]) + answer_text(np.array([[0.1, 0.2, 0.3, 0.4]] * 2), name) for name in names]
    corpus += [build_user_prompt(names[i : i + 3]) for i in range(0, len(names), 3)]
    corpus = [
        piece
        for line in corpus
        for piece in line.replace("<|", "|>").split("|>")
        if not piece.endswith(("start", "end"))
    ]
    corpus += ["system\n", "user\n", "assistant\n"] * 50
    tokenizer = build_tokenizer(corpus)
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl.jinja").read_text(encoding="utf-8")
    processor = build_processor(tokenizer, template)
    model = build_model(tokenizer, seed=args.seed)
    model.set_attn_implementation({"text_config": "eager"})  # loss 4 needs to see attention
    if args.start:
        model.load_state_dict(
            Qwen2VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).state_dict()
        )
    numbers, _ = number_ids(tokenizer)
    split = [value for value in range(1000) if len(tokenizer(str(value))["input_ids"]) != 1]
    if split:
        raise SystemExit(f"{len(split)} numbers are not one token: {split[:5]}")
    helpers = Helpers(model.config.text_config.hidden_size)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} pieces, {TINY_MAX_PIXELS} pixels"
    )

    groups = muon_groups(model, lr=args.lr, weight_decay=0.01)
    groups.append({"params": [*helpers.parameters()], "lr": args.lr / 10, "weight_decay": 0.01, "muon": False})
    optimizer = Muon(groups, lr=args.lr)
    others = [weight for group in groups if not group["muon"] for weight in group["params"]]

    def rate(step: int) -> float:
        return min((step + 1) / 60, 1.0) * min(1.0, max(1.0 - step / args.steps, 0.01) / 0.5)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream = Questions(
        processor, batch=args.batch, steps=args.steps, alone=args.vision_steps, ramp=args.ramp, seed=args.seed
    )
    loader = DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    started, sums, count = time.time(), {}, 0
    with args.log.open("w", encoding="utf-8") as log:
        for step, batch in enumerate(loader, start=1):
            model.train()
            terms, figures = losses(
                model, helpers, batch, numbers, vision_only=step <= args.vision_steps, bf16=args.bf16
            )
            torch.stack([*terms.values()]).sum().backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            for key, number in {**{k: float(v.detach()) for k, v in terms.items()}, **figures}.items():
                sums[key] = sums.get(key, 0.0) + number
            count += 1
            if step % 25 == 0 or step == args.steps:
                row = {
                    "step": step,
                    "seconds": round(time.time() - started),
                    **{k: round(v / count, 4) for k, v in sums.items()},
                }
                print(json.dumps(row), flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
                sums, count = {}, 0
            if step % 250 == 0 or step == args.steps:
                save(model, processor, args.out)


def save(model: Any, processor: Any, out: Path) -> None:
    """Write model (bfloat16), processor and generation settings to a folder."""
    import copy

    out.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    half.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    half.save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
