"""Training steps of vlmdet against a plain script of TRL, on drawn photographs of 2 megapixels; prints one JSON line.

    python benchmarks/train_step.py                          # 300 pictures, 3 epochs, every lever: about 12 minutes
    python benchmarks/train_step.py --rows 16 --epochs 2     # a trial
    python benchmarks/train_step.py --sides trl order        # two sides only

The embedded base, recipe `lora-light`, fp32, no dropout, no recomputed activations (TRL's default recomputes), the same
attention, optimiser, pixels and rows in the same order on all sides. The peer is `SFTTrainer` with TRL's own vision collator in
prompt-completion form, `max_length=None`; the newline that it trains after `<|im_end|>` is masked, so the losses can be compared.

Each side is a process of its own. They take turns, one epoch each, in the order below; those that wait do nothing. The
time of an epoch is that from the trainer's `on_epoch_begin` to `on_epoch_end`: data, forward, backward and optimiser. The first
epoch stands apart: it fills the caches.

    trl        the peer
    vlmdet     V3 collator and the norms of gradients that every run logs; no lever
    pictures   + pictures resized once          logits    + logits only where labels are
    worker     + one process that loads         grouped   + batches of rows of like length (another order of rows)
    order      pictures and logits: the levers that keep the order of rows and the loss of each step (a)
    order+w    the same with the worker
    b          order + grouped                  features  + features of the frozen vision tower, none of the others
    c          b with features instead of pictures; its first epoch has the tower's pass over all pictures in it

Then, in fresh processes, the peak memory of one epoch of `order` and of `c` with few rows and with many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import photographs

SIDES: dict[str, tuple[str, ...]] = {
    "trl": (),
    "vlmdet": (),
    "pictures": ("pictures",),
    "logits": ("logits",),
    "worker": ("worker",),
    "grouped": ("grouped",),
    "features": ("features",),
    "order": ("pictures", "logits"),
    "order+w": ("pictures", "logits", "worker"),
    "b": ("pictures", "logits", "grouped"),
    "c": ("features", "logits", "grouped"),
}
PEER = "trl"
BATCH, ACCUMULATION = 8, 2  # 16 rows a step, as the recipe has


class Turns:
    """The child's end of taking turns: an answer for each epoch, on the real stdout, after a line on stdin."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        self.started = 0.0
        self.extra: dict[str, Any] = {}
        self.has_turn = False

    def say(self, **message: Any) -> None:
        """Send one message to the parent."""
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def begin(self) -> None:
        """Wait for the turn, unless it is ours already, and start the clock."""
        if not self.has_turn:
            self.say(event="waits")
            if not sys.stdin.readline():
                raise SystemExit("the parent is gone")
            self.has_turn = True
        self.started = time.perf_counter()

    def end(self) -> None:
        """Give the turn back, with the seconds since `begin` and what else was noted."""
        self.say(
            event="epoch",
            seconds=time.perf_counter() - self.started + self.extra.get("fill_seconds", 0.0),
            **self.extra,
        )
        self.has_turn, self.extra = False, {}


def run_side(side: str, folder: Path, count: int, epochs: int) -> None:
    """Train one side, in turns; the child's main function."""
    turns = Turns()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        losses = train(side, folder, count, epochs, Path(scratch), turns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    turns.say(event="done", losses=losses, peak_mb=peak)


def train(side: str, folder: Path, count: int, epochs: int, scratch: Path, turns: Turns) -> list[float]:
    """Build and run the trainer of a side; returns the loss of each optimiser step."""
    import transformers
    from trl import SFTConfig, SFTTrainer

    from vlmdet.config import find_recipe, load_settings
    from vlmdet.models.loader import load
    from vlmdet.models.lora import build_lora_config

    levers = SIDES[side]
    settings = load_settings(find_recipe("lora-light"), ["model.name=tiny", "lora.dropout=0"])
    transformers.set_seed(0)
    base = load("tiny", dtype="float32", device="cpu", attention="sdpa")
    model, processor = base.model, base.processor
    model.config.use_cache = False
    lora = settings.lora
    adapter = build_lora_config(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)

    class InTurns(transformers.TrainerCallback):
        """Waits for the turn before each epoch and gives it back after."""

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end()

    arguments = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=epochs,
        learning_rate=settings.training.learning_rate,
        lr_scheduler_type=settings.training.schedule,
        max_length=None,
        activation_checkpointing=False,  # TRL's own default recomputes
        use_cpu=True,
        bf16=False,
        remove_unused_columns=False,
        dataloader_num_workers=int("worker" in levers),
        dataloader_persistent_workers="worker" in levers,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    common = {"model": model, "args": arguments, "processing_class": processor, "peft_config": adapter}
    if side == PEER:
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)
        trainer = SFTTrainer(
            train_dataset=photographs.prompt_completion_rows(folder, count),
            data_collator=lambda rows: photographs.mask_newline(theirs(rows)),
            callbacks=[InTurns()],
            **common,
        )
    else:
        trainer = build_ours(levers, folder, count, scratch, turns, common, InTurns())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def build_ours(
    levers: tuple[str, ...],
    folder: Path,
    count: int,
    scratch: Path,
    turns: Turns,
    common: dict[str, Any],
    in_turns: Any,
) -> Any:
    """Build the trainer as `vlmdet train` does, with some levers."""
    from trl import SFTTrainer

    from vlmdet.data.collators import Qwen2VLCollatorV3
    from vlmdet.data.resized import ResizedCollator, ResizedPictures, undecoded
    from vlmdet.training.batches import LengthGroups
    from vlmdet.training.callbacks import GradNormCallback
    from vlmdet.training.lengths import count_tokens
    from vlmdet.training.losses import score_supervised_only
    from vlmdet.training.vision_cache import FeatureCollator, FrozenFeatures

    processor = common["processing_class"]
    size = processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    rows = photographs.training_rows(folder, count)
    collator: Any = Qwen2VLCollatorV3(processor, **limits)
    if "pictures" in levers:
        pictures = ResizedPictures(scratch / "pictures", processor.image_processor, **limits)
        rows, collator = undecoded(rows), ResizedCollator(collator, pictures)
    trainer = SFTTrainer(
        train_dataset=undecoded(rows) if "features" in levers else rows,
        data_collator=collator,
        callbacks=[GradNormCallback(), in_turns],
        **common,
    )
    if "grouped" in levers:
        sizes = [row["size"] for row in photographs.read(folder, count)]
        lengths = count_tokens(rows, sizes, processor, **limits).total.tolist()
        order = LengthGroups(lengths, batch=BATCH * ACCUMULATION, seed=0, epoch=lambda: int(trainer.state.epoch or 0))
        trainer._get_train_sampler = lambda dataset=None: order
    if "logits" in levers:
        score_supervised_only(trainer.model)
    if "features" in levers:
        features = FrozenFeatures(trainer.model, processor, scratch / "features", **limits)
        turns.begin()
        filled = features.fill(trainer.model, rows)
        turns.extra = {"fill_seconds": time.perf_counter() - turns.started, "fill_mb": filled.megabytes}
        trainer.data_collator = FeatureCollator(collator, features)
    return trainer


class Side:
    """The parent's end of one side: a process that waits for its turns."""

    def __init__(self, name: str, folder: Path, count: int, epochs: int) -> None:
        command = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
        command += ["--rows", str(count), "--epochs", str(epochs)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.name = name
        self.epochs: list[dict[str, Any]] = []
        self.done: dict[str, Any] = {}
        self.expect("waits")

    def expect(self, event: str) -> dict[str, Any]:
        """Read the next message, which must be of this kind."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line else {}
        if message.get("event") != event:
            self.log.seek(0)
            raise SystemExit(f"{self.name} stopped ({line!r} instead of {event}):\n{self.log.read()[-4000:]}")
        return message

    def epoch(self, *, last: bool) -> None:
        """Let the side train one epoch; after the last one, let it finish."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.epochs.append(self.expect("epoch"))
        if last:
            self.done = self.expect("done")
            self.process.wait()
            self.process.stdin.close()
            self.log.close()
        else:
            self.expect("waits")


def supervised_tokens(folder: Path, count: int) -> int:
    """Count the tokens that carry loss in one epoch: answers and their end tokens."""
    from vlmdet.models.loader import load_processor
    from vlmdet.training.lengths import count_tokens

    processor = load_processor("tiny", min_pixels=None, max_pixels=None)
    sizes = [row["size"] for row in photographs.read(folder, count)]
    rows = photographs.training_rows(folder, count)
    return int(count_tokens(rows, sizes, processor, min_pixels=784, max_pixels=50_176).answer.sum())


def alone(what: str, folder: Path, count: int) -> str:
    """Run one part in a process of its own, so that this one stays small; returns what it prints."""
    command = [sys.executable, __file__, "--only", what, "--folder", str(folder), "--rows", str(count)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def compare(sides: list[Side], tokens: int) -> dict[str, Any]:
    """Make the figures: supervised tokens per second, their ratio to the peer's, and the largest difference of a step's loss."""
    seconds = {side.name: [epoch["seconds"] for epoch in side.epochs] for side in sides}
    first = {name: values[0] for name, values in seconds.items()}
    later = {name: statistics.median(values[1:]) if values[1:] else values[0] for name, values in seconds.items()}
    whole = {name: statistics.mean(values) for name, values in seconds.items()}
    parts = {"first": first, "later": later, "all": whole}
    result: dict[str, Any] = {
        "tokens_per_second": {
            name: {part: round(tokens / values[name], 1) for part, values in parts.items()} for name in seconds
        }
    }
    for key, against in (("ratio_to_trl", PEER), ("gain_alone", "vlmdet")):
        if against in seconds:
            result[key] = {
                name: {part: round(values[against] / values[name], 2) for part, values in parts.items()}
                for name in seconds
                if name != against and (key == "ratio_to_trl" or len(SIDES[name]) == 1)
            }
    losses = {side.name: side.done["losses"] for side in sides}
    if PEER in losses:
        result["largest_loss_difference"] = {
            name: max(abs(a - b) for a, b in zip(values, losses[PEER], strict=True))
            for name, values in losses.items()
            if name != PEER and "grouped" not in SIDES[name]
        }
    result["last_loss"] = {name: round(values[-1], 4) for name, values in losses.items()}
    result["features"] = {
        side.name: {key: round(side.epochs[0][key], 2) for key in ("fill_seconds", "fill_mb")}
        for side in sides
        if "features" in SIDES[side.name]
    }
    result["peak_mb"] = {side.name: round(side.done["peak_mb"]) for side in sides}
    return result


def show(result: dict[str, Any]) -> None:
    """Write a table of the sides to stderr."""
    head = ("side", "tok/s first", "later", "all", "x trl first", "later", "all", "loss differs by", "peak MB")
    lines = [head]
    for name, speeds in result["tokens_per_second"].items():
        ratios = result.get("ratio_to_trl", {}).get(name, {})
        difference = result.get("largest_loss_difference", {}).get(name)
        lines.append(
            (
                name,
                *(f"{speeds[part]:.0f}" for part in ("first", "later", "all")),
                *(f"{ratios[part]:.2f}" if ratios else "" for part in ("first", "later", "all")),
                "" if difference is None else f"{difference:.1e}",
                str(result["peak_mb"][name]),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), file=sys.stderr)


def peak(name: str, folder: Path, count: int) -> float:
    """Train one epoch of a side on its own; returns its peak memory in MB."""
    side = Side(name, folder, count, 1)
    side.epoch(last=True)
    return float(round(side.done["peak_mb"], 1))


def main() -> None:
    """Draw, train in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[100, 400], help="none: no memory check")
    parser.add_argument("--only", choices=("draw", "tokens", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "draw":
        photographs.draw(args.folder, args.rows)
        return
    if args.only == "tokens":
        print(supervised_tokens(args.folder, args.rows))
        return
    if args.only:
        run_side(args.only, args.folder, args.rows, args.epochs)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photographs"
        alone("draw", folder, max(args.rows, *args.memory_rows, 1))
        tokens = int(alone("tokens", folder, args.rows))
        sides = []
        try:
            for name in args.sides:
                sides.append(Side(name, folder, args.rows, args.epochs))
            for epoch in range(args.epochs):
                for side in sides:
                    side.epoch(last=epoch == args.epochs - 1)
        finally:
            for side in sides:
                side.process.kill()  # nothing where it has ended
        result: dict[str, Any] = {
            "benchmark": "train_step",
            "peer": "trl",
            "rows": args.rows,
            "epochs": args.epochs,
            "rows_a_step": BATCH * ACCUMULATION,
            "supervised_tokens_an_epoch": tokens,
            "cores": os.cpu_count(),
        } | compare(sides, tokens)
        result["peak_mb_by_rows"] = {
            name: {str(count): peak(name, folder, count) for count in args.memory_rows}
            for name in ("order", "c")
            if args.memory_rows
        }
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
