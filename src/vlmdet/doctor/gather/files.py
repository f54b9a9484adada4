"""Files of a finished run and of saved artefacts: logs, configurations, headers of weights, predictions. No torch, no pickle.

When: for checks of runs and artefacts; a directory may be written by any Trainer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable

_HEADER_LIMIT = 100_000_000
_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor by the header of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    def read(self) -> np.ndarray:
        """Read the values; bfloat16 comes as float32.

        Raises:
            NotAvailable: of a type that numpy has not.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.end - self.start)
        if self.dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif self.dtype in _TYPES:
            values = np.frombuffer(data, _TYPES[self.dtype])
        else:
            raise NotAvailable(f"weights of a usual type, not {self.dtype}")
        return values.reshape(self.shape)


@dataclass(frozen=True)
class Artefact:
    """A saved directory or file.

    Attributes:
        configs: file name -> content, of every small JSON file (config.json, adapter_config.json, preprocessor_config.json,
            processor_config.json, tokenizer_config.json, generation_config.json, …).
        tensors: name -> `Tensor` of every safetensors file; `broken`: files that cannot be read, with the reason.
        template: the chat template, from wherever it is saved; None where it is not.
        files: names and sizes in bytes.
    """

    name: str
    path: Path
    exists: bool
    configs: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    files: dict[str, int] = field(default_factory=dict)

    def image_limits(self) -> dict[str, Any]:
        """Return the picture settings: of preprocessor_config.json, else of processor_config.json; `{}` where neither is."""
        for name in ("preprocessor_config.json", "image_processor_config.json", "processor_config.json"):
            config = self.configs.get(name)
            if isinstance(config, dict):
                inner = config.get("image_processor", config)
                if isinstance(inner, dict) and any(key in inner for key in ("size", "min_pixels", "max_pixels")):
                    return inner
        return {}

    def pixels(self) -> tuple[float | None, float | None]:
        """Return min_pixels and max_pixels, under either of their names."""
        limits = self.image_limits()
        size = limits.get("size") if isinstance(limits.get("size"), dict) else {}
        low = limits.get("min_pixels") or (size or {}).get("shortest_edge") or (size or {}).get("min_pixels")
        high = limits.get("max_pixels") or (size or {}).get("longest_edge") or (size or {}).get("max_pixels")
        return low, high


def read_artefact(name: str, path: Path) -> Artefact:
    """Read the small files and the headers of the weights of a directory, or one JSON or safetensors file."""
    if not path.exists():
        return Artefact(name, path, False)
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    artefact = Artefact(name, path, True, files={one.name: one.stat().st_size for one in files})
    template = None
    for file in files:
        if (
            file.suffix == ".json"
            and file.stat().st_size < 20_000_000
            and file.name not in ("tokenizer.json", "vocab.json")
        ):
            try:
                artefact.configs[file.name] = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError, RecursionError) as error:
                artefact.broken[file.name] = str(error)
        elif file.suffix == ".safetensors":
            try:
                artefact.tensors.update(read_header(file))
            except (ValueError, OSError, struct.error) as error:
                artefact.broken[file.name] = str(error)
        elif file.name == "chat_template.jinja":
            template = file.read_text(encoding="utf-8", errors="replace")
    if template is None:
        for file_name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            config = artefact.configs.get(file_name)
            if isinstance(config, dict) and isinstance(config.get("chat_template"), str):
                template = config["chat_template"]
                break
    return Artefact(name, path, True, artefact.configs, artefact.tensors, artefact.broken, template, artefact.files)


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file; no weight is read.

    Raises:
        ValueError: the header is broken, or the file is shorter than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_HEADER_LIMIT, size):
            raise ValueError("the header is longer than the file")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, one in header.items():
        if name == "__metadata__":
            continue
        start, end = one["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"the file ends before {name}")
        tensors[name] = Tensor(name, one["dtype"], tuple(one["shape"]), file, 8 + length + start, 8 + length + end)
    return tensors


@dataclass(frozen=True)
class Run:
    """What a Trainer left behind.

    Attributes:
        state: the newest trainer_state.json; log: its `log_history`.
        checkpoints: step -> artefact of each `checkpoint-*`.
        top: the directory itself as an artefact.
        predictions: file name (without suffix, with its folders) -> rows.
    """

    path: Path
    state: dict[str, Any]
    log: list[dict[str, Any]]
    checkpoints: dict[int, Artefact]
    top: Artefact
    predictions: dict[str, list[dict[str, Any]]]


def read_run(path: Path) -> Run:
    """Read a run's directory.

    Raises:
        NotAvailable: no such directory.
    """
    if not path.is_dir():
        raise NotAvailable(f"a directory of a run; {path} is none")
    checkpoints: dict[int, Artefact] = {}
    for folder in sorted([*path.glob("checkpoint-*"), *path.glob("*/checkpoint-*")]):
        digits = folder.name.removeprefix("checkpoint-")
        if folder.is_dir() and digits.isdigit():
            checkpoints.setdefault(int(digits), read_artefact(folder.name, folder))
    top = read_artefact("run", path)
    states = [artefact.configs.get("trainer_state.json") for artefact in (*checkpoints.values(), top)]
    known = [one for one in states if isinstance(one, dict)]
    state = max(known, key=lambda one: (one.get("global_step") or 0, len(one.get("log_history") or [])), default={})
    log = [one for one in state.get("log_history") or [] if isinstance(one, dict)] or _log_lines(path)
    predictions: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(path.rglob("*.jsonl"))[:60]:
        rows = read_lines(file)
        if rows and any(key in rows[0] for key in _ANSWER_KEYS):
            predictions[str(file.relative_to(path).with_suffix(""))] = rows
    for file in sorted({*path.glob("*predictions*.json"), *path.glob("*/*predictions*.json")})[:20]:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, list) and content and isinstance(content[0], dict):
            predictions[str(file.relative_to(path).with_suffix(""))] = content
    return Run(path, state, log, checkpoints, top, predictions)


_ANSWER_KEYS = ("text", "prediction", "predictions", "output", "response", "generated", "generated_text", "boxes", "pred_boxes",
                "predicted_boxes", "answer", "pred", "completion")  # fmt: skip


def read_lines(file: Path, limit: int = 20_000) -> list[dict[str, Any]]:
    """Read the objects of a JSON lines file, at most `limit`; lines that are none are left out."""
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if len(rows) >= limit:
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _log_lines(path: Path) -> list[dict[str, Any]]:
    for name in (
        "train/log.jsonl",
        "log.jsonl",
        "logging.jsonl",
        "train_log.jsonl",
        "trainer_log.jsonl",
        "log_history.json",
    ):
        file = path / name
        if file.is_file():
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []
            return read_lines(file)
    return []


def read_artefacts(value: Any) -> dict[str, Artefact]:
    """Read a mapping name -> path (or an open dict, which is kept as a configuration), or one directory with its folders."""
    if isinstance(value, (str, Path)):
        root = Path(value)
        if root.is_file():
            return {root.stem: read_artefact(root.stem, root)}
        found = {"run": read_artefact("run", root)}
        for folder in sorted(root.iterdir() if root.is_dir() else ()):
            if folder.is_dir() or folder.suffix == ".json":
                found[folder.stem] = read_artefact(folder.stem, folder)
        return found
    found = {}
    for name, one in dict(value).items():
        if isinstance(one, Mapping):
            found[str(name)] = Artefact(str(name), Path(), True, configs={f"{name}.json": dict(one)})
        elif isinstance(one, (list, tuple)):
            for i, inner in enumerate(one):
                if isinstance(inner, (str, Path)):
                    found[f"{name}[{i}]"] = read_artefact(f"{name}[{i}]", Path(inner))
        elif isinstance(one, (str, Path)):
            found[str(name)] = read_artefact(str(name), Path(one))
    return found
