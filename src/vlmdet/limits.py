"""What settings must hold to, alone and together, each rule with its way out.

When: ALWAYS, right after settings are read, so that a mistake costs a second and not an hour; no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vlmdet.binding import show
from vlmdet.boxes import BoxFormat
from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.settings import DataSettings, LoraSettings, Settings, TrainingSettings

Rule = tuple[str, Any, bool, str]
"""Dotted key, its value, whether the rule holds, and the way out where it does not."""


def check(settings: Settings, *, needs_data: bool = False) -> None:
    """Refuse settings that cannot work, alone or together.

    When: once, by `load_settings`, and again by a verb that reads a data set, with `needs_data`.

    Raises:
        ConfigError: the first thing that cannot work: its dotted key, its value, and the way out.
    """
    rules = chain(
        _whole(settings),
        _data(settings.data, needs_data=needs_data),
        _model(settings),
        _lora(settings.lora) if settings.training.method == "lora" else (),
        _training(settings.training),
        _caches(settings),
        _numbers(settings),
    )
    for key, value, is_good, way_out in rules:
        if not is_good:
            raise ConfigError(f"{key} is {show(value)}", way_out)


def _whole(settings: Settings) -> Iterator[Rule]:
    good_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", settings.name) is not None
    yield "name", settings.name, good_name, "it becomes a folder: use letters, digits, '.', '_' and '-'"
    split = settings.evaluation.split
    yield "evaluation.split", split, bool(split.strip()), "name a split, such as test"
    share = settings.evaluation.max_errors
    yield "evaluation.max_errors", share, 0 <= share <= 1, "give a share from 0 to 1"
    for chance in dataclasses.fields(settings.augment):
        value = getattr(settings.augment, chance.name)
        yield f"augment.{chance.name}", value, 0 <= value <= 1, "give a probability from 0 (off) to 1"


def _data(data: DataSettings, *, needs_data: bool) -> Iterator[Rule]:
    yield "data.source", data.source, bool(data.source) or not needs_data, "name a folder, a file or a hub data set"
    yield "data.stream", data.stream, data.stream is None or data.stream >= 1, "give at least 1, or null to download"
    if data.box_format is not None:
        try:
            BoxFormat.parse(data.box_format)
        except ConfigError as error:
            yield "data.box_format", data.box_format, False, str(error)
    yield "data.limit", data.limit, data.limit is None or data.limit >= 1, "give at least 1, or null for every row"
    yield "data.val_fraction", data.val_fraction, 0 <= data.val_fraction < 1, "give a share from 0 to below 1"
    yield "data.max_problems", data.max_problems, 0 <= data.max_problems <= 1, "give a share from 0 to 1"
    yield "data.classes", data.classes, all(name.strip() for name in data.classes), "a class needs a name"
    twice = len(set(data.classes)) < len(data.classes)
    yield "data.classes", data.classes, not twice, "name each class once"
    for old, new in data.rename.items():
        yield f"data.rename.{old}", new, bool(new.strip()), "a class needs a name"
        listed = not data.classes or old in data.classes
        way_out = f"'{old}' is not in data.classes, so it would never be read: add it there, or drop it here"
        yield f"data.rename.{old}", new, listed, f"{way_out} ({did_you_mean(old, data.classes)})"


def _model(settings: Settings) -> Iterator[Rule]:
    model = settings.model
    good_device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", model.device) is not None
    yield "model.device", model.device, good_device, "use auto, cpu, cuda, cuda:0 (or another number) or mps"
    for key, pixels in (("min_pixels", model.min_pixels), ("max_pixels", model.max_pixels)):
        yield f"model.{key}", pixels, pixels is None or pixels >= 1, "give a number of pixels, or null for the base's"
    in_order = model.min_pixels is None or model.max_pixels is None or model.min_pixels <= model.max_pixels
    way_out = f"it is above model.max_pixels ({model.max_pixels}): lower the one or raise the other"
    yield "model.min_pixels", model.min_pixels, in_order, way_out
    four_bits = model.quantization != "none"
    way_out = "4-bit weights cannot be trained, nor any part of a model that holds some: use training.method=lora"
    yield "model.quantization", model.quantization, not four_bits or settings.training.method == "lora", way_out
    yield (
        "model.quantize_vision",
        model.quantize_vision,
        four_bits or not model.quantize_vision,
        "set model.quantization=nf4 too",
    )


def _lora(lora: LoraSettings) -> Iterator[Rule]:
    way_out = "give at least 1, or set training.method=full to train without an adapter"
    yield "lora.rank", lora.rank, lora.rank >= 1, way_out
    yield "lora.alpha", lora.alpha, lora.alpha >= 1, "give at least 1: at 0 the adapter does nothing"
    yield "lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "give a probability from 0 to below 1"
    for target, rank in lora.ranks.items():
        named = target in lora.targets
        yield (
            f"lora.ranks.{target}",
            rank,
            named,
            f"it is none of lora.targets ({did_you_mean(target, lora.targets)})",
        )
        yield f"lora.ranks.{target}", rank, rank >= 1, "give at least 1, or take it out of lora.targets"
    yield (
        "lora.targets",
        lora.targets,
        bool(lora.targets),
        "name an area such as language.attn: none trains nothing",
    )


def _training(training: TrainingSettings) -> Iterator[Rule]:
    good = training.method == "full" or not training.areas
    yield "training.areas", training.areas, good, "an adapter names its lora.targets; or use method=full"
    for key in ("vision_learning_rate", "merger_learning_rate"):
        rate = getattr(training, key)
        yield f"training.{key}", rate, rate is None or rate > 0, "give more than 0; to freeze an area, do not train it"
        good = rate is None or training.optimizer == "adamw"
        yield f"training.{key}", rate, good, "muon has one rate: set training.optimizer=adamw"
    known = ("auto", "tensorboard", "trackio", "wandb", "mlflow")
    for tracker in training.report_to:
        yield "training.report_to", tracker, tracker in known, did_you_mean(tracker, known)
    yield (
        "training.neftune_alpha",
        training.neftune_alpha,
        training.neftune_alpha >= 0,
        "give 0 (off) or more, such as 5",
    )
    good = training.max_tokens is None or training.max_tokens >= 1
    yield "training.max_tokens", training.max_tokens, good, "give at least 1, or null for what the model can read"

    way_out = "give more than 0, or set training.max_steps; to score without training, use `vlmdet eval`"
    yield "training.epochs", training.epochs, training.epochs > 0, way_out
    way_out = "give at least 1, or null to let training.epochs decide"
    yield "training.max_steps", training.max_steps, training.max_steps is None or training.max_steps >= 1, way_out
    way_out = "set training.method=full, or training.optimizer=adamw: an adapter's narrow matrices gain nothing from it"
    fits = training.optimizer == "adamw" or training.method == "full"
    yield "training.optimizer", training.optimizer, fits, way_out
    yield "training.learning_rate", training.learning_rate, training.learning_rate > 0, "give more than 0, such as 1e-4"
    way_out = "give a share from 0 to below 1"
    yield "training.warmup_fraction", training.warmup_fraction, 0 <= training.warmup_fraction < 1, way_out
    ignored = training.schedule == "constant" and training.warmup_fraction > 0
    way_out = "it would ignore training.warmup_fraction: set that to 0, or use constant_with_warmup"
    yield "training.schedule", training.schedule, not ignored, way_out
    yield "training.weight_decay", training.weight_decay, training.weight_decay >= 0, "give 0 or more"
    yield "training.max_grad_norm", training.max_grad_norm, training.max_grad_norm >= 0, "give 0 (no limit) or more"


def _caches(settings: Settings) -> Iterator[Rule]:
    training = settings.training
    still = not any(dataclasses.astuple(settings.augment))
    for key in ("cache_pictures", "cache_features"):
        way_out = "augmentation makes a new picture each time: switch one of them off"
        yield f"training.{key}", True, still or not getattr(training, key), way_out
        good = training.collator == "v3" or not getattr(training, key)
        yield f"training.{key}", True, good, "only the collator v3 leaves the resize to the processor"


def _numbers(settings: Settings) -> Iterator[Rule]:
    """Whole numbers with a least value, and seeds."""
    for stage, key, least in (
        ("training", "batch_size", 1), ("training", "gradient_accumulation", 1), ("training", "eval_every", 0),
        ("training", "eval_rows", 1), ("training", "sample_rows", 0), ("training", "loader_workers", 0),
        ("training", "save_every", 0),
        ("evaluation", "batch_size", 1), ("evaluation", "max_new_tokens", 1), ("evaluation", "resamples", 1),
        ("evaluation", "consistency_samples", 1),
    ):  # fmt: skip
        number = getattr(getattr(settings, stage), key)
        yield f"{stage}.{key}", number, number >= least, f"give at least {least}"
    for stage in ("data", "training", "evaluation"):
        seed = getattr(settings, stage).seed
        # NumPy's and torch's common range.
        yield f"{stage}.seed", seed, 0 <= seed < 2**32, "give a whole number from 0 to 4294967295"
