"""Ask a model where things are: generate, batched, and read the answer.

When: PER RUN, after loading. `evaluation.predict` runs whole data sets through the engine that `hf_engine` makes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor

from vlmdet.contract import Contract
from vlmdet.data.collators import collate_prompts
from vlmdet.data.collators_other import collate_other_prompts, end_token
from vlmdet.data.dataset import build_messages
from vlmdet.errors import DataError
from vlmdet.grounding import PIXEL_CODECS, View, get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import MAX_BOXES, Answer, Ask, Engine, RowError, token_texts
from vlmdet.models.decoding import Choose, Decoded, can_loop, decode
from vlmdet.models.loader import Loaded
from vlmdet.models.processors import is_other_family

MAX_NEW_TOKENS = 256
"""Room for about ten boxes; an answer that needs more is reported as truncated."""


def hf_engine(
    loaded: Loaded,
    *,
    contract: Contract,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    logprobs: bool = False,
    constrain: bool = False,
    samples: int = 0,
    seed: int = 0,
    plain: bool = False,
) -> Engine:
    """Make an engine that asks a model in this process.

    When: once per prediction.

    Input: a loaded model; the `contract` with the pixel limits; `batch_size`, pictures at once; `max_new_tokens` per answer;
    `logprobs`, give the probability of each token; `constrain`, write nothing but the codec's notation and the contract's labels;
    `samples`, further answers to each question, drawn by chance under `seed`; `plain`, see `generate_answers`.
    Output: an engine. Pictures of like size are asked about together. A batch on which the model fails, out of memory above all,
    is asked picture by picture; a picture that fails alone, or cannot be opened, gives a `RowError`.

    Raises:
        ValueError: `constrain`, and the contract has no labels.
    """
    model, processor = loaded.model, loaded.processor
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    collate = collate_other_prompts if is_other_family(processor) else collate_prompts
    lock = Lock()  # a tokenizer must not be used by two threads at once
    constraint: Any = None
    if constrain:
        # its library is loaded where it is needed: most runs do without
        from vlmdet.models.constrain import Constraint, boxes_that_fit

        if not contract.labels:
            raise ValueError("an answer can only be constrained to labels, and the contract has none")
        # more boxes than there is room for would be cut off, and the last one lost
        fit = boxes_that_fit(processor.tokenizer, contract.codec, contract.labels, max_new_tokens)
        constraint = Constraint(
            processor.tokenizer,
            codec=contract.codec,
            labels=contract.labels,
            max_boxes=min(MAX_BOXES, fit),
            ends=_end_tokens(model, processor),
            lead=[processor.tokenizer.bos_token_id] if model.config.is_encoder_decoder else [],
        )

    def prepare(asks: Sequence[Ask]) -> tuple[list[Ask], Any, list[tuple[int, RowError]]]:
        ready, images, failed = [], [], []
        for ask in asks:
            image = _open_picture(ask, contract)
            if isinstance(image, RowError):
                failed.append((ask.index, image))
            else:
                ready.append(ask)
                images.append(image)
        with lock:
            batch = collate(processor, [ask.messages for ask in ready], images, **limits) if ready else None
        return ready, batch, failed

    def write(asks: Sequence[Ask], batch: Any, drawn: int | None) -> tuple[list[Decoded], float]:
        """Decode a batch: the likeliest answers, or those of the draw with a number."""
        steps: list[Choose] = [constraint.start([ask.view for ask in asks])] if constraint is not None else []
        if drawn is not None:
            steps.append(_draw(seed + 7919 * drawn + asks[0].index))
        choose = (lambda logits, rows, ids: _all(steps, logits, rows, ids)) if steps else None
        known = logprobs and drawn is None
        return _run(model, processor, batch, max_new_tokens, logprobs=known, plain=plain, choose=choose)

    def answer(asks: Sequence[Ask], batch: Any) -> Iterator[tuple[int, Answer | RowError]]:
        try:
            decoded, spent = write(asks, batch, None)
            drawn = [write(asks, batch, number)[0] for number in range(samples)]
        except RuntimeError as error:  # torch's, of whatever kind: the reason goes into the row
            if len(asks) == 1:
                yield asks[0].index, RowError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return
        else:
            with lock:
                answers = _word(processor, batch, decoded, spent, logprobs=logprobs)
                texts = [[_text(processor, row) for row in rows] for rows in drawn]
            for place, ask in enumerate(asks):
                yield ask.index, replace(answers[place], samples=tuple(rows[place] for rows in texts))
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for ask in asks:
            ready, alone, failed = prepare([ask])
            yield from failed or answer(ready, alone)

    def engine(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        # rows of like length together: less padding
        order = sorted(asks, key=lambda ask: ask.view.resized_width * ask.view.resized_height)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        with ThreadPoolExecutor(1) as pool:  # opens and resizes the next pictures while the model is busy
            coming = pool.submit(prepare, batches[0]) if batches else None
            for number in range(len(batches)):
                assert coming is not None
                ready, batch, failed = coming.result()
                coming = pool.submit(prepare, batches[number + 1]) if number + 1 < len(batches) else None
                yield from failed
                if ready:
                    yield from answer(ready, batch)

    return engine


def _all(
    steps: Sequence[Choose], logits: torch.Tensor, rows: Sequence[int], ids: Sequence[Sequence[int]]
) -> torch.Tensor:
    for step in steps:
        logits = step(logits, rows, ids)
    return logits


def _draw(seed: int) -> Choose:
    """Return what makes the highest logit a draw from the model's own distribution: noise after Gumbel on each of them."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        chance = torch.rand(logits.shape, generator=generator).clamp(min=1e-20)
        return logits - (-chance.log()).clamp(min=1e-20).log().to(logits.device)

    return choose


def _open_picture(ask: Ask, contract: Contract) -> Image.Image | RowError:
    """Open a picture, unless it cannot be opened or shown to the model."""
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels, "factor": contract.size_factor}
    try:
        image = ask.sample.image
        view = plan_view(*image.size, **limits)
    except DataError as error:
        return RowError(str(error))
    seen, planned = (view.resized_width, view.resized_height), (ask.view.resized_width, ask.view.resized_height)
    if contract.codec in PIXEL_CODECS and seen != planned:
        said = f"{ask.view.width} x {ask.view.height}"
        return RowError(f"the picture is {image.width} x {image.height}, and its row says {said}")
    return image


def generate_answers(
    model: Any,
    processor: Any,
    messages_list: Sequence[list[dict[str, Any]]],
    images_list: Sequence[Image.Image | list[Image.Image]],
    *,
    min_pixels: int,
    max_pixels: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    logprobs: bool = False,
    plain: bool = False,
) -> list[Answer]:
    """Generate greedily for one batch of prompts.

    When: once per batch of prediction.

    Input: `messages_list`, n conversations without an answer (system, user with a placeholder); `images_list`, n upright
    pictures; pixel limits; `max_new_tokens` per answer; `logprobs`, give the texts and probabilities of the tokens; `plain`,
    decode with transformers' `generate` even where `decoding` could. The model's mode is put back afterwards.
    Output: n answers in the same order. Prompts are padded on the left, so a row's answer does not depend on the others.
    """
    collate = collate_other_prompts if is_other_family(processor) else collate_prompts
    batch = collate(processor, messages_list, images_list, min_pixels=min_pixels, max_pixels=max_pixels)
    decoded, spent = _run(model, processor, batch, max_new_tokens, logprobs=logprobs, plain=plain)
    return _word(processor, batch, decoded, spent, logprobs=logprobs)


@torch.inference_mode()
def _run(
    model: Any,
    processor: Any,
    batch: Any,
    max_new_tokens: int,
    *,
    logprobs: bool,
    plain: bool,
    choose: Choose | None = None,
) -> tuple[list[Decoded], float]:
    """Decode a batch of prompts; returns the rows, and the milliseconds that each took."""
    batch = batch.to(model.device)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    ends = _end_tokens(model, processor)
    try:
        if plain or not can_loop(model):
            decoded = _generate(model, processor, batch, ends, max_new_tokens, logprobs=logprobs, choose=choose)
        else:
            decoded = decode(model, batch, ends=ends, max_new_tokens=max_new_tokens, logprobs=logprobs, choose=choose)
    finally:
        model.train(was_training)
    return decoded, (time.perf_counter() - started) * 1000 / len(decoded)


def _word(processor: Any, batch: Any, decoded: Sequence[Decoded], spent: float, *, logprobs: bool) -> list[Answer]:
    """Turn ids into texts."""
    answers = []
    for row, mask, ids in zip(decoded, batch["attention_mask"], batch["input_ids"], strict=True):
        kept = _kept(row)
        answers.append(
            Answer(
                text=_text(processor, row),
                prompt_tokens=int(mask.sum()),
                image_tokens=int((ids == processor.image_token_id).sum()),
                answer_tokens=len(row.ids),
                truncated=not row.ended,
                milliseconds=spent,
                tokens=token_texts(processor.tokenizer, kept) if logprobs else (),
                logprobs=tuple(row.logprobs[: len(kept)]),
            )
        )
    return answers


def _kept(row: Decoded) -> list[int]:
    return row.ids[:-1] if row.ended else row.ids


def _text(processor: Any, row: Decoded) -> str:
    text: str = processor.tokenizer.decode(_kept(row), skip_special_tokens=False)
    return text


def _generate(
    model: Any,
    processor: Any,
    batch: Any,
    ends: Sequence[int],
    max_new_tokens: int,
    *,
    logprobs: bool,
    choose: Choose | None = None,
) -> list[Decoded]:
    """Decode with transformers' own `generate`."""
    # an encoder-decoder gives back what the decoder wrote, after its start token
    prompt = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    # temperature and its like are None, or a checkpoint's sampling settings would be warned about on every call; Florence-2's
    # own settings (three beams, no three tokens twice) are for captions: a name of three tokens could be written only once.
    # Qwen2.5-VL's checkpoints bring a repetition penalty of 1.05, and a list of boxes repeats its names
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=processor.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=logprobs,
        logits_processor=[_Chooser(choose, prompt, ends)] if choose is not None else None,
    )
    written = output.sequences[:, prompt:]
    chances: list[list[float]] = [[] for _ in written]
    if logprobs:
        steps = [
            logits.float().log_softmax(dim=-1).gather(1, written[:, i : i + 1])
            for i, logits in enumerate(output.logits)
        ]
        chances = torch.cat(steps, dim=1).tolist()
    decoded = []
    for row, known in zip(written.tolist(), chances, strict=True):
        count = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        decoded.append(Decoded(row[:count], known[:count], count > 0 and row[count - 1] in ends))
    return decoded


class _Chooser(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Let `choose` change the logits of `generate`, of the rows that have not ended."""

    def __init__(self, choose: Choose, prompt: int, ends: Sequence[int]) -> None:
        self.choose, self.prompt, self.ends = choose, prompt, set(ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.prompt :].tolist()
        rows = [i for i, ids in enumerate(written) if self.ends.isdisjoint(ids)]
        changed = scores.clone()
        changed[rows] = self.choose(scores[rows], rows, [written[i] for i in rows]).to(scores.dtype)
        return changed


def _end_tokens(model: Any, processor: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    if is_other_family(processor):  # the template may end a turn by a token that a checkpoint does not name
        ends = [*ends, processor.tokenizer.convert_tokens_to_ids(end_token(processor))]
    return sorted({token for token in [*ends, processor.tokenizer.eos_token_id] if token is not None})


def run_qwen2vl_inference(
    model: Any,
    processor: Any,
    image: Image.Image,
    labels: Sequence[str],
    *,
    min_pixels: int,
    max_pixels: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """Ask about one picture and return the raw answer, control tokens included.

    When: by hand, in notebooks and in `vlmdet predict`.

    Input: an upright RGB `image`; `labels` to ask for; pixel limits as in training.
    Output: `'<|object_ref_start|>nutrition table<|object_ref_end|><|box_start|>(92,310),(841,705)<|box_end|>'`.
    """
    messages = build_messages(labels)
    (answer,) = generate_answers(
        model,
        processor,
        [messages],
        [image],
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_new_tokens=max_new_tokens,
    )
    return answer.text


def parse_qwen_bbox_output(text: str, width: int = 1000, height: int = 1000) -> list[dict[str, Any]]:
    """Read the boxes of a Qwen2-VL answer, in pixels of a picture.

    When: by hand and in notebooks; everything inside this package uses the codec itself.

    Input: `text` as `run_qwen2vl_inference` returns it; size of the upright picture in pixels.
    Output: `[{"label": "nutrition table", "bbox": [x1, y1, x2, y2]}]`, floats; with the default size the numbers are
    those of the answer's own grid of 1000. An empty list when there is no box.
    """
    parsed = get_codec("qwen2_vl").parse(text, View(width, height, width, height))
    scale = (width, height, width, height)
    return [
        {"label": label, "bbox": [round(value * side, 3) for value, side in zip(row, scale, strict=True)]}
        for label, row in zip(parsed.labels, parsed.boxes.tolist(), strict=True)
    ]
