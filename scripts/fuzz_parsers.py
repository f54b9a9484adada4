"""Fuzz the parsers of all codecs: no exception, no box outside the picture, no text that takes long.

    .venv/bin/python scripts/fuzz_parsers.py --minutes 10 --seed 0

Texts are real answers (`$VLMDET_SHARED/data/outputs/dev.jsonl`, where it lies beside the checkout) and own encodings,
cut, spliced, repeated and sprinkled with marks; sentences of a small grammar of brackets, quotes, tags and numbers; and
random characters. Prints one JSON line; the exit code is 1 where something was found, and the texts go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding import CODECS, View

SECONDS_PER_MB = 3.0  # of processor time; a second on an idle machine
ALLOWANCE = 0.2  # for a short text
PIECES = (
    '[ ] { } ( ) （ ） 【 】 , ， : ： ; " \' “ ” \\ \\" ``` ```json // /* # <| |> < > \n \t <think> </think> <answer> </answer> '
    "<ref> </ref> <box> </box> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<loc0001> <loc_999> <loc_1000> <loc9999> <seg012> <s> </s> <OD> none null NaN Infinity -1 0 1 12.5 999 1000 1001 1e9 50% "
    '"bbox_2d" "label" \'bbox\' bbox_2d: "point_2d" "quad" cup 表 é \\u00e9 (1,2),(3,4) [1,2,3,4] '
    '{"bbox_2d":[1,2,3,4],"label":"cup"}'
).split(" ")


def seeds() -> list[str]:
    """Return real answers and encodings of every codec."""
    texts = []
    file = Path(os.environ.get("VLMDET_SHARED", Path(__file__).parents[2] / "shared")) / "data/outputs/dev.jsonl"
    if file.is_file():
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.5, 0.25, 0.75, 0.5]]))
    for labels in (["cup", "red car", "表"], ["<|im_end|>", 'it\'s "x"', "[1,2,3,4]"], ["<loc0001>", "\n", "\\"]):
        texts += [codec.encode(labels, boxes, View(640, 480, 644, 476)) for codec in CODECS.values()]
    return texts


def draw(rng: random.Random, texts: list[str]) -> str:
    """Draw one text."""
    way = rng.randrange(5)
    if way == 0:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 80)))
    if way == 1:
        return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(rng.randrange(200)))
    if way == 2:
        piece = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 4)))
        return rng.choice(texts)[: rng.randrange(60)] + piece * rng.choice((100, 1000, 20_000)) + rng.choice(texts)
    text = rng.choice(texts)
    for _ in range(rng.randrange(1, 8)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        change = rng.randrange(5)
        if change == 0:
            text = text[:i] + text[j:]
        elif change == 1:
            text = text[:i] + rng.choice(PIECES) + text[i:]
        elif change == 2:
            text = text[:i] + text[i:j] * rng.randrange(2, 4) + text[j:]
        elif change == 3:
            text = text[:i] + rng.choice(texts)[: rng.randrange(200)] + text[j:]
        else:
            text = text[:i]
        text = text[:20_000]
    return text


def check(name: str, text: str) -> str | None:
    """Parse a text by one codec; return what is wrong with the result."""
    started = time.process_time()
    try:
        parsed = CODECS[name].parse(text, View(640, 480, 644, 476))
    except Exception:  # what is looked for
        return traceback.format_exc(limit=-3)
    seconds = time.process_time() - started
    if seconds > ALLOWANCE + SECONDS_PER_MB * len(text) / 1e6:
        return f"{seconds:.2f} s for {len(text)} characters"
    xyxy = parsed.boxes.xyxy
    if not (np.isfinite(xyxy).all() and (xyxy >= 0).all() and (xyxy <= 1).all()):
        return f"a box outside the picture: {xyxy.tolist()}"
    if (xyxy[:, 2:] < xyxy[:, :2]).any() or len(xyxy) != len(parsed.labels):
        return "a reversed box, or a box without its label"
    if (parsed.status == "ok") != (len(xyxy) > 0) or (parsed.status == "parse_failure" and not parsed.problems):
        return f"status {parsed.status} with {len(xyxy)} boxes and {len(parsed.problems)} problems"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of all codecs.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, texts = random.Random(options.seed), seeds()
    count, found, slowest, kinds = 0, 0, 0.0, Counter[str]()
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        text = draw(rng, texts)
        for name in CODECS:
            started = time.process_time()
            wrong = check(name, text)
            slowest = max(slowest, (time.process_time() - started) / max(len(text), 1000) * 1e6)
            count += 1
            if wrong:
                found += 1
                kinds[name] += 1
                if found <= 20:
                    print(
                        f"{name}: {wrong}\n  {len(text)}: {text[:300]!r} … {text[-100:]!r}", file=sys.stderr, flush=True
                    )
    print(json.dumps({"parses": count, "found": found, "by_codec": dict(kinds), "slowest_s_per_mb": round(slowest, 2)}))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
