"""What checks look at, made once and shared: from raw rows to a tiny model after three steps.

When: during one examination. Each method makes its piece when it is first asked for, and keeps it; where it cannot be
made it raises
`NotAvailable` with what it needs, where user code raised `UserCodeError`, and the same again when asked again. torch is
imported only
by what needs it. Users' functions are called through `calls` only.

    annotations() truth() size_seen(i)                rows as they lie there
    examples() targets() space()                      converted rows, target texts, in which space their numbers are
    texts() texts_after_arrow() asked()               rendered conversations of training and of inference
    batches() supervised()                            awkward batches and what carries loss in them
    tiny() trainer() steps() overfit()                a small random model of the user's architecture (module `live`)
    run() predictions() artefacts() versions()        what a finished run left behind

Long, because it is the list of everything that is shared.
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.doctor.calls import NotAvailable, UserCodeError, build_collator, call, fill, parameters_of
from vlmdet.doctor.gather import conversations
from vlmdet.doctor.gather.annotations import Annotation, Rows, class_names, read_annotation, sample_rows
from vlmdet.doctor.gather.batches import Batch, Supervised, read_batch, supervised_of
from vlmdet.doctor.gather.conversations import Example
from vlmdet.doctor.gather.files import Artefact, Run, read_artefacts, read_run
from vlmdet.doctor.gather.options import Options
from vlmdet.doctor.gather.text_boxes import Space, boxes_in, read_space
from vlmdet.doctor.sampling import every as every
from vlmdet.doctor.subject import Subject
from vlmdet.errors import VlmdetError
from vlmdet.images import orientation

LIMIT = 1000
"""Rows that are looked at, at most, evenly chosen from all splits."""

HANGS = 5.0
"""Seconds that one row may take a converter before a time-out is laid to its charge."""

BATCHED = 24
"""Rows that go through the user's collator one by one."""

_T = TypeVar("_T")
END_WORDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<eos>",
    "</s>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|end|>",
)
PICTURE_WORDS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<image>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<|image|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image_soft_token>",
)
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "vllm",
    "qwen-vl-utils",
    "flash-attn",
    "liger-kernel",
    "unsloth",
    "ms-swift",
    "llamafactory",
    "torchvision",
    "pillow",
)


def once(make: Callable[[Evidence], _T]) -> Callable[[Evidence], _T]:
    """Keep what a method of `Evidence` returns or raises."""

    @functools.wraps(make)
    def kept(self: Evidence) -> _T:
        name = make.__name__
        if name not in self._kept:
            try:
                self._kept[name] = (make(self), None)
            except TimeoutError:
                raise
            except Exception as error:  # the same answer to everyone who asks
                self._kept[name] = (None, error)
        value, raised = self._kept[name]
        if raised is not None:
            raise raised
        return value

    return kept


@dataclass(frozen=True)
class Asked:
    """One row as the model is asked at inference: messages of `render` and their text with the generation prompt."""

    where: str
    index: int
    messages: list[dict[str, Any]]
    text: str
    raw: Any


class Evidence:
    """Everything that is made of a `Subject`.

    Args:
        subject: what is examined.
        limit: rows that are looked at, at most.
    """

    def __init__(self, subject: Subject, *, limit: int = LIMIT) -> None:
        self.subject = subject
        self.options = Options(subject.settings)
        self.limit = limit
        self._kept: dict[str, tuple[Any, Exception | None]] = {}

    def need(self, field: str) -> Any:
        """Return a field of the subject.

        Raises:
            NotAvailable: it is not there.
        """
        value = getattr(self.subject, field)
        if value is None:
            raise NotAvailable(field)
        return value

    # ---- rows -------------------------------------------------------------------------------------------------------

    @once
    def splits(self) -> dict[str, Rows]:
        """Return the raw rows by split; rows without splits are `train`."""
        subject = self.subject
        if subject.splits:
            found = {str(name): Rows(rows) for name, rows in subject.splits.items() if rows is not None}
        elif subject.rows is not None:
            held = subject.rows
            if isinstance(held, Mapping):  # a DatasetDict
                found = {str(name): Rows(rows) for name, rows in held.items()}
            else:
                found = {"train": Rows(held)}
        else:
            raise NotAvailable("rows or splits")
        if not any(len(rows) for rows in found.values()):
            raise NotAvailable("at least one row")
        return found

    @once
    def annotations(self) -> list[Annotation]:
        """Return the raw rows read tolerantly, at most `limit`."""
        splits = self.splits()
        chosen = sample_rows({name: len(rows) for name, rows in splits.items()}, self.limit)
        names = {name: class_names(rows.held) for name, rows in splits.items()}
        return [read_annotation(splits[name].raw(row), name, row, names[name]) for name, row in chosen]

    def raw_row(self, annotation: Annotation) -> Any:
        """Return the row itself, as the user's converter gets it."""
        return self.splits()[annotation.split][annotation.row]

    def declared(self) -> BoxFormat | None:
        """Return the declared format of boxes, None where none was declared or it is none that we know."""
        text = self.subject.box_format
        if text is None:
            return None
        if isinstance(text, BoxFormat):
            return text
        try:
            words = (
                str(text)
                .lower()
                .replace("normalized", "fraction")
                .replace("normalised", "fraction")
                .replace("absolute", "pixel")
            )
            words = words.replace("relative", "fraction").replace("pixels", "pixel").replace("fractions", "fraction")
            return BoxFormat.parse(words)
        except VlmdetError:
            return None

    @once
    def truth(self) -> list[np.ndarray | None]:
        """Return true boxes (n, 4) as fractions x1, y1, x2, y2 of the upright picture, None for rows that have none or no size.

        Read as declared; where nothing is declared, in the format under which most boxes are valid.

        Raises:
            NotAvailable: no row has boxes.
        """
        annotations = self.annotations()
        box_format = self.declared() or self.likely_format()
        read: list[np.ndarray | None] = []
        for one in annotations:
            if one.boxes is None or one.size is None:
                read.append(None)
                continue
            read.append(Boxes.from_array(np.nan_to_num(one.boxes), box_format, *one.size).xyxy)
        return read

    def likely_format(self) -> BoxFormat:
        """Return the format in which undeclared boxes most likely are; see `likely`."""
        return self.likely()[0]

    @once
    def likely(self) -> tuple[BoxFormat, bool]:
        """Return the format under which most boxes are valid and lie on objects, and whether the pictures decided it.

        Raises:
            NotAvailable: no row has boxes and a size.
        """
        from vlmdet.doctor.gather.reading import likely_format

        return likely_format(self)

    @once
    def shown(self) -> list[Any]:
        """Return some rows opened, upright and small (`gather.reading.Shown`: annotation, pixels, image)."""
        from vlmdet.doctor.gather.reading import open_some

        return open_some(self)

    def limits(self) -> tuple[int, int]:
        """Return min_pixels and max_pixels of training: of the settings, else of the processor, else Qwen2-VL's defaults."""
        low = self.options.number("min_pixels", phase="train") or self.options.number("min_pixels")
        high = self.options.number("max_pixels", phase="train") or self.options.number("max_pixels")
        own = processor_limits(self.subject.processor)
        return int(low or own[0] or 56 * 56), int(high or own[1] or 28 * 28 * 16384)

    def factor(self) -> int:
        """Return the side in pixels of one image token: patch size times merge size, 28 where unknown."""
        images = getattr(self.subject.processor, "image_processor", None)
        patch, merge = getattr(images, "patch_size", None), getattr(images, "merge_size", None)
        if isinstance(patch, int) and isinstance(merge, int):
            return patch * merge
        return 32 if "qwen3" in self.family() else 28

    def size_seen(self, annotation: Annotation) -> tuple[int, int] | None:
        """Return width and height of a row's picture after the family's resize under the limits of training; None if unknown."""
        from vlmdet.grounding.sizes import qwen_size

        if annotation.size is None or not annotation.size[0] or not annotation.size[1]:
            return None
        low, high = self.limits()
        try:
            return qwen_size(*annotation.size, min_pixels=low, max_pixels=high, factor=self.factor())
        except VlmdetError:
            return None

    def family(self) -> str:
        """Return the model type in lower case with underscores, `qwen2_vl`; "" if unknown."""
        return family_name(self.options, self.subject.model, self.subject.processor)

    # ---- conversations ----------------------------------------------------------------------------------------------

    @once
    def converted(self) -> tuple[list[Example], list[UserCodeError]]:
        """Convert every row that is looked at; return the examples and what the converter raised on the others.

        Raises:
            UserCodeError: it raised on every row.
            NotAvailable: there is no converter, and the rows hold no messages.
        """
        annotations = self.annotations()
        convert = self.subject.convert
        examples: list[Example] = []
        errors: list[UserCodeError] = []
        silent = 0
        for i, one in enumerate(annotations):
            row = self.raw_row(one)
            began = time.monotonic()
            try:
                raw = row if convert is None else self._convert(row, one)
            except TimeoutError as error:
                spent = time.monotonic() - began
                if spent < HANGS:
                    raise
                late = TimeoutError(f"it did not return within {spent:.0f} s").with_traceback(error.__traceback__)
                raise UserCodeError("convert", late, subject=one.where) from error
            except UserCodeError as error:
                errors.append(error)
                if len(errors) > 50 and not examples:
                    break
                continue
            try:
                examples.append(conversations.make_example(raw, one.where, i))
            except NotAvailable:
                silent += 1
                if convert is None and silent > 8 and not examples:
                    break
        if not examples and errors:
            raise errors[0]
        if not examples:
            raise NotAvailable(
                "convert, or rows that hold messages" if convert is None else "a converter that returns messages"
            )
        return examples, errors

    def _convert(self, row: Any, annotation: Annotation) -> Any:
        convert = self.need("convert")
        names = list(parameters_of(convert))
        extra = fill(convert, {"processor": self.subject.processor}) if len(names) > 1 else {}
        extra.pop(names[0] if names else "", None)
        if isinstance(row, dict):
            row = dict(row)  # a converter that pops keys does not change what others see
        return call("convert", convert, row, about=annotation.where, **extra)

    def convert(self, row: Any, where: str = "a drawn row") -> Any:
        """Convert any raw row by the user's converter, e.g. a drawn one."""
        return self._convert(row, Annotation("drawn", 0, None, None, (), None, None))

    def examples(self) -> list[Example]:
        """Return the converted rows; those on which the converter raised are in `converted()[1]`."""
        return self.converted()[0]

    def targets(self) -> list[str]:
        """Return the answers that are to be learnt, one for each example."""
        return [one.answer for one in self.examples()]

    @once
    def space(self) -> Space | None:
        """Return in which order and space the numbers of the targets are, found by comparison with the true boxes."""
        annotations, truth, examples = self.annotations(), self.truth(), self.examples()
        used = [one for one in examples if truth[one.index] is not None and annotations[one.index].size is not None]
        numbers = [np.array([box.numbers for box in boxes_in(one.written)], float).reshape(-1, 4) for one in used]
        sizes = [annotations[one.index].size or (1, 1) for one in used]
        seen = [self.size_seen(annotations[one.index]) for one in used]
        given = [given_size(one) for one in used]
        return read_space(numbers, [truth[one.index] for one in used], sizes, seen, given)  # type: ignore[misc]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor, or the processor itself where it is one.

        Raises:
            NotAvailable: there is no processor.
        """
        processor = self.need("processor")
        return getattr(processor, "tokenizer", processor)

    def render_text(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False) -> str:
        """Render messages by the processor's chat template; nothing of the user's is changed.

        Raises:
            UserCodeError: the template raised.
            NotAvailable: there is no template.
        """
        processor = self.need("processor")
        target = processor if getattr(processor, "chat_template", None) else self.tokenizer
        if not getattr(target, "chat_template", None):
            raise NotAvailable("a chat template")
        text = call(
            "template",
            target.apply_chat_template,
            list(messages),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        return text[0] if isinstance(text, list) else text

    @once
    def texts(self) -> list[str]:
        """Return each example as the chat template renders it for training."""
        return [self.render_text(one.messages) for one in self.examples()]

    @once
    def texts_after_arrow(self) -> list[str]:
        """Return each example as rendered after its messages went through Arrow, which adds absent keys as None."""
        return [
            self.render_text(conversations.after_arrow(conversations.bare(one.messages)))
            for one in self.examples()[:200]
        ]

    @once
    def asked(self) -> list[Asked]:
        """Return the rows (at most 100) as the model is asked at inference.

        Raises:
            NotAvailable: there is no `render`.
        """
        render = self.need("render")
        names = list(parameters_of(render))
        extra = fill(render, {"processor": self.subject.processor}) if len(names) > 1 else {}
        extra.pop(names[0] if names else "", None)
        asked = []
        for i, one in list(enumerate(self.annotations()))[:100]:
            raw = call("render", render, self.raw_row(one), about=one.where, **extra)
            if isinstance(raw, str):
                asked.append(Asked(one.where, i, [], raw, raw))
                continue
            messages = conversations.messages_of(raw)
            ended = bool(messages) and messages[-1].get("role") in ("assistant", "model")
            text = self.render_text(messages, generation_prompt=not ended) if self.subject.processor is not None else ""
            asked.append(Asked(one.where, i, messages, text, raw))
        return asked

    # ---- awkward batches --------------------------------------------------------------------------------------------

    @once
    def awkward(self) -> dict[str, Any]:
        """Return converted rows that a collator must get right, made from the user's own: name -> (raw row, where, answers).

        `short`, `long` (the shortest and the longest answers of rows with one picture), `several` (most boxes), `two
        turns`, `answer in
        the question`; a name is missing where its row cannot be made.
        """
        examples = [one for one in self.examples() if one.answer]
        if not examples:
            raise NotAvailable("rows with an answer")
        by_length = sorted(examples, key=lambda one: len(one.answer))
        most = max(examples, key=lambda one: len(boxes_in(one.written)))
        short, long = by_length[0], by_length[-1]
        found: dict[str, Any] = {
            name: (one.raw, one.where, one.answers) for name, one in (("short", short), ("long", long))
        }
        if most is not long:
            found["several"] = (most.raw, most.where, most.answers)
        middle = by_length[len(by_length) // 2]
        try:
            found["answer in the question"] = (
                conversations.with_prompt(middle, f'For example: "{middle.answer}"'),
                f"{middle.where}, its answer added to its question",
                middle.answers,
            )
            second = short.answer if short.answer != middle.answer else long.answer
            found["two turns"] = (
                conversations.with_second_turn(middle, "And once more?", second),
                f"{middle.where}, with a second question",
                (*middle.answers, second),
            )
        except NotAvailable:
            pass
        return found

    @once
    def collator(self) -> Callable[..., Any]:
        """Return the user's collator as a function of a list of converted examples.

        Raises:
            UserCodeError: building it raised.
        """
        collate = self.need("collate")
        model = self.subject.model
        names = " ".join(parameters_of(collate)).lower()
        if (model is None or isinstance(model, (str, Path))) and "model" in names.split():
            model = self.tiny().model
        return build_collator(collate, processor=self.subject.processor, model=model, settings=self.options.flat)

    def collate(
        self, raws: Sequence[Any], name: str, where: Sequence[str], answers: Sequence[tuple[str, ...]]
    ) -> Batch:
        """Make a batch by the user's collator.

        Raises:
            UserCodeError: it raised; `made` is set where a row of the batch is none of the user's own.
        """
        try:
            batch = call(
                "collate",
                self.collator(),
                [conversations.copied(raw) for raw in raws],
                about=f"{name}: {', '.join(where)}",
            )
        except UserCodeError as error:
            own = {id(one.raw) for one in self.examples()}
            error.made = any(id(raw) not in own for raw in raws)
            raise
        if hasattr(batch, "data") and not hasattr(batch, "keys"):
            batch = batch.data
        return read_batch(batch, name, where, answers, [len(conversations.pictures_of(raw)) for raw in raws])

    @once
    def batched(self) -> tuple[dict[str, Batch], dict[str, UserCodeError]]:
        """Collate awkward batches; return those that were made, and what was raised on the others.

        `single` rows `row 0`, …; each awkward row alone (`short`, `long`, `several`, `two turns`, `answer in the question`);
        `short+long` as the user pads; `short+long, left` and `short+long, right` with the tokenizer's padding side set.

        Raises:
            UserCodeError: every batch raised.
        """
        awkward = self.awkward()
        made: dict[str, Batch] = {}
        errors: dict[str, UserCodeError] = {}

        def add(name: str, chosen: Sequence[Any]) -> None:
            try:
                made[name] = self.collate(
                    [one[0] for one in chosen], name, [one[1] for one in chosen], [one[2] for one in chosen]
                )
            except UserCodeError as error:
                errors[name] = error

        for name, one in awkward.items():
            add(name, [one])
        pair = [awkward["short"], awkward["long"]]
        add("short+long", pair)
        examples = self.examples()
        step = max(1, len(examples) // BATCHED)
        for i in range(0, len(examples), step):
            add(f"row {i}", [(examples[i].raw, examples[i].where, examples[i].answers)])
            if errors and not made and len(errors) > 6:
                break
        tokenizer = self.tokenizer if self.subject.processor is not None else None
        if tokenizer is not None and hasattr(tokenizer, "padding_side"):
            kept = tokenizer.padding_side
            try:
                for side in ("left", "right"):
                    tokenizer.padding_side = side
                    add(f"short+long, {side}", pair)
            finally:
                tokenizer.padding_side = kept
        if not made:
            raise next(iter(errors.values()))
        return made, errors

    def batches(self) -> dict[str, Batch]:
        """Return the batches that the user's collator made, by name; see `batched`."""
        return self.batched()[0]

    @once
    def supervised(self) -> list[Supervised]:
        """Return every row of every batch with the tokens that carry loss decoded.

        Raises:
            NotAvailable: there is no collator or processor, or its batches have no labels.
        """
        tokenizer = self.tokenizer
        return [row for batch in self.batches().values() for row in supervised_of(batch, tokenizer)]

    def end_ids(self) -> frozenset[int]:
        """Return ids that end a turn or a text: of the tokenizer, of `generation_config`, and the usual words where known."""
        tokenizer = self.tokenizer
        known = {tokenizer.eos_token_id} if getattr(tokenizer, "eos_token_id", None) is not None else set()
        config = getattr(self.subject.model, "generation_config", None)
        more = getattr(config, "eos_token_id", None)
        known.update(more if isinstance(more, (list, tuple)) else [] if more is None else [more])
        known.update(
            self._ids_of(
                [
                    word
                    for word in END_WORDS
                    if word in ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<end_of_utterance>")
                ]
            )
        )
        return frozenset(known)

    def picture_ids(self) -> frozenset[int]:
        """Return ids of tokens that stand for a picture or mark its ends."""
        ids = set(self._ids_of(PICTURE_WORDS))
        for holder in (self.subject.processor, getattr(self.subject.model, "config", None)):
            for name in (
                "image_token_id",
                "video_token_id",
                "vision_start_token_id",
                "vision_end_token_id",
                "image_token_index",
            ):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    ids.add(value)
        return frozenset(ids)

    def image_token_id(self) -> int | None:
        """Return the id of the token that is repeated for each patch of a picture, None where unknown."""
        for holder in (self.subject.processor, getattr(self.subject.model, "config", None)):
            for name in ("image_token_id", "image_token_index"):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    return value
        return next(iter(self._ids_of(("<|image_pad|>", "<IMG_CONTEXT>", "<image>"))), None)

    @once
    def control(self) -> dict[str, int]:
        """Return the control tokens of the tokenizer: text -> id, special and added ones."""
        tokenizer = self.tokenizer
        found = dict(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else {}
        for word in getattr(tokenizer, "all_special_tokens", ()):
            found[word] = tokenizer.convert_tokens_to_ids(word)
        return found

    def _ids_of(self, words: Sequence[str]) -> list[int]:
        control = self.control()
        return [control[word] for word in words if word in control]

    # ---- live models (see `live`) -----------------------------------------------------------------------------------

    @once
    def tiny(self) -> Any:
        """Return a small random model of the user's architecture (`live.tiny.Tiny`: model, config, notes)."""
        from vlmdet.doctor.live.tiny import make_tiny

        return make_tiny(self)

    @once
    def trainer(self) -> Any:
        """Return the user's trainer, built on a tiny model (`live.trainer.Built`)."""
        from vlmdet.doctor.live.trainer import build

        return build(self)

    @once
    def steps(self) -> Any:
        """Return what three optimiser steps of the user's trainer did (`live.trainer.Steps`)."""
        from vlmdet.doctor.live.trainer import take_steps

        return take_steps(self)

    @once
    def overfit(self) -> Any:
        """Return what a tiny model wrote after it learnt one row by heart (`live.overfit.Overfit`)."""
        from vlmdet.doctor.live.overfit import overfit_one

        return overfit_one(self)

    # ---- files ------------------------------------------------------------------------------------------------------

    @once
    def run(self) -> Run:
        """Return what a run left behind."""
        return read_run(Path(self.need("run_dir")))

    @once
    def artefacts(self) -> dict[str, Artefact]:
        """Return the saved directories, by name; those of a run where none are named.

        Raises:
            NotAvailable: neither artefacts nor a run's directory.
        """
        if self.subject.artefacts is not None:
            return read_artefacts(self.subject.artefacts)
        return read_artefacts(self.need("run_dir"))

    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        """Return the prediction files of the run, by name.

        Raises:
            NotAvailable: there are none.
        """
        found = self.run().predictions
        if not found:
            raise NotAvailable("predictions (*.jsonl with text or boxes) in run_dir")
        return found

    @once
    def versions(self) -> dict[str, str]:
        """Return the versions of libraries with known faults, as installed, or as the settings say."""
        found = {}
        for name in LIBRARIES:
            told = self.options.get(f"{name.replace('-', '_')}_version")
            if told:
                found[name] = str(told)
                continue
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        told_all = self.options.get("versions")
        if isinstance(told_all, Mapping):
            found.update({str(key): str(value) for key, value in told_all.items()})
        return found


def given_size(example: Example) -> tuple[int, int] | None:
    """Return width and height of the picture that the converter gives, upright; None where it gives a path or several."""
    pictures = example.pictures
    if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
        return None
    width, height = pictures[0].size
    return (height, width) if orientation(pictures[0]) >= 5 else (width, height)


def processor_limits(processor: Any) -> tuple[int | None, int | None]:
    """Return min_pixels and max_pixels of a processor as it will use them; None where it has none."""
    images = getattr(processor, "image_processor", processor)
    size = getattr(images, "size", None)
    values = []
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = None
        if size is not None:
            try:
                value = size[edge]
            except (KeyError, TypeError, IndexError):
                value = getattr(size, edge, None)
        value = value if value is not None else getattr(images, name, None)
        values.append(int(value) if isinstance(value, (int, float)) and value > 2000 else None)
    return values[0], values[1]


FAMILY_WORDS = (
    ("qwen3", "qwen3_vl"),
    ("qwen2_5", "qwen2_5_vl"),
    ("qwen25", "qwen2_5_vl"),
    ("qwen2", "qwen2_vl"),
    ("paligemma", "paligemma"),
    ("florence", "florence2"),
    ("internvl", "internvl"),
    ("idefics3", "idefics3"),
    ("smolvlm", "smolvlm"),
    ("llava", "llava"),
    ("qwen_vl", "qwen_vl"),
)


def family_name(options: Options, model: Any, processor: Any) -> str:
    """Return the model type by what says it most surely: a model's config, the settings, the name of the processor's class."""
    for holder in (model, getattr(model, "base_model", None)):
        kind = getattr(getattr(holder, "config", None), "model_type", None)
        if isinstance(kind, str):
            return kind
    texts = [str(options.get("model_type") or ""), str(options.get("model_name") or "")]
    texts += [str(model)] if isinstance(model, (str, Path)) else []
    kind = str(getattr(processor, "model_type", "") or "")
    for text in (*texts, kind, type(processor).__name__):
        flat = text.lower().replace("-", "_").replace(".", "_").replace("2_5", "2_5")
        for word, name in FAMILY_WORDS:
            if word in flat:
                return name
    return ""
