"""Typed settings, one frozen class per stage; the text under each field is its help.

When: ALWAYS; no torch. A help text says what a change costs or brings. `config` reads settings from YAML and dotted overrides,
`limits` refuses what cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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

    scores: Literal["token_probability", "first_token", "consistency", "none"] = "token_probability"
    """Where a box's score comes from: its own tokens, the token that begins it, or how often drawn answers have it too, which
    takes as many times longer. Without scores there is no AP and no curve; boxes are the same."""

    consistency_samples: int = 5
    """Answers that are drawn for `scores=consistency`. More make finer scores, and cost as much each."""

    constrain: bool = False
    """Write nothing but the notation and the labels, so that every answer parses. The plain answer is what a user gets."""

    max_errors: float = 0.05
    """Share of pictures that may fail (broken, or the model fails on them) before the evaluation does; they are not scored."""

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
