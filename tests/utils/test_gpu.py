"""GPUs: chosen by free memory and load, and a machine without one says so.

The driver is a stand-in with NVML's functions that answers with NVML's own structures and raises its own errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from vlmdet.utils.gpu import GIB, describe_gpus, find_available_gpus, read_gpus


@dataclass
class Card:
    """One GPU of the stand-in; an error in place of an answer is raised."""

    name: str = "NVIDIA L4"
    uuid: str = "GPU-0"
    total: int = 24
    free: int | Exception = 23
    load: int | Exception = 0


@dataclass
class FakeNvml:
    """The part of `pynvml` that is asked."""

    cards: list[Card] = field(default_factory=list)
    init_error: Exception | None = None
    open: int = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error is not None:
            raise self.init_error
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        return card.name

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        return card.uuid

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:  # noqa: N802
        if isinstance(card.free, Exception):
            raise card.free
        return pynvml.c_nvmlMemory_t(card.total * GIB, card.free * GIB, (card.total - card.free) * GIB)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:  # noqa: N802
        if isinstance(card.load, Exception):
            raise card.load
        return pynvml.c_nvmlUtilization_t(card.load, 0)


def error(code: int) -> Exception:
    return pynvml.NVMLError(code)  # NVML's factory: gives the subclass of the code


NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
FOUR = [
    Card(uuid="GPU-aaaa", free=10, load=0),
    Card(uuid="GPU-aabb", free=23, load=5),
    Card(uuid="GPU-cccc", free=7, load=0),
    Card(uuid="GPU-dddd", free=23, load=95),
]


def indices(nvml: FakeNvml, environ: dict[str, str] | None = None, **thresholds: float) -> list[int]:
    return [gpu.index for gpu in find_available_gpus(environ=environ or {}, nvml=nvml, **thresholds)]


def test_a_gpu_is_read_as_the_driver_tells_it() -> None:
    (gpu,), why = read_gpus(
        nvml=FakeNvml([Card(name="NVIDIA A100-SXM4-80GB", uuid="GPU-x", total=80, free=60, load=15)])
    )
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-x", "NVIDIA A100-SXM4-80GB")
    assert (gpu.total_gib, gpu.free_gib, gpu.utilization, why) == (80.0, 60.0, 0.15, "")


def test_free_and_idle_ones_are_found_the_freest_first() -> None:
    assert indices(FakeNvml(FOUR)) == [1, 0]  # 2 has 7 GiB, 3 is busy


def test_thresholds_are_settings_and_inclusive() -> None:
    assert indices(FakeNvml(FOUR), min_free_memory_gb=7) == [1, 0, 2]
    assert indices(FakeNvml(FOUR), min_free_memory_gb=7.1) == [1, 0]
    assert indices(FakeNvml(FOUR), max_utilization=0.05) == [1, 0]
    assert indices(FakeNvml(FOUR), max_utilization=0.04) == [0]
    assert indices(FakeNvml(FOUR), max_utilization=1.0) == [1, 3, 0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("0", [0]),
        ("1, 0", [1, 0]),
        ("GPU-aaaa", [0]),
        ("GPU-dddd,GPU-aabb", [1]),
        ("GPU-aa", []),  # fits two
        ("", []),
        ("-1", []),
        ("0,9,1", [0]),  # CUDA stops at the first that fits nothing
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_limits_the_choice(setting: str, expected: list[int]) -> None:
    assert indices(FakeNvml(FOUR), {"CUDA_VISIBLE_DEVICES": setting}) == expected


def test_a_load_that_is_not_told_counts_as_none_and_memory_that_is_not_told_as_none() -> None:
    cards = [Card(load=error(NOT_SUPPORTED)), Card(free=error(NOT_SUPPORTED))]
    assert indices(FakeNvml(cards)) == [0]
    assert indices(FakeNvml(cards), min_free_memory_gb=0) == [0, 1]
    text = describe_gpus(environ={}, nvml=FakeNvml(cards))
    assert text == "0: NVIDIA L4, 23.0 of 24.0 GiB free, load unknown; 1: NVIDIA L4, memory unknown, 0% busy"


def test_a_gpu_that_is_lost_is_told_and_does_not_hide_the_others() -> None:
    nvml = FakeNvml([Card(free=error(pynvml.NVML_ERROR_GPU_IS_LOST)), Card()])
    assert indices(nvml) == [1]
    assert "GPU 0 does not answer" in describe_gpus(environ={}, nvml=nvml)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "none: no NVIDIA driver on this machine"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "none: the NVIDIA driver does not answer (Driver Not Loaded)"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "none: the NVIDIA driver does not answer"),
    ],
)
def test_a_machine_without_a_working_driver_says_why(code: int, expected: str) -> None:
    nvml = FakeNvml(init_error=error(code))
    assert find_available_gpus(environ={}, nvml=nvml) == []
    assert describe_gpus(environ={}, nvml=nvml).startswith(expected)


def test_a_driver_without_a_gpu_says_so() -> None:
    assert describe_gpus(environ={}, nvml=FakeNvml()) == "none: the NVIDIA driver runs, and sees no GPU"


def test_what_the_environment_leaves_is_told() -> None:
    assert describe_gpus(environ={"CUDA_VISIBLE_DEVICES": "1"}, nvml=FakeNvml(FOUR)).endswith("='1' leaves 1")
    assert describe_gpus(environ={"CUDA_VISIBLE_DEVICES": ""}, nvml=FakeNvml(FOUR)).endswith("='' leaves none of them")


def test_the_driver_is_closed_again() -> None:
    for nvml in (FakeNvml(FOUR), FakeNvml([Card(free=error(pynvml.NVML_ERROR_UNKNOWN))])):
        read_gpus(nvml=nvml)
        assert nvml.open == 0


def test_the_real_library_answers_on_any_machine() -> None:
    gpus, why = read_gpus()
    assert bool(gpus) or bool(why)
    assert "\n" not in describe_gpus()
