"""What a frozen vision tower makes of each picture, computed once and kept on disk.

When: PER RUN, `fill` before the first step; the collator then runs EVERY BATCH. A tower that does not train gives the same
features in every epoch, so all epochs but one can do without it, and without decoding a picture. The price is one pass of the
tower over all pictures, which the first epoch would have taken anyway, and disk: for each image token its width, once and once
more for each deepstack layer of Qwen3-VL. A photograph under 1,003,520 pixels takes 1,280 tokens of width 1,536 in the 2B model:
4 MB in bfloat16.

One file per picture, `<sha256>.safetensors`, in the model's dtype: `grid` (3,) int64, `features` (tokens, width), and
`deepstack_0`, … (tokens, width) where the family has them. The name is a hash over the bytes of the picture file, the processor's
settings, the pixel limits and the tower's weights.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from vlmdet.data.collators import EncodedPicture
from vlmdet.data.resized import (
    ResizedCollator,
    picture_bytes,
    picture_key,
    processing_settings,
    undecoded,
)
from vlmdet.errors import ConfigError, TrainingError
from vlmdet.files import write_whole
from vlmdet.images import open_image
from vlmdet.training.precision import as_the_run, in_half

if TYPE_CHECKING:
    import datasets


class Filled(NamedTuple):
    """What filling the cache took: rows in all, pictures encoded now, seconds, and megabytes written."""

    rows: int
    encoded: int
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class KnownFeatures:
    """The features of n pictures under the names that a model reads from the output of its tower.

    Not the output's own class of transformers: the data loader cannot pin one of those in memory.

    Attributes:
        pooler_output: n tensors (tokens, width), in the model's dtype.
        deepstack_features: for each deepstack layer n tensors (tokens, width); none but in Qwen3-VL.
    """

    pooler_output: list[torch.Tensor]
    deepstack_features: list[list[torch.Tensor]]

    def pin_memory(self) -> KnownFeatures:
        """Return the same in page-locked memory; the data loader asks for it where there is a GPU."""
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: Any, non_blocking: bool = False) -> KnownFeatures:
        """Return the same on a device; accelerate asks for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def to_tuple(self) -> tuple[Any, ...]:
        """Return both; the models ask for it where they word their own output as a tuple."""
        return (self.pooler_output, self.deepstack_features)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KnownFeatures:
        return KnownFeatures(
            [change(tensor) for tensor in self.pooler_output],
            [[change(tensor) for tensor in layer] for layer in self.deepstack_features],
        )


class FrozenFeatures:
    """A folder with the features of pictures under one frozen tower; it does not hold the model.

    Args:
        model: plain or wrapped by PEFT; with its weights, and as it will train.
        processor: of the model.
        folder: of the files; made where absent. Runs may share it.
        min_pixels: smallest picture area after the resize.
        max_pixels: largest.

    Raises:
        ConfigError: the model has no tower as the Qwen-VL families have it, or a parameter of tower or merger is trainable.
    """

    def __init__(self, model: nn.Module, processor: Any, folder: Path, *, min_pixels: int, max_pixels: int) -> None:
        tower = _tower(model)
        moving = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        if moving:
            raise ConfigError(
                f"training.cache_features needs a frozen vision tower, but visual.{moving[0]} is trained",
                "set training.cache_features=false, or train the language model alone (recipe r1-llm-only)",
            )
        self.folder = folder
        self.image_processor = processor.image_processor
        self.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        settings = processing_settings(self.image_processor, min_pixels=min_pixels, max_pixels=max_pixels)
        self.settings = settings + fingerprint_tower(tower) + str(in_half(model))
        folder.mkdir(parents=True, exist_ok=True)

    def fill(self, model: nn.Module, rows: datasets.Dataset, *, batch_size: int = 8) -> Filled:
        """Encode every picture that is not there yet.

        When: once per run, before the first step. Of several processes each takes its share; then each looks again, and computes
        what the others wrote to a disk that it does not see.

        Input: the model; rows of `data.dataset.build_rows`; `batch_size`, pictures per pass of the tower.

        Raises:
            ImageError: a picture is missing or broken.
            TrainingError: the disk has no room for the features.
        """
        started = time.perf_counter()
        rows = undecoded(rows).select_columns(["id", "image"])
        state = PartialState()
        encoded, written = 0, 0
        if state.num_processes > 1:
            share = rows.shard(state.num_processes, state.process_index, contiguous=True)
            encoded, written = self._fill(model, share, batch_size)
            state.wait_for_everyone()
        more = self._fill(model, rows, batch_size)
        seconds = time.perf_counter() - started
        return Filled(len(rows), encoded + more[0], seconds, (written + more[1]) / 1e6)

    def _fill(self, model: nn.Module, rows: datasets.Dataset, batch_size: int) -> tuple[int, int]:
        """Encode what is missing; returns the number of pictures and of bytes written."""
        encoded, written = 0, 0
        for first in tqdm(range(0, len(rows), batch_size), "features", delay=2, leave=False, disable=None):
            missing: dict[Path, Image.Image] = {}
            for row in rows.select(range(first, min(first + batch_size, len(rows)))):
                data = picture_bytes(row["image"], f"row {row['id']}")
                file = self._file(data)
                if _load(file) is None:
                    missing[file] = open_image(data, name=f"row {row['id']}")
            if not missing:
                continue
            for file, tensors in zip(missing, self._encode(model, list(missing.values())), strict=True):
                content = save(tensors)
                needed = len(content) * (len(rows) - first)
                if encoded == 0 and shutil.disk_usage(self.folder).free < needed:
                    raise _full(self.folder, needed)
                try:
                    write_whole(file, content)
                except OSError as error:
                    raise _full(self.folder, needed) from error
                encoded, written = encoded + 1, written + len(content)
        return encoded, written

    def load(self, image: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
        """Return `grid` (3,) int64, `features` (tokens, width), and `deepstack_0`, … of a row's undecoded picture.

        Raises:
            TrainingError: `fill` has not seen the picture, or its file is damaged.
        """
        file = self._file(picture_bytes(image, name))
        found = _load(file)
        if found is None:
            raise TrainingError(
                f"{name}: {file} is missing or damaged, or the picture has changed since its features were computed",
                "start the command again: what is missing is computed first",
            )
        return found

    def _file(self, data: bytes) -> Path:
        return self.folder / f"{picture_key(data, self.settings)}.safetensors"

    @torch.no_grad()
    def _encode(self, model: nn.Module, pictures: list[Image.Image]) -> list[dict[str, torch.Tensor]]:
        device = next(_tower(model).parameters()).device
        made = self.image_processor(pictures, size=self.size, return_tensors="pt")
        grids = made["image_grid_thw"]
        pixels = made["pixel_values"].to(device)
        with as_the_run(model):
            output = _base(model).get_image_features(pixels, grids.to(device), return_dict=True)
        layers = getattr(output, "deepstack_features", None) or []
        return [
            {"grid": grids[i].clone(), "features": _plain(output.pooler_output[i])}
            | {f"deepstack_{k}": _plain(layer[i]) for k, layer in enumerate(layers)}
            for i in range(len(pictures))
        ]


class FeatureCollator:
    """Make batches of cached features instead of pixels.

    When: every batch of training, in place of `collator`.

    Input: rows with an undecoded `image`, see `data.resized.undecoded`.
    Output: the batch of `collator` without `pixel_values`. Instead `mm_encoder_outputs` holds `{"image": KnownFeatures}`, which
    the Qwen-VL models of transformers 5.24 take for the output of their tower, and leave the tower out.

    Args:
        collator: a `Qwen2VLCollatorV3`, or one in a `ResizedCollator`, which is then not needed.
        features: filled with every picture.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], Any], features: FrozenFeatures) -> None:
        # features take the place of resized pictures, which would ask for the picture
        self.collator = collator.collator if isinstance(collator, ResizedCollator) else collator
        self.features = features

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Make a batch.

        Raises:
            TrainingError: a picture has no features; or as `collator`.
        """
        stored = [self.features.load(row["image"], f"row {row['id']}") for row in rows]
        grids = [EncodedPicture(*tensors["grid"].tolist()) for tensors in stored]
        seen = [dict(row) | {"image": grid} for row, grid in zip(rows, grids, strict=True)]
        batch = self.collator(seen)
        layers = sum(name.startswith("deepstack_") for name in stored[0])
        known = KnownFeatures(
            [tensors["features"] for tensors in stored],
            [[tensors[f"deepstack_{k}"] for tensors in stored] for k in range(layers)],
        )
        batch["mm_encoder_outputs"] = {"image": known}
        return batch


def fingerprint_tower(tower: nn.Module) -> str:
    """Hash names, types and values of a vision tower's weights, merger included: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, parameter in tower.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tower(model: nn.Module) -> nn.Module:
    base = _base(model)
    tower = getattr(getattr(base, "model", None), "visual", None)
    if not isinstance(tower, nn.Module) or not hasattr(base, "get_image_features"):
        raise ConfigError(
            f"a {type(base).__name__} has no vision tower as the Qwen-VL families have it",
            "set training.cache_features=false",
        )
    return tower


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def _load(file: Path) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _full(folder: Path, needed: int) -> TrainingError:
    return TrainingError(
        f"{folder}: no room for the features of the pictures, about {needed / 1e9:.1f} GB",
        "free some space, lower model.max_pixels, or set training.cache_features=false",
    )
