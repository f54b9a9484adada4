"""The verb predict: boxes on pictures that nobody annotated.

When: after `vlmdet predict` is known; it imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlmdet.cli.common import add_allow, add_verb, allowed_fields
from vlmdet.cli.engine import add_engine, contract_asked, engine_overrides, make_server
from vlmdet.errors import ConfigError


def add_predict(verbs: Any) -> None:
    """Describe `vlmdet predict`."""
    predict = add_verb(
        verbs, "predict", _predict, "find objects in pictures: JSON lines, and the pictures with boxes drawn",
        [
            "vlmdet predict photo.jpg --model runs/demo",
            "vlmdet predict *.jpg --model runs/demo --out drawn/",
            'vlmdet predict photo.jpg --model tiny --classes "red star"',
        ],
    )  # fmt: skip
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument("--model", required=True, help="a run, tiny, a hub id, or a folder of weights")
    predict.add_argument("--classes", action="append", metavar="NAME", help="what to look for; a run brings its own")
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the drawn pictures")
    predict.add_argument("--min-pixels", type=int, help="for a base other than tiny")
    predict.add_argument("--max-pixels", type=int, help="for a base other than tiny")
    add_allow(predict)
    add_engine(predict)


def _predict(args: argparse.Namespace) -> None:
    from vlmdet.images import open_image

    allow = allowed_fields(args)
    sizes = [open_image(path).size for path in args.images]

    from vlmdet.boxes import Boxes
    from vlmdet.config import load_settings
    from vlmdet.contract import permitted, refuse_mismatch, tell_permitted
    from vlmdet.evaluation.evaluate import scorer
    from vlmdet.evaluation.predict import predict
    from vlmdet.evaluation.scores import TOKEN_SOURCES
    from vlmdet.models.inference import MAX_NEW_TOKENS, hf_engine
    from vlmdet.models.loader import load, load_without_weights, make_contract
    from vlmdet.records import Sample
    from vlmdet.utils.visualization import visualize_bbox_on_image

    known = load if args.engine == "hf" else load_without_weights  # a server has the weights
    loaded = known(args.model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    labels = tuple(args.classes or (loaded.contract.labels if loaded.contract else ()))
    if not labels:
        raise ConfigError(f"{args.model} is no run, so it does not know what to look for", "name it with --classes")
    contract = make_contract(
        loaded,
        labels=labels,
        codec=loaded.contract.codec if loaded.contract else "auto",
        box_order="raster",
        max_new_tokens=MAX_NEW_TOKENS,
        data_fingerprint="",
    )
    allowed = {}
    if loaded.contract is not None:
        refuse_mismatch(loaded.contract, contract, allow=allow)
        allowed = permitted(loaded.contract, contract, allow)
        for line in tell_permitted(allowed):
            print(line, file=sys.stderr)
    samples = [
        Sample(str(path), path, width, height, Boxes.empty(), (), source=str(path))
        for path, (width, height) in zip(args.images, sizes, strict=True)
    ]
    evaluation = load_settings(None, engine_overrides(args)).evaluation
    contract = contract_asked(args, contract)
    if args.engine == "openai":
        engine = make_server(args, loaded.processor, contract, evaluation)
    else:
        engine = hf_engine(
            loaded,
            contract=contract,
            batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.max_new_tokens,
            logprobs=evaluation.scores in TOKEN_SOURCES,
            constrain=evaluation.constrain,
            samples=evaluation.consistency_samples if evaluation.scores == "consistency" else 0,
        )
    rows = predict(
        engine,
        samples,
        contract=contract,
        max_errors=evaluation.max_errors,
        score=scorer(evaluation.scores, contract),
        score_source=evaluation.scores,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    taken: set[Path] = set()
    for row, path in zip(rows, args.images, strict=True):
        drawn = args.out / f"{path.stem}.png"
        while drawn in taken:  # two pictures of one name from different folders
            drawn = drawn.with_stem(f"{drawn.stem}-again")
        taken.add(drawn)
        visualize_bbox_on_image(open_image(path), row["boxes"], row["labels"]).save(drawn)
        shown = {key: value for key, value in row.items() if key != "truth"} | {"drawn": str(drawn)}
        print(json.dumps(shown | ({"allow": allowed} if allowed else {})))
