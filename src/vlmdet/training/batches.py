"""From samples to what the trainer feeds the model: rows, their order, and the collator that makes batches of them.

When: PER RUN, before the trainer is built; what is returned here then runs EVERY BATCH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import datasets
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from vlmdet.contract import Contract
from vlmdet.data.augment import augment_rows
from vlmdet.data.collators import Qwen2VLCollatorV1, Qwen2VLCollatorV2, Qwen2VLCollatorV3
from vlmdet.data.collators_other import PromptAnswerCollator
from vlmdet.data.dataset import build_rows
from vlmdet.data.resized import ResizedCollator, ResizedPictures, undecoded
from vlmdet.errors import ConfigError
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.processors import is_other_family
from vlmdet.records import Sample
from vlmdet.runs import RUNS
from vlmdet.settings import Settings
from vlmdet.training.vision_cache import FeatureCollator, FrozenFeatures

CACHE = RUNS / "cache"
"""Where cached pictures and features lie; runs share them, since their names say what they were made of. May be deleted."""


def training_rows(
    samples: Sequence[Sample], settings: Settings, contract: Contract, *, epoch: Callable[[], int] = lambda: 0
) -> datasets.Dataset:
    """Make the rows that the trainer reads: `messages`, `image`, `boxes`, `labels`, `id`.

    Input: `epoch()` counts the passes, for augmentation, which changes a row at each access.
    Output: one row per sample; pictures stay undecoded where a cache needs their bytes.
    """
    view_of = partial(
        plan_view, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels, factor=contract.size_factor
    )
    rows = build_rows(
        samples,
        labels=contract.labels,
        codec=contract.codec,
        box_order=settings.data.box_order,
        view_of=view_of,
    )
    chances = asdict(settings.augment)
    if any(chances.values()):
        rows = rows.with_transform(
            partial(
                augment_rows,
                chances=chances,
                asked=contract.labels,
                codec=contract.codec,
                box_order=settings.data.box_order,
                seed=settings.training.seed,
                epoch=epoch,
                view_of=view_of,
            )
        )
    elif settings.training.cache_pictures or settings.training.cache_features:
        rows = undecoded(rows)
    return rows


def make_collator(processor: Any, settings: Settings, contract: Contract) -> Any:
    """Return the collator that the settings name, with the contract's pixel limits; resized pictures are cached if asked.

    Raises:
        ConfigError: the settings ask for what is there for Qwen-VL only.
    """
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    if is_other_family(processor):
        for key, usual in (("collator", "v3"), ("cache_pictures", False), ("cache_features", False)):
            if getattr(settings.training, key) != usual:
                raise ConfigError(
                    f"training.{key}={getattr(settings.training, key)} is there for Qwen-VL only",
                    f"leave it at {usual}",
                )
        return PromptAnswerCollator(processor, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels)
    kinds = {"v1": Qwen2VLCollatorV1, "v2": Qwen2VLCollatorV2, "v3": Qwen2VLCollatorV3}
    collator: Any = kinds[settings.training.collator](processor, **limits)
    if settings.training.cache_pictures:
        pictures = ResizedPictures(CACHE / "pictures", processor.image_processor, **limits)
        return ResizedCollator(collator, pictures)
    return collator


def cache_features(
    model: Any, processor: Any, collator: Any, rows: datasets.Dataset, contract: Contract, *, say: Callable[[str], None]
) -> Any:
    """Run a frozen vision tower over every picture once, and return a collator that hands its features on.

    When: once per run, when the trainer has built the adapter.

    Raises:
        ConfigError: the tower trains, or the family has none that can be left out.
    """
    features = FrozenFeatures(
        model, processor, CACHE / "features", min_pixels=contract.min_pixels, max_pixels=contract.max_pixels
    )
    filled = features.fill(model, rows)
    say(
        f"features of {filled.rows} pictures: {filled.encoded} made now in {filled.seconds:.0f} s, {filled.megabytes:.0f} MB "
        f"in {features.folder}"
    )
    return FeatureCollator(collator, features)


class LengthGroups(torch.utils.data.Sampler[int]):
    """Order rows so that those of a batch are of like length, differently in each epoch.

    When: EVERY EPOCH. The trainer's own sampler draws from torch's global generator, which stands elsewhere when a stopped run
    goes on; here the order depends on seed and epoch alone.

    Args:
        lengths: tokens of each row.
        batch: rows of one optimiser step, of all processes.
        seed: of the run.
        epoch: counts the passes.
    """

    def __init__(self, lengths: Sequence[int], *, batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order: list[int] = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        return iter(order)
