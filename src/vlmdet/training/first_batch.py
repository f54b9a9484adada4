"""Show the first batch of a run, every token coloured by loss, and check what it must be under any collator.

When: PER RUN, just before the first step. `check_first_batch` says what is wrong with the labels, `write_first_batch` draws what
the model is given and what it must answer, so that somebody can look: `runs/NAME/NNN/train/first_batch.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from vlmdet.data.collators import END_TOKEN, IGNORED, Qwen2VLCollatorV3
from vlmdet.data.collators_other import end_token, in_one_row
from vlmdet.errors import TrainingError
from vlmdet.grounding import View, get_codec
from vlmdet.images import open_image, to_upright_rgb
from vlmdet.models.processors import is_other_family
from vlmdet.utils import html
from vlmdet.utils.visualization import visualize_bbox_on_image

UNSUPERVISED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for a picture, which no answer writes; so does the padding token."""


def check_first_batch(
    batch: Mapping[str, Any], processor: Any, names: Sequence[str], *, collator: Any = None
) -> list[str]:
    """Check the labels of a batch, whatever collator made it.

    When: once per run, on its first batch; the default collator has compared the text of the labels with the answers itself.

    Input: a `batch` of n rows with `input_ids`, `labels`, `attention_mask`, (n, longest) int64; n `names` for messages;
    `collator`, which made it.
    Output: what is not as it should be, one line each; `[]` is good. In every row some token carries loss, none of them pads or
    stands for a picture, each is the token that is there, and the last one is the end token: without it a model never stops.

    Raises:
        TrainingError: there is such a line, and the collator is the default one, or is not known to differ (`v1`, `v2`).
    """
    tokenizer = processor.tokenizer
    end_word = end_token(processor) if is_other_family(processor) else END_TOKEN
    end = _ids(tokenizer, [end_word]) or {tokenizer.eos_token_id}
    odd = _ids(tokenizer, UNSUPERVISED)
    found: list[str] = []
    batch = in_one_row(batch)
    rows = zip(names, *(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask")), strict=True)
    for name, ids, labels, mask in rows:
        learnt = [i for i, label in enumerate(labels) if label != IGNORED]
        if not learnt:
            found.append(f"{name}: no token carries loss, so it teaches nothing")
            continue
        if any(labels[i] != ids[i] for i in learnt):
            found.append(f"{name}: a label is not the token at its place: the model shifts them itself")
        pads = sum(not mask[i] for i in learnt)
        if pads:
            found.append(f"{name}: {pads} padding tokens carry loss")
        pictures = sum(labels[i] in odd for i in learnt)
        if pictures:
            found.append(f"{name}: {pictures} tokens that stand for a picture carry loss")
        if labels[learnt[-1]] not in end:
            last = tokenizer.decode([labels[learnt[-1]]])
            known = "" if not end & {labels[i] for i in learnt} else f"; {end_word} before it does"
            found.append(f"{name}: the last token that carries loss is {last!r}, not {end_word}{known}")
    if found and (collator is None or isinstance(collator, Qwen2VLCollatorV3)):
        raise TrainingError(f"the first batch's labels are wrong: {found[0]}", "look at train/first_batch.html")
    return found


def write_first_batch(
    path: Path,
    batch: Mapping[str, Any],
    processor: Any,
    names: Sequence[str],
    *,
    pictures: Sequence[Any],
    codec: str,
    findings: Sequence[str] = (),
) -> Path:
    """Write the page of a batch: for each row its picture as the model sees it, and its tokens.

    When: once per run.

    Input: a `batch` of n rows of one picture each; n `names`; n `pictures` as the collator took them, opened or in the storage
    form `{"path", "bytes"}`; `codec`, which reads the boxes back out of the supervised text; `findings` of `check_first_batch`.
    Output: `path`, one file that opens from disk without a request. Tokens that carry loss are marked; repeated ones, such as
    those of a picture, are written once with their number; the boxes that are drawn are those that the labels say, not those
    of the data set.

    Raises:
        ValueError: rows, names and pictures differ in number.
    """
    batch = in_one_row(batch)
    ids, labels, mask = (batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))
    tokens = sum(map(sum, mask))
    image_id = getattr(processor, "image_token_id", None)
    image = sum(one == image_id for row in ids for one in row)
    learnt = sum(label != IGNORED for row in labels for label in row)
    body = [
        html.paragraph(
            "What the model is given in its first batch. Only marked tokens carry loss; the boxes are read back out of them."
        ),
        html.tiles(
            [
                (f"{len(ids):,}", "rows"),
                (f"{tokens:,}", "tokens"),
                (f"{image:,}", "image tokens"),
                (f"{learnt:,}", "tokens with loss"),
                (f"{learnt / max(tokens, 1):.1%}", "of all tokens"),
                (f"{sum(map(len, mask)) - tokens:,}", "padding"),
            ]
        ),
        *(html.paragraph(text, style="alarm") for text in findings),
    ]
    sizes = _seen_sizes(batch, processor, len(ids))
    for name, row, row_labels, row_mask, picture, size in zip(names, ids, labels, mask, pictures, sizes, strict=True):
        body.append(_row(name, row, row_labels, row_mask, picture, size, processor=processor, codec=codec))
    return html.write_page(path, "First batch", body)


def _row(
    name: str,
    ids: Sequence[int],
    labels: Sequence[int],
    mask: Sequence[int],
    picture: Any,
    size: tuple[int, int] | None,
    *,
    processor: Any,
    codec: str,
) -> Markup:
    upright = _opened(picture, name)
    seen = upright.resize(size, Image.Resampling.BICUBIC) if size else upright
    decode = processor.tokenizer.decode
    supervised = [label for label in labels if label != IGNORED]
    text = decode(supervised, skip_special_tokens=False, clean_up_tokenization_spaces=False).replace(END_TOKEN, "")
    parsed = get_codec(codec).parse(text, View(*upright.size, *seen.size))
    drawn = visualize_bbox_on_image(seen, parsed.boxes, parsed.labels)
    places = [i for i, real in enumerate(mask) if real]
    words, learnt = _fold(decode, [ids[i] for i in places], [labels[i] != IGNORED for i in places], processor)
    boxes = f"{len(parsed.boxes)} boxes" if parsed.status != "parse_failure" else f"no boxes: {codec} cannot read it"
    caption = (
        f"{upright.width} x {upright.height} pixels, seen as {seen.width} x {seen.height}; {boxes}; "
        f"{len(places):,} tokens, {len(supervised):,} with loss ({len(supervised) / max(len(places), 1):.1%})"
    )
    return html.section(
        name,
        html.grid(
            [html.figure(html.picture_uri(drawn), name, caption=caption), html.tokens(words, learnt)], least="22rem"
        ),
    )


def _opened(picture: Any, name: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_upright_rgb(picture)
    return open_image(picture["bytes"] or Path(picture["path"]), name=name)


def _fold(decode: Any, ids: Sequence[int], learnt: Sequence[bool], processor: Any) -> tuple[list[str], list[bool]]:
    """Return texts and marks of a row; neighbours that together make one letter of several bytes are written together."""
    special = set(processor.tokenizer.all_special_ids)
    texts: list[str] = []
    marks: list[bool] = []
    held: list[int] = []
    for (token, mark), run in groupby(zip(ids, learnt, strict=True)):
        for _ in run:
            if held and (token in special or mark != marks[-1]):
                held = []  # bytes that make no letter stay as they are
            text = decode([*held, token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if held:
                texts[-1] = text
            else:
                texts.append(text)
                marks.append(mark)
            held = [*held, token] if text.endswith("\ufffd") and token not in special and len(held) < 8 else []
    return texts, marks


def _seen_sizes(batch: Mapping[str, Any], processor: Any, rows: int) -> list[tuple[int, int] | None]:
    """Return width and height, in pixels, at which the model sees each picture; None where the batch does not say."""
    grids = batch.get("image_grid_thw")
    if grids is None or len(grids) != rows:
        return [None] * rows
    patch = processor.image_processor.patch_size
    return [(columns * patch, lines * patch) for _, lines, columns in grids.tolist()]


def _ids(tokenizer: Any, words: Sequence[str]) -> set[int]:
    """Return the ids of those words that are tokens of their own in this vocabulary."""
    known = tokenizer.get_vocab()
    return {known[word] for word in words if word in known}
