"""Find GPUs that are free enough to train on.

When: once per command, and by `vlmdet env`; no torch. Asks the NVIDIA driver through its own library (NVML), which
answers in milliseconds and takes no memory on the GPU, as a CUDA context would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class GPU:
    """One NVIDIA GPU as the driver sees it now.

    Attributes:
        index: its number in the driver's order. CUDA's own order may differ unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
        uuid: `GPU-…`; `CUDA_VISIBLE_DEVICES` takes it, and it is the same in every order.
        name: as sold: `NVIDIA A100-SXM4-80GB`.
        total_gib: memory in GiB; None where the driver does not tell.
        free_gib: memory in GiB that nobody holds; None where the driver does not tell.
        utilization: share of the last moment in which a kernel ran, 0 to 1; None where the driver does not tell.
    """

    index: int
    uuid: str
    name: str
    total_gib: float | None
    free_gib: float | None
    utilization: float | None


def find_available_gpus(
    *,
    min_free_memory_gb: float = 8.0,
    max_utilization: float = 0.2,
    environ: Mapping[str, str] = os.environ,
    nvml: Any = pynvml,
) -> list[GPU]:
    """List the GPUs that have enough free memory and are not busy, the one with most free memory first.

    When: once, before a model is loaded.

    Input: `min_free_memory_gb`, free memory in GiB that a GPU must have; `max_utilization`, 0 to 1, above which it
    counts as busy; `environ`, whose `CUDA_VISIBLE_DEVICES` limits the choice as it limits CUDA; `nvml`, the driver's
    library.
    Output: the GPUs that qualify; `[]` on a machine without one, and `describe_gpus` says why. A GPU whose driver does
    not tell its utilisation is judged by memory alone; one that does not tell its memory qualifies only if 0 is asked.
    """
    gpus, _ = read_gpus(nvml=nvml)
    available = [
        gpu
        for gpu in _visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))
        if (gpu.free_gib or 0.0) >= min_free_memory_gb and (gpu.utilization or 0.0) <= max_utilization
    ]
    return sorted(available, key=lambda gpu: (-(gpu.free_gib or 0.0), gpu.index))


def describe_gpus(*, environ: Mapping[str, str] = os.environ, nvml: Any = pynvml) -> str:
    """Say in one line which GPUs there are, or why there is none.

    Output: `0: NVIDIA A100-SXM4-80GB, 78.9 of 80.0 GiB free, 3 % busy`, several joined by `; `; or `none: no NVIDIA
    driver on this machine`.
    """
    gpus, why = read_gpus(nvml=nvml)
    parts = [_describe(gpu) for gpu in gpus] + ([why] if why else [])
    text = "; ".join(parts) if gpus else f"none: {why}"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and visible is not None:
        shown = ", ".join(str(gpu.index) for gpu in _visible(gpus, visible)) or "none of them"
        text += f"; CUDA_VISIBLE_DEVICES={visible!r} leaves {shown}"
    return text


def read_gpus(*, nvml: Any = pynvml) -> tuple[list[GPU], str]:
    """Ask the driver for every GPU of the machine.

    Output: the GPUs in the driver's order, and what went wrong: "" if nothing did.
    """
    try:
        nvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return [], "no NVIDIA driver on this machine"
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer ({error})"
    try:
        gpus, lost = [], []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(_read_gpu(index, nvml))
            except pynvml.NVMLError as error:  # one that fell off the bus must not hide the others
                lost.append(f"GPU {index} does not answer ({error})")
        return gpus, "; ".join(lost) or ("" if gpus else "the NVIDIA driver runs, and sees no GPU")
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer ({error})"
    finally:
        nvml.nvmlShutdown()


def _read_gpu(index: int, nvml: Any) -> GPU:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _if_supported(nvml.nvmlDeviceGetMemoryInfo, handle)
    rates = _if_supported(nvml.nvmlDeviceGetUtilizationRates, handle)
    return GPU(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        total_gib=None if memory is None else memory.total / GIB,
        free_gib=None if memory is None else memory.free / GIB,
        utilization=None if rates is None else rates.gpu / 100,
    )


def _if_supported(question: Callable[[Any], T], handle: Any) -> T | None:
    """Ask what some GPUs cannot tell: utilisation of one split by MIG, memory of one that shares the machine's."""
    try:
        return question(handle)
    except pynvml.NVMLError_NotSupported:
        return None


def _visible(gpus: list[GPU], setting: str | None) -> list[GPU]:
    """Keep what `CUDA_VISIBLE_DEVICES` names; as in CUDA, the first name that fits nothing ends the list.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if setting is None:
        return gpus
    kept: list[GPU] = []
    for name in setting.split(","):
        wanted = name.strip()
        found = [
            gpu
            for gpu in gpus
            if wanted == str(gpu.index) or (wanted.startswith("GPU-") and gpu.uuid.startswith(wanted))
        ]
        if len(found) != 1:
            break
        kept += found
    return kept


def _describe(gpu: GPU) -> str:
    memory = "memory unknown"
    if gpu.free_gib is not None and gpu.total_gib is not None:
        memory = f"{gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    busy = "load unknown" if gpu.utilization is None else f"{gpu.utilization:.0%} busy"
    return f"{gpu.index}: {gpu.name}, {memory}, {busy}"
