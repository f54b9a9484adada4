"""The flags that say who answers, and how: a model in this process, or one behind a server.

When: with `vlmdet eval` and `vlmdet predict`; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmdet.cli.common import given
from vlmdet.errors import ConfigError

SCORES = ("token_probability", "first_token", "consistency", "none")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say who answers, and how; each of them is a setting of `evaluation` or of the server."""
    parser.add_argument("--engine", choices=("hf", "openai"), default="hf", help="a model here, or one behind a server")
    parser.add_argument("--url", help="of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--served-name", metavar="MODEL", help="the name under which the server has the model")
    parser.add_argument(
        "--baseline",
        metavar="CODEC",
        help="the server has another model: ask it in this notation's words, e.g. plain_json",
    )
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds of one request (default: 120)"
    )
    parser.add_argument("--retries", type=int, default=5, metavar="N", help="of a request that fails (default: 5)")
    parser.add_argument(
        "--constrain", action="store_true", default=None, help="write nothing but the notation and the labels"
    )
    parser.add_argument("--scores", choices=SCORES, help="where a box's score comes from (default: token_probability)")
    parser.add_argument("--samples", type=int, metavar="K", help="answers that are drawn for --scores consistency")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at once")
    parser.add_argument("--max-errors", type=float, metavar="SHARE", help="of pictures that may fail (default: 0.05)")


def engine_overrides(args: argparse.Namespace) -> list[str]:
    """Turn the flags of the engine into dotted settings."""
    flags = given(args, "constrain", "scores", "samples", "batch_size", "max_errors")
    names = {"samples": "consistency_samples"}
    return [f"evaluation.{names.get(key, key)}={json.dumps(value)}" for key, value in flags.items()]


def make_server(args: argparse.Namespace, processor: Any, contract: Any, evaluation: Any) -> Any:
    """Make the engine of a server from the flags."""
    if not args.url or not args.served_name:
        raise ConfigError(
            "--engine openai needs --url and --served-name", "e.g. --url http://127.0.0.1:8000 --served-name m"
        )
    for flag, value, least in (("concurrency", args.concurrency, 1), ("retries", args.retries, 0)):
        if value < least:
            raise ConfigError(f"--{flag} {value}", f"give at least {least}")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout {args.timeout:g}", "give a number of seconds above 0")

    from vlmdet.evaluation.rendering import Rendering
    from vlmdet.evaluation.scores import TOKEN_SOURCES
    from vlmdet.evaluation.server import openai_engine
    from vlmdet.grounding.grammar import answer_pattern
    from vlmdet.models.answers import MAX_BOXES

    most = MAX_BOXES
    if evaluation.constrain:
        from vlmdet.models.constrain import boxes_that_fit

        # more boxes than there is room for would be cut off, and the last one lost; a baseline's own tokens are not known here
        fit = boxes_that_fit(processor.tokenizer, contract.codec, contract.labels, evaluation.max_new_tokens)
        most = min(MAX_BOXES, fit)
    return openai_engine(
        args.url,
        args.served_name,
        contract=contract,
        rendering=None if args.baseline else Rendering(processor, contract),
        max_new_tokens=evaluation.max_new_tokens,
        concurrency=args.concurrency,
        timeout=args.timeout,
        retries=args.retries,
        logprobs=evaluation.scores in TOKEN_SOURCES,
        constrain=(lambda view: answer_pattern(contract.codec, contract.labels, view, most))
        if evaluation.constrain
        else None,
        samples=evaluation.consistency_samples if evaluation.scores == "consistency" else 0,
        seed=evaluation.seed,
    )


def contract_asked(args: argparse.Namespace, contract: Any) -> Any:
    """Return the contract by which a server is asked: the run's, or a baseline's own words for the same pictures and labels."""
    from vlmdet.evaluation.native import native_contract
    from vlmdet.grounding import get_codec

    if args.baseline is None:
        return contract
    if args.engine != "openai":
        raise ConfigError("--baseline is of a model behind a server", "add --engine openai --url … --served-name …")
    get_codec(args.baseline)
    return native_contract(contract, args.baseline)
