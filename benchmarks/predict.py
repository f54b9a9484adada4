"""Pictures per second of the engine `hf` against one picture at a time through transformers' `generate`; one JSON line.

    python benchmarks/predict.py                     # 192 pictures, the embedded base: about a minute
    python benchmarks/predict.py --rows 16           # a trial
    python benchmarks/predict.py --model runs/demo   # a tuned model

Both open, resize and ask about the same drawn pictures with the same model, greedily. The peer is what a page of documentation
shows: `apply_chat_template`, the processor, `generate`, for one picture. Turns alternate in one process, after a warm-up. Every
box must be the same, or nothing is printed; the peer answers on an eighth of the pictures, since it is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEER_SHARE = 8
MAX_NEW_TOKENS = 128


def generate_one_by_one(loaded: Any, contract: Any, samples: list[Any]) -> list[list[list[float]]]:
    """Ask about one picture after the other as transformers' documentation does; returns the boxes of each."""
    import torch

    from vlmdet.data.dataset import messages_of
    from vlmdet.grounding import get_codec
    from vlmdet.grounding.sizes import plan_view

    processor, model = loaded.processor, loaded.model
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    boxes = []
    for sample in samples:
        image = sample.image
        messages = messages_of(contract.system_prompt, contract.user_prompt)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
        view = plan_view(*image.size, **limits, factor=contract.size_factor)
        boxes.append(get_codec(contract.codec).parse(answer.removesuffix("<|im_end|>"), view).boxes.tolist())
    return boxes


def main() -> None:
    """Draw, ask in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from vlmdet.data.readers import open_dataset
    from vlmdet.data.synthetic.packages import write_drawn_set
    from vlmdet.evaluation.predict import predict
    from vlmdet.models.inference import hf_engine
    from vlmdet.models.loader import load, make_contract

    loaded = load(args.model)
    contract = loaded.contract or make_contract(
        loaded, labels=["text block"], box_order="raster", max_new_tokens=MAX_NEW_TOKENS, data_fingerprint=""
    )
    seconds: dict[str, list[float]] = {"hf": [], "generate": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_drawn_set(Path(scratch) / "drawn", train=1, val=1, test=args.rows, seed=0)
        samples = list(open_dataset(str(folder)).splits["test"])
        few = samples[:: min(PEER_SHARE, len(samples))]
        engine = hf_engine(loaded, contract=contract, batch_size=args.batch_size, max_new_tokens=MAX_NEW_TOKENS)
        predict(engine, samples[: args.batch_size], contract=contract)  # warm-up
        generate_one_by_one(loaded, contract, few[:2])
        for _ in range(args.turns):
            started = time.perf_counter()
            rows = predict(engine, samples, contract=contract)
            seconds["hf"].append((time.perf_counter() - started) / len(samples))
            started = time.perf_counter()
            boxes = generate_one_by_one(loaded, contract, few)
            seconds["generate"].append((time.perf_counter() - started) / len(few))
            by_id = {row["id"]: row["boxes"] for row in rows}
            differ = [s.id for s, found in zip(few, boxes, strict=True) if by_id[s.id] != found]
            assert not differ, f"other boxes on {differ}"
    rate = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:>10}  {rate[name]:7.1f} pictures/s  turns {[round(1 / v, 1) for v in values]}", file=sys.stderr)
    result = {
        "benchmark": "predict",
        "peer": "transformers generate, one picture at a time",
        "model": args.model,
        "rows": len(samples),
        "peer_rows": len(few),
        "batch": args.batch_size,
        "turns": args.turns,
        "cores": os.cpu_count(),
        "boxes": sum(len(row["boxes"]) for row in rows),
        "answer_tokens": round(statistics.mean(row["tokens"]["answer"] for row in rows), 1),
        "pictures_per_second": {name: round(value, 1) for name, value in rate.items()},
        "ratio_to_generate": round(rate["hf"] / rate["generate"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
