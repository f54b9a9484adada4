"""Typed settings, one frozen class per stage, read from YAML and dotted overrides.

When: ALWAYS; no torch. Read once, before anything else runs, so that a mistake costs a second and not an hour:

    defaults  <-  base  <-  the YAML file  <-  overrides such as `training.epochs=5`

The text under each field is its help: what a change of it costs or brings. An unknown key, a value of the wrong type
and a combination that cannot work are a `ConfigError` that names the dotted key and the way out.

Long, because every setting, its help and its limits stand in one place; how YAML is bound starts at `_read_yaml`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vlmdet.boxes import BoxFormat
from vlmdet.errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """Which pictures and boxes, and how they become rows."""

    source: str = ""
    """A folder, a file, or the id of a hub data set. Empty: the command line must name one."""

    format: str = "auto"
    """Layout of the source: coco, yolo, voc, jsonl, hub, csv. `auto` decides by what lies there and prints why; name it
    when that is wrong."""

    box_format: str | None = None
    """Order and unit of the four numbers, such as `xywh/pixel`, where neither the layout nor the numbers tell. Named
    wrongly, every box lies elsewhere. Null: decided, and refused where it is open."""

    exif: Literal["applied", "ignored"] | None = None
    """Whether the tool that drew the boxes showed pictures turned upright (`applied`) or as stored (`ignored`), for turned
    pictures whose rows do not tell. Null: such rows are left out and counted."""

    stream: int | None = None
    """Of a hub data set, fetch so many rows of each split and keep their pictures in memory, instead of downloading it."""

    classes: tuple[str, ...] = ()
    """Names, as the source writes them, to look for; boxes of all others are left out. Empty: every class."""

    rename: dict[str, str] = field(default_factory=dict)
    """From the source's name to the words that the model reads and writes. Plain words train faster than codes."""

    limit: int | None = None
    """Rows to keep of each split. For a quick trial; figures on few rows have wide intervals."""

    val_fraction: float = 0.1
    """Share of train that is held back where the source has no validation split. More: surer choice, less to learn."""

    max_problems: float = 0.01
    """Share of broken rows above which the run stops. Higher lets a misread format pass unnoticed."""

    box_order: Literal["as_given", "raster", "large_first", "shuffle"] = "raster"
    """Order of the boxes in an answer. `raster` (top to bottom, then left to right) and `large_first` can be learned from
    the picture, `as_given` only where the source's order means something; `shuffle` keeps the model from learning one."""

    seed: int = 0
    """Chooses the rows that are held back or kept by `limit`; another seed, other rows."""


@dataclass(frozen=True)
class ModelSettings:
    """Which base, and how it runs."""

    name: str = "tiny"
    """`tiny` (shipped, runs on a CPU), a hub id, or a folder of a Qwen2-VL."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes bfloat16 where the GPU has it, else float32. What trains is kept in float32 either way. float16 is not
    offered: its small gradients vanish without a scaler."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """`sdpa` is fast everywhere; `flash_attention_2` needs its own package and a GPU; `eager` is slow, to debug."""

    quantization: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen weights of the language model in 4 bits: a quarter of the memory, somewhat slower, a little
    worse. An adapter trained on it fits the unquantised base too; `vlmdet merge` says how well."""

    quantize_vision: bool = False
    """Quantise the vision tower as well. It is small, so little is won, and boxes suffer."""

    codec: str = "auto"
    """How boxes are written as text: `auto` is the family's own; else `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`, `paligemma`,
    `florence2`, `internvl`, `plain_json`. With another than the base was trained on, training starts from nothing."""

    min_pixels: int | None = None
    """Smaller pictures are enlarged to this. None: the limit of the base."""

    max_pixels: int | None = None
    """Larger pictures are shrunk to this. More finds smaller objects; time and memory grow with it (one token for each
    28 x 28 pixels). None: the limit of the base."""


@dataclass(frozen=True)
class LoraSettings:
    """The adapter, used where `training.method` is `lora`."""

    rank: int = 16
    """Higher: more capacity, more memory, sooner overfitted."""

    alpha: int = 32
    """The adapter's output is scaled by alpha / rank. Keep twice the rank unless the learning rate is tuned again."""

    dropout: float = 0.05
    """Higher resists overfitting on few pictures, and slows learning."""

    targets: tuple[str, ...] = ("language.attn", "language.mlp")
    """Roles that get an adapter: `language.attn`, `language.mlp`, `vision.attn`, `vision.mlp`, `merger`, `deepstack`; or
    patterns over module names. Vision roles help on pictures unlike photographs, and cost memory."""

    ranks: dict[str, int] = field(default_factory=dict)
    """Another rank for some of the targets, such as `{vision.attn: 8}`. A tower that has little to learn needs less."""

    dora: bool = False
    """Learn the length of each weight row apart from its direction (DoRA). Its authors found it better at small ranks; slower."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank, so that high ranks still move. Lower alpha with it."""


@dataclass(frozen=True)
class TrainingSettings:
    """What is optimised, for how long, on what."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains a small adapter; `full` trains every weight, and keeps a gradient and two moments for each."""

    areas: tuple[str, ...] = ()
    """Of a full fine-tune, the areas that train: `vision`, `merger`, `deepstack`, `language`, `embeddings`, `head`. Empty:
    all. What is left out keeps its weights, and needs no gradient and no moments."""

    collator: Literal["v1", "v2", "v3"] = "v3"
    """Where loss is taken. `v3`: answer and end token, verified. `v1` (all text), `v2` (marker search): to compare."""

    epochs: float = 3.0
    """Passes over the training rows. Too many on few pictures memorises them."""

    max_steps: int | None = None
    """Stops after this many optimiser steps, whatever `epochs` says. None: `epochs` decides."""

    batch_size: int = 8
    """Pictures per forward pass. Halve it, and double `gradient_accumulation`, when memory runs out."""

    gradient_accumulation: int = 1
    """Forward passes per optimiser step. The result is that of a batch so many times larger; only time is paid."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` learns about twice as much per step where whole matrices are trained (`full`), at a rate near 0.02 for the
    embedded base; adapters take `adamw`."""

    learning_rate: float = 1e-4
    """Peak rate. About 1e-4 for LoRA, 1e-5 for a full fine-tune of a large model; too high, and the loss jumps."""

    vision_learning_rate: float | None = None
    """Peak rate of the vision tower, where it trains. None: `learning_rate`. A tenth of it keeps what the tower knows."""

    merger_learning_rate: float | None = None
    """Peak rate of merger and deepstack mergers, where they train. None: `learning_rate`. They bear more than the tower."""

    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the rate falls after warm-up. The constant ones end noisier, and can be continued."""

    warmup_fraction: float = 0.05
    """Share of the steps during which the rate rises from 0. Too short shows as a spike of the first losses."""

    weight_decay: float = 0.0
    """Pulls weights to 0. Matters for a full fine-tune; hardly for LoRA."""

    max_grad_norm: float = 1.0
    """Longer gradients are cut to this norm. 0 leaves them as they are."""

    neftune_alpha: float = 0.0
    """Noise on the embedded tokens while training (NEFTune); 5 is usual. Resists learning few answers by heart. 0: off."""

    gradient_checkpointing: bool = False
    """Saves most of the activation memory for about a third more time."""

    max_tokens: int | None = None
    """Rows of more tokens are refused before the run; nothing is ever cut. None: what the model can read."""

    eval_every: int = 0
    """Optimiser steps between two evaluations that generate and score answers. 0: only after the last step."""

    eval_rows: int = 64
    """Validation rows in each of them. Fewer is faster, and chooses the best checkpoint less surely."""

    save_every: int = 0
    """Optimiser steps between two checkpoints from which a stopped run goes on. 0: one after each evaluation. What lies
    between the last one and a crash is trained again; each costs the size of the trained weights three times over."""

    overfit_gate: bool = True
    """Before a run of over a hundred steps, learn four rows by heart and generate them back; what cannot do that will not
    learn the rest. Costs seconds on a small base, minutes on a large one; the weights are put back after it."""

    sample_rows: int = 8
    """Validation pictures drawn with truth and prediction at each of them. 0: none."""

    loader_workers: int = 0
    """Processes that prepare batches. 0 prepares in the main process: right on few cores."""

    cache_pictures: bool = False
    """Keep each picture on disk at the size the model sees, after its first use. Same loss, less time where photographs are
    large; not with augmentation, which makes a new picture each time."""

    cache_features: bool = False
    """Keep what a frozen vision tower makes of each picture on disk, and run it once. Same loss; only where vision and
    merger are frozen and nothing is augmented."""

    group_by_length: bool = False
    """Put rows of like length into a batch: less padding, but another order of the rows."""

    distributed: Literal["auto", "none", "ddp", "fsdp", "deepspeed"] = "auto"
    """How several processes share the work; the run stops where accelerate does otherwise. `auto`: as it was launched."""

    report_to: tuple[str, ...] = ("auto",)
    """Trackers: `tensorboard`, `trackio`, `wandb`, `mlflow`; `auto` is tensorboard where it is installed. The log files are
    complete without any."""

    seed: int = 0
    """Order of the rows, new weights and augmentation. Try several seeds before believing a small difference."""


@dataclass(frozen=True)
class AugmentSettings:
    """Chances, each from 0 (off) to 1, of changing a training picture together with its boxes."""

    flip_horizontal: float = 0.0
    """Of a mirror image. Not for pictures with text, or whose labels name a left and a right."""

    flip_vertical: float = 0.0
    """Of an upside-down picture. For microscopes and satellites, not for street scenes."""

    rotate: float = 0.0
    """Of a turn by 90, 180 or 270 degrees; likewise."""

    crop: float = 0.0
    """Of cutting a window that holds every box whole. The model sees larger objects; surroundings get lost."""

    shrink: float = 0.0
    """Of laying the picture on a larger grey ground. The model sees smaller objects, elsewhere in the picture."""

    color: float = 0.0
    """Of other brightness, contrast, saturation and hue. Not where colour tells classes apart."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is scored."""

    split: str = "test"
    """The split that is scored. What chose a setting or a checkpoint must not be scored."""

    batch_size: int = 32
    """Pictures per generation pass. Changes speed and memory, not the method."""

    max_new_tokens: int = 256
    """An answer is cut here, and counted as truncated. One box takes 20 to 30 tokens."""

    resamples: int = 1000
    """Bootstrap resamples behind each interval. Fewer is faster, and the interval's ends shake."""

    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True)
class Settings:
    """Every setting of a run; `config.yaml` in its folder."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    name: str = "run"
    """The run's folder is `runs/<name>/<number>`."""

    stages: tuple[str, ...] = ()
    """Recipes to train one after another, each on the result of the one before and as a run of its own. The other keys of
    such a recipe are laid over each of them."""


def load_settings(
    path: Path | None, overrides: Sequence[str] = (), base: Settings | Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a run and check that they can work.

    When: once, first of all.

    Input: `path` of a YAML file with some or all keys, or None; `overrides` such as `["training.epochs=5",
    "data.classes=[WBC]", "data.rename.WBC=white blood cell"]`, each value read as YAML; `base`, where to start from
    instead of the defaults.
    Output: settings in which overrides win over the file, and the file over `base`. A mapping or list is replaced as a
    whole, except by `data.rename.KEY=…`, which sets one key.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value has the wrong type or cannot work.
    """
    settings = base if isinstance(base, Settings) else _bind(Settings(), base or {}, where="")
    if path is not None:
        settings = _bind(settings, _read_yaml(path), where=f"{path}: ")
    for override in overrides:
        settings = _apply_override(settings, override)
    check(settings)
    return settings


def load_stages(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> list[Settings]:
    """Read the settings of a recipe, one for each of its stages; most recipes have one.

    When: once per command.

    Input: `path` of a recipe; `flags`, nested settings that a command line gave, laid over the recipe; `overrides`, over both.
    Output: settings without `stages`. Of several stages all but the last are named `NAME-1-RECIPE`, `NAME-2-RECIPE`, …; each
    but the first trains on the result of the one before, which whoever runs them fills in as `model.name`.

    Raises:
        ConfigError: as `load_settings`; or a stage has stages itself.
    """
    whole = load_settings(path)
    if not whole.stages:
        return [load_settings(None, overrides, base=lay_over(_as_plain(whole), flags or {}))]
    common = {key: value for key, value in _read_yaml(path).items() if key != "stages"}
    result = []
    for number, recipe in enumerate(whole.stages, 1):
        stage = load_settings(find_recipe(recipe))
        if stage.stages:
            raise ConfigError(f"{path}: the stage '{recipe}' has stages itself", "name its stages instead")
        plain = lay_over(lay_over(_as_plain(stage), common), flags or {})
        settings = load_settings(None, overrides, base=plain)
        last = number == len(whole.stages)
        result.append(
            settings if last else dataclasses.replace(settings, name=f"{settings.name}-{number}-{stage.name}")
        )
    return result


def lay_over(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested changes over plain settings, section by section; neither is changed."""
    result = dict(plain)
    for key, value in changes.items():
        section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if section else value
    return result


def to_yaml(settings: Settings) -> str:
    """Write settings as YAML, every key in the order of the classes; `load_settings` reads the same settings back."""
    plain = _as_plain(settings)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)
    if yaml.safe_load(text) != plain:  # PyYAML loses a next-line character (U+0085) unless everything is escaped
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=False, width=1000)
    return text


def find_recipe(name: str) -> Path:
    """Find the file of a recipe by its name, such as `tiny`, or by a path, such as `mine/cells.yaml`.

    When: once, where a command names a recipe. Recipes lie in `configs/` of a checkout, or within an installed package.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    if Path(name).suffix in {".yaml", ".yml"} or len(Path(name).parts) > 1:
        path = Path(name)
        if path.is_file():
            return path
        beside = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(f"there is no recipe file '{name}'", did_you_mean(name, beside or _recipes()))
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"unknown recipe '{name}'", did_you_mean(name, recipes))
    return recipes[name]


def check(settings: Settings, *, needs_data: bool = False) -> None:
    """Refuse settings that cannot work, alone or together.

    When: once, by `load_settings`, and again by a verb that reads a data set, with `needs_data`.

    Raises:
        ConfigError: the first thing that cannot work: its dotted key, its value, and the way out.
    """
    for key, value, is_good, rule in _limits(settings, needs_data=needs_data):
        if not is_good:
            raise ConfigError(f"{key} is {_show(value)}", rule)


def _limits(settings: Settings, *, needs_data: bool) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield every rule as dotted key, value, whether it holds, and the way out."""
    data, model, lora, training, evaluation = (
        settings.data, settings.model, settings.lora, settings.training, settings.evaluation
    )  # fmt: skip
    good_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", settings.name) is not None
    yield "name", settings.name, good_name, "it becomes a folder: use letters, digits, '.', '_' and '-'"

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

    good_device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", model.device) is not None
    yield "model.device", model.device, good_device, "use auto, cpu, cuda, cuda:0 (or another number) or mps"
    for key, pixels in (("min_pixels", model.min_pixels), ("max_pixels", model.max_pixels)):
        yield f"model.{key}", pixels, pixels is None or pixels >= 1, "give a number of pixels, or null for the base's"
    in_order = model.min_pixels is None or model.max_pixels is None or model.min_pixels <= model.max_pixels
    way_out = f"it is above model.max_pixels ({model.max_pixels}): lower the one or raise the other"
    yield "model.min_pixels", model.min_pixels, in_order, way_out

    if training.method == "lora":
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

        yield (
            "training.areas",
            training.areas,
            not training.areas,
            "an adapter names its lora.targets; or use method=full",
        )
    elif model.quantization != "none":
        way_out = "4-bit weights cannot be trained, nor any part of a model that holds some: use training.method=lora"
        yield "model.quantization", model.quantization, False, way_out
    good = model.quantization != "none" or not model.quantize_vision
    yield "model.quantize_vision", model.quantize_vision, good, "set model.quantization=nf4 too"
    for key in ("vision_learning_rate", "merger_learning_rate"):
        rate = getattr(training, key)
        yield f"training.{key}", rate, rate is None or rate > 0, "give more than 0; to freeze an area, do not train it"
        good = rate is None or training.optimizer == "adamw"
        yield f"training.{key}", rate, good, "muon has one rate: set training.optimizer=adamw"
    still = not any(dataclasses.astuple(settings.augment))
    for key in ("cache_pictures", "cache_features"):
        way_out = "augmentation makes a new picture each time: switch one of them off"
        yield f"training.{key}", True, still or not getattr(training, key), way_out
        good = training.collator == "v3" or not getattr(training, key)
        yield f"training.{key}", True, good, "only the collator v3 leaves the resize to the processor"
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
    for chance in dataclasses.fields(settings.augment):
        value = getattr(settings.augment, chance.name)
        yield f"augment.{chance.name}", value, 0 <= value <= 1, "give a probability from 0 (off) to 1"

    for stage, key, least in (
        ("training", "batch_size", 1), ("training", "gradient_accumulation", 1), ("training", "eval_every", 0),
        ("training", "eval_rows", 1), ("training", "sample_rows", 0), ("training", "loader_workers", 0),
        ("training", "save_every", 0),
        ("evaluation", "batch_size", 1), ("evaluation", "max_new_tokens", 1), ("evaluation", "resamples", 1),
    ):  # fmt: skip
        number = getattr(getattr(settings, stage), key)
        yield f"{stage}.{key}", number, number >= least, f"give at least {least}"
    for stage in ("data", "training", "evaluation"):
        seed = getattr(settings, stage).seed
        # NumPy's and torch's common range.
        yield f"{stage}.seed", seed, 0 <= seed < 2**32, "give a whole number from 0 to 4294967295"
    yield "evaluation.split", evaluation.split, bool(evaluation.split.strip()), "name a split, such as test"


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    """Read one YAML file whose top is a mapping, and in which no key stands twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        beside = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", did_you_mean(str(path), beside)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8", "name a YAML file") from error
    values = _parse_yaml(text, where=f"{path}: ")
    if values is None:
        raise ConfigError(f"{path}: holds no settings", "leave it out to use the defaults")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: is a {type(values).__name__}, not a mapping", "write `key: value` lines")
    return values


def _parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML, as plain values only.

    PyYAML answers text such as `2020-13-45` or `!!int ''` with errors of Python's own, hence the long list.
    """
    try:
        _refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), where=where)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = str(error)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        detail = f"a value cannot be read: {error}"
    except RecursionError:
        detail = "it is nested too deeply"
    raise ConfigError(f"{where}is no valid YAML: {detail}", "check indentation and quotes")


def _refuse_duplicate_keys(root: yaml.Node | None, *, where: str) -> None:
    """Refuse a mapping that holds a key twice: `safe_load` would keep the last without a word."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias can point to a node again
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        line = key.start_mark.line + 1
                        raise ConfigError(f"{where}line {line}: the key '{key.value}' stands twice", "keep one of them")
                    keys.add((key.tag, key.value))
                waiting.append(value)


def _apply_override(settings: Settings, override: str) -> Settings:
    """Set one key by `dotted.key=value`."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals:
        raise ConfigError(f"the override '{override}' has no '='", "write it as training.epochs=5")
    hint: Any = Settings
    for depth, part in enumerate(parts):
        if not dataclasses.is_dataclass(hint):
            if get_origin(hint) is dict:  # a class name or a role may hold dots itself
                stage, name, key = getattr(settings, parts[0]), parts[depth - 1], ".".join(parts[depth:])
                entry = {**getattr(stage, name), key: _override_value(text, get_args(hint)[1], dotted)}
                return _bind(settings, {parts[0]: {name: entry}}, where="")
            raise ConfigError(f"'{'.'.join(parts[:depth])}' has no keys below it", f"write {'.'.join(parts[:depth])}=…")
        hint = _field_type(hint, part, prefix="".join(f"{parent}." for parent in parts[:depth]), where="")
    value = _override_value(text, hint, dotted)
    for part in reversed(parts):
        value = {part: value}
    return _bind(settings, value, where="")


def _override_value(text: str, hint: Any, dotted: str) -> Any:
    """Read the value of an override as YAML; where text is wanted, `007`, `no` and `null` stay what was typed."""
    if hint is str or get_origin(hint) is Literal:
        quoted = text[:1] in {"'", '"'}
        return _parse_yaml(text, where=f"{dotted}: ") if quoted else text
    return _parse_yaml(text, where=f"{dotted}: ")


def _bind(current: T, values: Mapping[Any, Any], *, where: str, prefix: str = "") -> T:
    """Return a copy of a settings object with some of its fields replaced by checked values."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        hint = _field_type(type(current), key, prefix=prefix, where=where)
        if dataclasses.is_dataclass(hint):
            if value is None or isinstance(value, Mapping):  # a section with nothing but comments reads as None
                inner = getattr(current, key)
                changes[key] = _bind(inner, value or {}, where=where, prefix=f"{prefix}{key}.")
            else:
                raise ConfigError(f"{where}{prefix}{key} is {_show(value)}, not a section", "write its keys below it")
        else:
            changes[key] = _convert(value, hint, key=f"{prefix}{key}", where=where)
    return dataclasses.replace(current, **changes)  # type: ignore[type-var]


def _field_type(owner: Any, key: Any, *, prefix: str, where: str) -> Any:
    """Return the annotated type of a field, or refuse a key that is none."""
    hints = get_type_hints(owner)
    if key not in hints:
        # A key of another section is the likelier mistake than a spelling: `epochs` at the top is `training.epochs`.
        elsewhere = [name for name in _dotted_names() if name.split(".")[-1] == key]
        choices = [f"{prefix}{name}" for name in hints]
        hint = did_you_mean(elsewhere[0] if elsewhere else f"{prefix}{key}", elsewhere or choices)
        raise ConfigError(f"{where}unknown key '{prefix}{key}'", hint)
    return hints[key]


def _dotted_names() -> list[str]:
    stages = {name: hint for name, hint in get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)}
    return [f"{stage}.{entry.name}" for stage, hint in stages.items() for entry in dataclasses.fields(hint)]


def _convert(value: Any, hint: Any, *, key: str, where: str) -> Any:
    """Return `value` as the annotated type, without guessing.

    Raises:
        ConfigError: it is not of that type; names key, value and what is expected.
    """
    for expected in get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,):
        reader = _READERS.get(expected)
        good, result = reader(value) if reader else (value in get_args(expected), value)
        if good:
            return result
    raise ConfigError(f"{where}{key} is {_show(value)}", f"expected {_describe(hint)}")


def _as_float(value: Any) -> tuple[bool, Any]:
    """Read a finite number; a text too, since YAML 1.1 takes `1e-4` for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False, value
    return math.isfinite(number), number


def _as_names(value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return False, value
    return True, tuple(value)


def _as_renames(value: Any) -> tuple[bool, Any]:
    good = isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    return good, dict(value) if good else value


def _as_ranks(value: Any) -> tuple[bool, Any]:
    good = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(rank, int) and not isinstance(rank, bool) for name, rank in value.items()
    )
    return good, dict(value) if good else value


_READERS: dict[Any, Callable[[Any], tuple[bool, Any]]] = {
    str: lambda value: (isinstance(value, str), value),
    bool: lambda value: (isinstance(value, bool), value),
    int: lambda value: (isinstance(value, int) and not isinstance(value, bool), value),
    float: _as_float,
    type(None): lambda value: (value is None, value),
    tuple[str, ...]: _as_names,
    dict[str, str]: _as_renames,
    dict[str, int]: _as_ranks,
}
"""How a plain YAML value becomes a field's type: whether it can, and the value."""

_WORDS = {
    str: "text (quote it if it looks like a number or like yes or no)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    tuple[str, ...]: "a list of texts such as [a, b] (quote what looks like a number or like yes or no)",
    dict[str, int]: "texts to whole numbers such as {vision.attn: 8}",
    dict[str, str]: "texts to texts such as {a: b} (quote what looks like a number or like yes or no)",
}


def _describe(hint: Any) -> str:
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(_describe(part) for part in get_args(hint))
    return _WORDS.get(hint) or f"one of: {', '.join(str(choice) for choice in get_args(hint))}"


def _show(value: Any) -> str:
    """Write a value for a message: short, whatever it is."""
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if any(not isinstance(item, str) for item in value) else str(list(value))[:100]
    return repr(value)[:100]


def _as_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _as_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _recipes() -> dict[str, Path]:
    """List the recipes by name: of the installed package, else of the checkout that this file lies in."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parents[1] / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
