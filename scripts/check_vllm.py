"""Compare a served model with the same model in this process: called by `check_vllm.sh`, which starts the server.

When: by hand, after a change of the engine `openai`, of prompts or of pictures; what it prints belongs into experiments/LOG.md.

    python scripts/check_vllm.py served MODEL FOLDER          prints the folder to serve; merges a run into FOLDER
    python scripts/check_vllm.py compare FOLDER URL --model MODEL --pictures 48 [--record tests/evaluation/recorded]

It ends with code 1 where an answer that should be equal is not in more than 1 picture of 20, a score is missing, a constrained
answer does not parse, or the server reads another prompt.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.config import load_settings
from vlmdet.contract import Contract
from vlmdet.data.dataset import build_messages
from vlmdet.data.synthetic.shapes import draw_scene
from vlmdet.evaluation.completions import chat_message
from vlmdet.evaluation.connection import Connection, RequestFailed
from vlmdet.evaluation.rendering import Rendering
from vlmdet.evaluation.server import openai_engine
from vlmdet.grounding import get_codec
from vlmdet.grounding.grammar import answer_pattern
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask
from vlmdet.models.inference import hf_engine
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.models.stages import is_adapter, stages_of
from vlmdet.models.tiny import TINY_DIR
from vlmdet.records import Sample
from vlmdet.runs import need_run
from vlmdet.training.merge import merge_run
from vlmdet.training.prepare import read_data

NAME = "checked"
MAX_NEW_TOKENS = 128
MAX_BOXES = 10
CORNERS = {"axis_swapped", "both_axes_reversed", "zero_area"}
"""Problems of numbers that a regular expression cannot keep apart, see `grounding.grammar`."""

LABELS = ("cross",)
SEEDS = (0, 2, 7)
"""Scenes of the recorded exchanges: one cross; two; none."""

PATTERN = (
    r"(<\|object_ref_start\|>cross<\|object_ref_end\|><\|box_start\|>"
    r"\([0-9]{1,3},[0-9]{1,3}\),\([0-9]{1,3},[0-9]{1,3}\)<\|box_end\|>){2}"
)
"""Two boxes, no more and no less: other than the model says of itself, so that it shows."""


def served(model: str, out: Path) -> Path:
    """Return the folder to serve."""
    if model == "tiny":
        return TINY_DIR
    run = need_run(model)
    whole = Path(stages_of(str((run / "checkpoints" / "best").resolve())).folders[-1])
    if not is_adapter(whole):
        return whole
    merge_run(model, out=out, skip_eval=True, say=lambda text: print(text, file=sys.stderr))
    return out


def samples_of(model: str, count: int) -> tuple[list[Sample], tuple[str, ...] | None]:
    """Return pictures to ask about: of a run those of its evaluation split, else drawn scenes; labels of a run are its own."""
    if model != "tiny":
        settings = load_settings(need_run(model) / "config.yaml")
        dataset = read_data(settings, lambda text: print(text, file=sys.stderr))
        return list(dataset.splits[settings.evaluation.split])[:count], None
    rng = np.random.default_rng(5)
    samples = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(150, 500, 2))
        scene = draw_scene(rng, width, height, objects=int(rng.integers(1, 4)), smallest=0.2, largest=0.7)
        data = png(scene.image)
        samples.append(Sample(f"scene-{number}", lambda data=data: data, width, height, Boxes.empty(), ()))
    return samples, LABELS


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def asks_of(samples: Sequence[Sample], contract: Contract) -> list[Ask]:
    messages = build_messages(contract.labels, codec=contract.codec)
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels, "factor": contract.size_factor}
    return [
        Ask(i, sample, messages, plan_view(sample.width, sample.height, **limits)) for i, sample in enumerate(samples)
    ]


def run(engine: Any, asks: Sequence[Ask]) -> tuple[list[Answer], float]:
    """Return the answers in order and the seconds that they took; every row must have one."""
    started = time.perf_counter()
    results = dict(engine(asks))
    seconds = time.perf_counter() - started
    for index, result in sorted(results.items()):
        if not isinstance(result, Answer):
            raise SystemExit(f"picture {index}: {result.reason}")
    return [results[ask.index] for ask in asks], seconds


def same_prompts(url: str, rendering: Rendering, asks: Sequence[Ask]) -> int:
    """Count the pictures for which /tokenize gives the ids of the training prompt."""
    equal = 0
    with Connection(url + "/v1", timeout=60, retries=2) as connection:
        for ask in asks:
            picture = rendering.picture(ask.sample.image)
            assert picture is not None
            data = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
            messages = [chat_message(message, data) for message in ask.messages]
            said = connection.post("/tokenize", {"model": NAME, "messages": messages}, at_root=True)
            equal += tuple(said["tokens"]) == rendering.ids(ask.messages, ask.view)
    return equal


def compare(folder: str, url: str, *, model: str, pictures: int, record: Path | None) -> bool:
    """Ask both, print what is equal, and tell whether all is well."""
    samples, labels = samples_of(model, pictures)
    loaded = load("tiny" if model == "tiny" else folder, dtype="float32", device="cpu")
    contract = loaded.contract or make_contract(
        loaded, labels=labels or (), box_order="raster", max_new_tokens=MAX_NEW_TOKENS, data_fingerprint=""
    )
    rendering = Rendering(loaded.processor, contract)
    asks = asks_of(samples, contract)
    codec = get_codec(contract.codec)

    def pattern(view: Any) -> str:
        return answer_pattern(contract.codec, contract.labels, view, MAX_BOXES)

    common: dict[str, Any] = {"contract": contract, "max_new_tokens": MAX_NEW_TOKENS, "logprobs": True}
    prompts = same_prompts(url, rendering, asks)
    theirs, seconds = run(openai_engine(url, NAME, rendering=rendering, **common), asks)
    forced, _ = run(openai_engine(url, NAME, rendering=rendering, constrain=pattern, **common), asks)
    ours, own_seconds = run(hf_engine(loaded, batch_size=16, **common), asks)

    def boxes(answer: Answer, ask: Ask) -> tuple[Any, ...]:
        parsed = codec.parse(answer.text, ask.view)
        return parsed.boxes.tolist(), parsed.labels, parsed.status

    pairs = list(zip(theirs, ours, strict=True))
    same_tokens = sum(a.tokens == b.tokens and a.text == b.text for a, b in pairs)
    same_boxes = sum(boxes(a, ask) == boxes(b, ask) for (a, b), ask in zip(pairs, asks, strict=True))
    scored = sum(len(a.tokens) == len(a.logprobs) > 0 and "".join(a.tokens) == a.text for a in theirs)
    gaps = [abs(x - y) for a, b in pairs if a.tokens == b.tokens for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    parsed = [codec.parse(answer.text, ask.view) for answer, ask in zip(forced, asks, strict=True)]
    kinds = [{problem.kind for problem in said.problems} - CORNERS for said in parsed]
    clean = sum(
        answer.truncated or (said.status != "parse_failure" and not other and set(said.labels) <= set(contract.labels))
        for answer, said, other in zip(forced, parsed, kinds, strict=True)
    )
    corners = sum(any(problem.kind in CORNERS for problem in said.problems) for said in parsed)
    cut = sum(answer.truncated for answer in forced)
    n = len(asks)
    print(
        f"{model} served by vLLM ({version(url)}), {n} pictures, greedy, float32, {MAX_NEW_TOKENS} new tokens at most"
    )
    print(f"  prompt: /tokenize gives the ids of the training prompt        {prompts} of {n}")
    print(f"  prompt: ids that each request was read as, checked by engine  {n} of {n}")
    print(f"  answer: the same tokens as in this process                    {same_tokens} of {n}")
    print(f"  answer: the same boxes, labels and status                     {same_boxes} of {n}")
    print(f"  scores: a probability for every token                         {scored} of {n}")
    print(
        f"  scores: largest difference of a logarithm                     {max(gaps, default=0):.2g} of {len(gaps)} tokens"
    )
    print(
        f"  constrained: parses, and its labels are of the list           {clean} of {n}, {cut} of them cut at the limit"
    )
    print(f"  constrained: second corner left of or above the first         {corners} of {n}; no pattern forbids that")
    print(f"  seconds: server {seconds:.1f}, this process {own_seconds:.1f}")
    if record is not None:
        record_exchanges(url, record, loaded)
        print(f"  recorded exchanges: {record}")
    return prompts == n and scored == n and clean == n and min(same_tokens, same_boxes) >= 0.95 * n


def version(url: str) -> str:
    return str(httpx2.get(f"{url}/version").json()["version"])


class Recorder(httpx2.HTTPTransport):
    """Carries requests, and keeps what was said; of a picture only a hash of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: list[dict[str, Any]] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        response.read()
        said = response.json()
        said.pop("id", None)  # differ from run to run, and mean nothing
        said.pop("created", None)
        if request.url.path == "/v1/models":
            said["data"] = [{key: entry[key] for key in ("id", "object", "owned_by")} for entry in said["data"]]
        body = json.loads(request.content) if request.content else None
        self.exchanges.append(
            {
                "method": request.method,
                "path": request.url.path,
                "body": without_pixels(body),
                "status": response.status_code,
                "reply": said,
            }
        )
        return response


def without_pixels(body: Any) -> Any:
    """Put a hash of its pixels in place of each picture in a request: compressed, they differ between versions of Pillow."""
    if isinstance(body, list):
        return [without_pixels(part) for part in body]
    if isinstance(body, dict):
        return {key: without_pixels(value) for key, value in body.items()}
    if isinstance(body, str) and body.startswith("data:image/png;base64,"):
        with Image.open(io.BytesIO(base64.b64decode(body.partition(",")[2]))) as image:
            return f"sha256 of pixels: {hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()}"
    return body


def record_exchanges(url: str, folder: Path, loaded: Loaded) -> None:
    """Ask about three small pictures in all the ways that tests replay, and write pictures and exchanges into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    contract = make_contract(
        loaded, labels=LABELS, box_order="raster", max_new_tokens=MAX_NEW_TOKENS, data_fingerprint=""
    )
    samples = []
    for seed in SEEDS:  # at the size that the model sees, so that nothing is resized
        scene = draw_scene(np.random.default_rng(seed), 140, 140, objects=3, smallest=0.25, largest=0.6)
        path = folder / f"scene-{seed}.png"
        scene.image.save(path)
        samples.append(Sample(path.stem, path, 140, 140, Boxes.empty(), ()))
    asks = asks_of(samples, contract)
    recorder = Recorder()
    common: dict[str, Any] = {"contract": contract, "transport": recorder, "concurrency": 1}
    common |= {"rendering": Rendering(loaded.processor, contract)}
    run(openai_engine(url, NAME, max_new_tokens=MAX_NEW_TOKENS, logprobs=True, **common), asks)
    constrained = openai_engine(
        url, NAME, max_new_tokens=MAX_NEW_TOKENS, logprobs=True, constrain=lambda view: PATTERN, **common
    )
    run(constrained, asks)
    run(openai_engine(url, NAME, max_new_tokens=6, **common), asks[:1])  # cut
    run(openai_engine(url, NAME, max_new_tokens=MAX_NEW_TOKENS, samples=3, seed=1, **common), asks[:1])
    refused = openai_engine(url, NAME, max_new_tokens=5000, **common)  # more than the context
    list(refused(asks[:1]))
    connection = Connection(url + "/v1", timeout=60, retries=0, transport=recorder)
    with connection, contextlib.suppress(RequestFailed):  # 404
        connection.post("/chat/completions", {"model": "another", "messages": asks[0].messages[:1]})
    kept = {json.dumps([e["method"], e["path"], e["body"]]): e for e in recorder.exchanges}
    text = json.dumps({"server": f"vLLM {version(url)}", "exchanges": list(kept.values())}, ensure_ascii=False)
    (folder / "vllm.json").write_text(text.replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("served")
    serve.add_argument("model")
    serve.add_argument("out", type=Path)
    check = verbs.add_parser("compare")
    check.add_argument("folder")
    check.add_argument("url")
    check.add_argument("--model", required=True)
    check.add_argument("--pictures", type=int, default=48)
    check.add_argument("--record", type=Path)
    args = parser.parse_args()
    if args.verb == "served":
        print(served(args.model, args.out))
        return 0
    if args.record is not None and args.model != "tiny":
        parser.error("exchanges are recorded of the embedded base")
    whole = compare(args.folder, args.url, model=args.model, pictures=args.pictures, record=args.record)
    print("all is well" if whole else "NOT WELL")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
