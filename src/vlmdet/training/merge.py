"""Merge the adapter of a run into its base, and prove that nothing was lost.

When: AFTER training, once per run that is to be served or shared.

    vlmdet merge runs/cells          -> runs/cells/001/merged: plain safetensors, processor, contract.json, merge.json

1. The base that the contract names is loaded in float32, never quantised, and every stage's adapter is laid on it in order.
2. That model answers on a few pictures; then its adapter is added into the weights of the very same model.
3. What was written is loaded again by plain transformers, and must give the same logits and the same boxes.
4. A run that trained on a 4-bit base knew other weights than those merged now. What that changes is measured, not hoped.

The folder appears when all of it has passed, under its own name in a single step; a merge that fails leaves nothing.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmdet.boxes import Boxes
from vlmdet.config import load_settings
from vlmdet.contract import Contract, adopt, tell_permitted
from vlmdet.data.synthetic.packages import draw_package
from vlmdet.errors import ConfigError, DataError, ImageError, ModelError, did_you_mean
from vlmdet.evaluation.compare import paired_difference
from vlmdet.evaluation.evaluate import evaluate
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.predict import predict
from vlmdet.evaluation.scoring import format_change, format_figure
from vlmdet.models.inference import hf_engine
from vlmdet.models.loader import DTYPES, Loaded, load, refuse_other_contract
from vlmdet.models.lora import merge_adapter
from vlmdet.models.stages import Stages, is_adapter, stages_of
from vlmdet.records import Sample
from vlmdet.runs import is_done, need_run
from vlmdet.settings import Settings
from vlmdet.training.prepare import read_data
from vlmdet.training.processes import world_size

Say = Callable[[str], None]

MAX_DIFFERENCE = 1e-3
"""Largest difference of a logit, in float32, between base + adapter and the merged weights. Rounding alone gives 1e-5."""

ROWS = 8
"""Pictures on which both answer."""

SPARE = 64 * 2**20
"""Bytes to leave free beside the weights: processor, records, and what else goes on on that disk."""


@dataclass(frozen=True)
class Seen:
    """What a model said: n `rows` of `predictions.jsonl`, and `logits` (n, tokens, vocabulary) float32."""

    rows: list[dict[str, Any]]
    logits: torch.Tensor


def merge_run(
    name: str,
    *,
    out: Path | None = None,
    dtype: str = "auto",
    skip_eval: bool = False,
    allow: Sequence[str] = (),
    say: Say = print,
) -> dict[str, Any]:
    """Write the weights of a run's base with its adapters merged in, verified, as a folder that plain transformers loads.

    When: `vlmdet merge RUN`.

    Input: `name` of a finished run; `out`, a folder that is absent or empty, default `<run folder>/merged`; `dtype` of the
    written weights: `auto` is what the base has on disk, and float32 for the embedded base, whose merged weights are then
    exact and still small; `skip_eval` leaves out the comparison with a 4-bit base; `allow`, fields of the contract that may
    differ from what is found now, which then holds in the merged folder's contract.
    Output: what `merge.json` holds: `{"merged", "run", "base", "stages", "dtype", "verified": {…}, "rounding": {…} | null,
    "nf4": {…} | null, "allow": {…}}`.

    Raises:
        ConfigError: several processes, an `out` that holds something, or an unknown dtype.
        ModelError: the run was fully tuned, its base is quantised on disk or is not the contract's, the disk is too small, or
            the merged weights do not do what base + adapter does.
        DataError: no such run.
    """
    _refuse_processes()
    run = need_run(name)
    stages = stages_of(str((run / "checkpoints" / "best").resolve()))
    last = stages.folders[-1]
    if not is_adapter(last):
        raise ModelError(
            f"{name} was fully tuned: its checkpoint is whole already, and there is nothing to merge",
            f"use it as it is, here and in plain transformers: {last}",
        )
    folder = _free_folder(out or run / "merged")
    settings, contract = load_settings(run / "config.yaml"), Contract.read(last)
    kept = _written_dtype(stages, dtype)

    if not is_done(run):
        say(f"{run} has not come to its end: this is its best checkpoint so far")
    say(f"base: {stages.weights}, loaded in float32 on the CPU; adapters, in order: {_listed(stages.adapters)}")
    tuned = load(str(last), dtype="float32", device="cpu")
    allowed = refuse_other_contract(tuned, contract, allow=allow)
    for line in tell_permitted(allowed):
        say(line)
    contract = adopt(contract, allowed)
    _refuse_full_disk(folder, tuned.model, kept)
    samples, where = _pictures(settings)
    before = look(tuned, samples, contract)

    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        say(f"deleting {part}, which a broken-off merge left")
        shutil.rmtree(part)
    try:
        model = merge_adapter(tuned.model)
        rounding = None
        if kept != "float32":
            verified = _verify(before, look(replace(tuned, model=model), samples, contract), where, say=say)
            model.to(DTYPES[kept])
        _write(part, model, tuned.processor, contract, run)
        origin = replace(tuned, model=None)
        del model, tuned  # one model in memory at a time
        plain = load_plain(part, origin)
        refuse_other_contract(plain, contract)
        after = look(plain, samples, contract)
        if kept == "float32":
            verified = _verify(before, after, where, say=say)
        else:
            rounding = compare_seen(before, after)
            say(f"rounding the weights to {kept}: {_format(rounding)}")
        del plain
        nf4 = None
        if settings.model.quantization == "nf4" and not skip_eval:
            nf4 = _compare_nf4(last, part, settings, contract, run=run, say=say)
        result = {
            "merged": str(folder),
            "run": str(run),
            "base": stages.base,
            "weights": stages.weights,
            "stages": [
                {
                    "folder": str(stage),
                    "method": "lora" if is_adapter(stage) else "full",
                    "contract": asdict(Contract.read(stage)),
                }
                for stage in stages.folders
            ],
            "dtype": kept,
            "verified": verified,
            "rounding": rounding,
            "nf4": nf4,
            "allow": allowed,
        }
        (part / "merge.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"merged: {folder} ({kept})")
    return result


def load_plain(folder: Path, like: Loaded) -> Loaded:
    """Load merged weights as anybody would who has no vlmdet: `AutoModelForImageTextToText` and `AutoProcessor`.

    Output: in float32 on the CPU, with the record of the base that was merged.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return Loaded(model.eval(), processor, like.base, like.base_fingerprint, like.contract)


def look(loaded: Loaded, samples: Sequence[Sample], contract: Contract) -> Seen:
    """Let a model answer on pictures in one batch, and keep the logits from which it chose each token."""
    steps: list[torch.Tensor] = []
    head = loaded.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: steps.append(output[:, -1].float().clone()))
    try:
        engine = hf_engine(
            loaded,
            contract=contract,
            batch_size=len(samples),
            max_new_tokens=int(contract.decoding["max_new_tokens"]),
            plain=True,  # every row stays in the batch to the end
        )
        rows = predict(engine, samples, contract=contract)
    finally:
        hook.remove()
    return Seen(rows, torch.stack(steps, dim=1))


def compare_seen(before: Seen, after: Seen) -> dict[str, Any]:
    """Set what two models said side by side.

    Output: `{"rows": 8, "identical_rows": 8, "boxes": 11, "max_logit_difference": 1.9e-06}`; `boxes` of the first model;
    rows are identical where boxes, labels and status are. Logits are compared up to and with the first token in which the
    answers on a picture differ: from there on the models do not look at the same text.
    """
    keys = ("boxes", "labels", "status")
    same = [all(a[key] == b[key] for key in keys) for a, b in zip(before.rows, after.rows, strict=True)]
    count = min(before.logits.shape[1], after.logits.shape[1])
    one, other = before.logits[:, :count], after.logits[:, :count]
    differs = (one.argmax(-1) != other.argmax(-1)).cumsum(1)
    before_it = torch.cat([torch.zeros_like(differs[:, :1]), differs[:, :-1]], dim=1) == 0
    return {
        "rows": len(same),
        "identical_rows": sum(same),
        "boxes": sum(len(row["boxes"]) for row in before.rows),
        "max_logit_difference": float((one - other).abs().amax(-1)[before_it].max()),
    }


def _verify(before: Seen, after: Seen, where: str, *, say: Say) -> dict[str, Any]:
    """Refuse merged weights that do something else than base + adapter."""
    found = {**compare_seen(before, after), "pictures": where}
    say(f"base + adapter and merged weights, float32, {where}: {_format(found)}")
    # a logit that is no number compares as false, and fails too
    if not found["max_logit_difference"] <= MAX_DIFFERENCE or found["identical_rows"] < found["rows"]:
        raise ModelError(
            f"the merged weights do not do what base + adapter does: {_format(found)}; {MAX_DIFFERENCE:g} is allowed",
            "nothing was written; keep using the run itself, and report what kind of adapter it has",
        )
    return found


def _format(found: dict[str, Any]) -> str:
    return (
        f"largest logit difference {found['max_logit_difference']:.1e}, "
        f"same boxes on {found['identical_rows']} of {found['rows']} pictures ({found['boxes']} boxes)"
    )


def _compare_nf4(
    last: Path, merged: Path, settings: Settings, contract: Contract, *, run: Path, say: Say
) -> dict[str, Any] | None:
    """Score the merged weights against the 4-bit base + adapter that was trained, on the split that is for scores."""
    try:
        dataset = read_data(settings, lambda text: None)
    except DataError as error:
        say(f"not compared with the 4-bit base that was trained on: {error}")
        return None
    model, evaluation = settings.model, settings.evaluation
    split = evaluation.split if evaluation.split in dataset.splits else "val"
    samples = list(dataset.splits[split])
    figures, rows = {}, {}
    for which, folder in (("nf4", last), ("merged", merged)):
        loaded = load(
            str(folder),
            dtype=model.dtype,
            device=model.device,
            attention=model.attention,
            quantization="nf4" if which == "nf4" else "none",
            quantize_vision=model.quantize_vision and which == "nf4",
        )
        place = run / "eval" / split / which
        figures[which] = evaluate(
            loaded,
            samples,
            contract=contract,
            folder=place,
            name=which,
            **asdict(replace(evaluation, split=split)),
        )
        rows[which] = read_predictions(place / "predictions.jsonl")
        del loaded
    result: dict[str, Any] = {"split": split, "n": len(samples)}
    for metric in ("f1_50", "mean_best_iou"):
        change = paired_difference(rows["nf4"], rows["merged"], metric=metric, labels_asked=contract.labels)
        result[metric] = {which: figures[which][metric] for which in figures} | {"difference": change}
        both = " and ".join(f"{which} {format_figure(figures[which][metric])}" for which in figures)
        say(f"{metric} on {split}, 4-bit base + adapter and merged: {both}; difference {format_change(change)}")
    return result


def _write(folder: Path, model: Any, processor: Any, contract: Contract, run: Path) -> None:
    """Write weights, generation settings, processor, contract and the run's settings."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copy(run / "config.yaml", folder)  # `vlmdet eval` finds data and split in it
    contract.write(folder)


def _pictures(settings: Settings) -> tuple[list[Sample], str]:
    """Find pictures to answer on: of the validation split, else of train, else drawn ones; and say which."""
    try:
        dataset = read_data(settings, lambda text: None)
    except DataError:
        samples = [_drawn(seed) for seed in range(ROWS)]
        return samples, f"{ROWS} drawn pictures, since {settings.data.source} cannot be read any more"
    split = "val" if dataset.splits.get("val") else "train"
    samples = list(islice((sample for sample in dataset.splits[split] if _opens(sample)), ROWS))
    return samples, f"{len(samples)} pictures of {split}"


def _opens(sample: Sample) -> bool:
    try:
        return sample.image is not None
    except ImageError:  # training left it out too
        return False


def _drawn(seed: int) -> Sample:
    picture = draw_package(np.random.default_rng(seed)).image
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return Sample(f"drawn-{seed}", file.getvalue, *picture.size, Boxes.empty(), (), source=f"drawn:{seed}")


def _written_dtype(stages: Stages, asked: str) -> str:
    if asked != "auto" and asked not in DTYPES:
        raise ConfigError(f"unknown dtype '{asked}'", did_you_mean(asked, ("auto", *DTYPES)))
    if asked != "auto":
        return asked
    if stages.weights == "tiny":
        return "float32"
    stored = AutoConfig.from_pretrained(stages.weights, trust_remote_code=False).dtype
    return next((name for name, dtype in DTYPES.items() if dtype == stored), "float32")


def _refuse_processes() -> None:
    if world_size() > 1:
        raise ConfigError(
            f"merge was started in {world_size()} processes, which would write over each other",
            "run it as it is, without a launcher",
        )


def _free_folder(folder: Path) -> Path:
    """Return the folder to write, or refuse one that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is there already", "name another folder, or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_full_disk(folder: Path, model: Any, dtype: str) -> None:
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    needed = sum(weight.numel() for weight in model.parameters()) * size + SPARE
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ModelError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, and the merged weights take {needed / 2**30:.1f} GiB",
            "free some, or name a folder on another disk with --out",
        )


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
