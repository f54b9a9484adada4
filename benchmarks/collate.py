"""Batches per second of the default collator against TRL's vision collator, on drawn photographs of 2 megapixels; one JSON line.

    python benchmarks/collate.py                # 160 pictures, 3 epochs: about 2 minutes
    python benchmarks/collate.py --rows 16      # a trial

No model: rows are read, decoded and made into batches of 8, and the batch is thrown away. TRL's collator works in
prompt-completion form with `max_length=None`; ours once as it is, once with pictures that are resized once and kept on disk. They
take turns in one process, one epoch each; the first epoch stands apart, in which the cache is filled. Every batch is compared in
the first epoch: the same supervised ids (without TRL's newline) and the same pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photographs

BATCH = 8


def collators(folder: Path, count: int, cache: Path) -> dict[str, tuple[Any, Callable[[list[Any]], Any]]]:
    """Return rows and collator of each side."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from vlmdet.data.collators import Qwen2VLCollatorV3
    from vlmdet.data.resized import ResizedCollator, ResizedPictures, undecoded
    from vlmdet.models.loader import load_processor

    processor = load_processor("tiny", min_pixels=None, max_pixels=None)
    size = processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    rows = photographs.training_rows(folder, count)
    pictures = ResizedPictures(cache, processor.image_processor, **limits)
    return {
        "trl": (
            photographs.prompt_completion_rows(folder, count),
            DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True),
        ),
        "v3": (rows, Qwen2VLCollatorV3(processor, **limits)),
        "v3 cached": (undecoded(rows), ResizedCollator(Qwen2VLCollatorV3(processor, **limits), pictures)),
    }


def epoch(rows: Any, collate: Callable[[list[Any]], Any]) -> tuple[float, list[Any]]:
    """Make every batch of the rows once; returns the seconds, and of each batch labels and the sum of squared pixels."""
    kept = []
    seconds = 0.0
    for first in range(0, len(rows), BATCH):
        started = time.perf_counter()
        batch = collate([rows[i] for i in range(first, min(first + BATCH, len(rows)))])
        seconds += time.perf_counter() - started
        kept.append((batch["labels"], batch["pixel_values"].double().square().sum().item()))
    return seconds, kept


def check(sides: dict[str, list[Any]]) -> None:
    """Fail where a batch of one side is not that of the peer."""
    import torch

    for theirs, *ours in zip(*sides.values(), strict=True):
        expected = photographs.mask_newline({"labels": theirs[0]})["labels"]
        for labels, pixels in ours:
            assert torch.equal(labels, expected), "supervised ids differ"
            assert pixels == theirs[1], "pixels differ"


def main() -> None:
    """Draw, collate in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photographs"
        photographs.draw(folder, args.rows)
        sides = collators(folder, args.rows, Path(scratch) / "pictures")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.epochs):
            made = {}
            for name, (rows, collate) in sides.items():
                spent, made[name] = epoch(rows, collate)
                seconds[name].append(spent)
            if number == 0:
                check(made)
    first = {name: args.rows / values[0] for name, values in seconds.items()}
    later = {name: args.rows / statistics.median(values[1:] or values) for name, values in seconds.items()}
    for name in sides:
        print(f"{name:>10}  {first[name]:8.1f} rows/s first  {later[name]:8.1f} later", file=sys.stderr)
    result = {
        "benchmark": "collate",
        "peer": "trl",
        "rows": args.rows,
        "epochs": args.epochs,
        "batch": BATCH,
        "cores": os.cpu_count(),
        "rows_per_second": {name: {"first": round(first[name], 1), "later": round(later[name], 1)} for name in sides},
        "ratio_to_trl": {
            name: {"first": round(first[name] / first["trl"], 2), "later": round(later[name] / later["trl"], 2)}
            for name in sides
            if name != "trl"
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
