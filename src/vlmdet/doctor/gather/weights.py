"""Adapter, base and merged weights laid against one another by name; a few tensors are read, nothing is loaded into a model.

When: WHEN WRONG, from the artefacts of `files`; numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.gather.files import Artefact, Tensor

READ = 6
"""Adapted modules whose weights are read, at most; the smallest first."""

VISUAL = ("visual.", "vision_tower.", "vision_model.", "vit.")


@dataclass(frozen=True)
class Pair:
    """One adapted module: its factors, and the name of its weight without prefixes."""

    module: str
    down: Tensor
    up: Tensor


def adapter_config(artefact: Artefact) -> dict[str, Any]:
    """Return `adapter_config.json` of an artefact; `{}` without one."""
    config = artefact.configs.get("adapter_config.json")
    return config if isinstance(config, dict) else {}


def pairs_of(artefact: Artefact) -> list[Pair]:
    """Return the LoRA factors of an adapter, by module."""
    found = []
    for name, tensor in artefact.tensors.items():
        if ".lora_A" not in name:
            continue
        other = artefact.tensors.get(name.replace(".lora_A", ".lora_B"))
        if other is not None:
            module = name.split(".lora_A")[0].removeprefix("base_model.").removeprefix("model.")
            found.append(Pair(module, tensor, other))
    return found


def find_weight(module: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Find a module's weight among tensors by the longest common ending of its name; None where no name ends so.

    Prefixes changed between releases (`model.visual`, `visual`; `model.layers`, `model.language_model.layers`), endings did not.
    """
    parts = module.split(".")
    for start in range(max(len(parts) - 2, 1)):
        ending = ".".join(parts[start:]) + ".weight"
        hits = [name for name in tensors if name == ending or name.endswith(f".{ending}")]
        if len(hits) == 1:
            return tensors[hits[0]]
        if hits:
            return None
    return None


def old_name(module: str) -> bool:
    """Tell whether a module has the name that Qwen-VL models had before transformers 4.52: `model.layers`, `visual.blocks`.

    Bases keep those names on disk and are renamed on loading; the keys of an adapter are not.
    """
    return module.startswith(("visual.", "model.layers.", "layers."))


def delta(pair: Pair, config: Mapping[str, Any]) -> np.ndarray:
    """Return what an adapter adds to one weight: B A alpha / r."""
    rank = pair.down.shape[0]
    alpha = float(config.get("lora_alpha") or rank)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return (pair.up.read().astype(np.float64) @ pair.down.read().astype(np.float64)) * scale


def smallest(pairs: list[Pair], most: int = READ) -> list[Pair]:
    """Return the modules that are cheapest to read, and the one with the largest share of names first of each area."""
    usable = [pair for pair in pairs if len(pair.down.shape) == 2 and len(pair.up.shape) == 2]
    return sorted(usable, key=lambda pair: pair.up.shape[0] * pair.down.shape[1])[:most]


@dataclass(frozen=True)
class Merge:
    """How a merged weight differs from its base, over some modules, as norms relative to what the adapter adds.

    Attributes:
        residue: |merged - base - delta| / |delta|: 0 for an exact merge, 1 where nothing was merged.
        moved: |merged - base| / |delta|: 1 for an exact merge.
        others: the largest relative difference of a weight that no adapter touches.
        modules: how many were read.
        dtypes: of base and merged weights: `("BF16", "BF16")`.
        low_rank: what is left over is of low rank, as an adapter is and rounding is not.
    """

    residue: float
    moved: float
    others: float
    modules: int
    dtypes: tuple[str, str]
    low_rank: bool


def compare_merge(base: Artefact, merged: Artefact, adapters: list[Artefact]) -> Merge:
    """Compare a merged model with its base plus adapters, over a few small modules.

    Raises:
        NotAvailable: they have no module in common, or no weights that can be read.
    """
    by_module: dict[str, list[tuple[Pair, Mapping[str, Any]]]] = {}
    for adapter in adapters:
        for pair in pairs_of(adapter):
            by_module.setdefault(pair.module, []).append((pair, adapter_config(adapter)))
    chosen = smallest([held[0][0] for held in by_module.values()])
    residue = moved = size = 0.0
    modules, dtypes, shares = 0, ("", ""), []
    for one in chosen:
        before, after = find_weight(one.module, base.tensors), find_weight(one.module, merged.tensors)
        if before is None or after is None or before.shape != after.shape:
            continue
        added = sum(delta(pair, config) for pair, config in by_module[one.module])
        if np.shape(added) != before.shape:
            continue
        change = after.read().astype(np.float64) - before.read().astype(np.float64)
        residue += float(((change - added) ** 2).sum())
        moved += float((change**2).sum())
        size += float((np.asarray(added) ** 2).sum())
        modules += 1
        dtypes = (before.dtype, after.dtype)
        shares.append(_top_share(change - added))
    if not modules or size == 0:
        raise NotAvailable("weights of base, adapter and merged model under names that belong together")
    return Merge(
        math.sqrt(residue / size),
        math.sqrt(moved / size),
        _others(base, merged, set(by_module)),
        modules,
        dtypes,
        min(shares) > 0.9,
    )


def _top_share(matrix: np.ndarray) -> float:
    """Return the share of a matrix that its largest quarter of singular values holds; 0 for nothing."""
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(values[: max(len(values) // 4, 1)].sum() / values.sum()) if values.sum() > 0 else 0.0


def _others(base: Artefact, merged: Artefact, adapted: set[str]) -> float:
    """Return the largest relative difference among a few small weights that no adapter touches."""
    endings = {module.split(".", 1)[-1] for module in adapted}
    names = [
        name
        for name in base.tensors
        if name in merged.tensors
        and base.tensors[name].shape == merged.tensors[name].shape
        and not any(name.removesuffix(".weight").endswith(ending) for ending in endings)
        and 8 <= math.prod(base.tensors[name].shape) <= 4_000_000
    ]
    worst = 0.0
    for name in sorted(names, key=lambda one: -math.prod(base.tensors[one].shape))[:READ]:
        one, other = base.tensors[name].read().astype(np.float64), merged.tensors[name].read().astype(np.float64)
        worst = max(worst, float(np.linalg.norm(one - other) / (np.linalg.norm(one) + 1e-12)))
    return worst
