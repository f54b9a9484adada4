"""Checks of what was saved: adapter, base, merged model and processor, by their files alone.

When: WHEN WRONG; headers and a few tensors are read, no model is built. `serving.py` takes these checks up.

Long, because adapter, merge, shards and processor are compared by the same few files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.gather.files import Artefact
from vlmdet.doctor.gather.weights import adapter_config, compare_merge, find_weight, old_name, pairs_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


def adapters_of(evidence: Evidence) -> list[Artefact]:
    """Return the saved adapters: directories with an `adapter_config.json`, or whose name says so."""
    held = evidence.artefacts()
    found_all = [
        one
        for name, one in held.items()
        if adapter_config(one) or name.split("[")[0] in ("adapter", "adapters", "lora")
    ]
    if not found_all and evidence.subject.run_dir is not None:
        found_all = [one for one in evidence.run().checkpoints.values() if adapter_config(one)][-1:]
    return found_all


def named(evidence: Evidence, *names: str) -> Artefact | None:
    """Return the first artefact of one of the names that has content."""
    held = evidence.artefacts()
    for name in names:
        for key, one in held.items():
            if key.lower() == name and one.exists:
                return one
    return None


@check("M10", "M11", needs=("artefacts|run_dir",))
def adapter_fits_its_base(evidence: Evidence) -> Outcome:
    """Lay the names and shapes of an adapter on those of its base's files."""
    base = named(evidence, "base", "base_model", "served_base", "loaded_base", "eval_base")
    adapters = [(adapter, pairs) for adapter in adapters_of(evidence) if (pairs := pairs_of(adapter))]
    if base is None or not base.tensors or not adapters:
        raise NotAvailable("a saved adapter and the weights of its base")
    for adapter, pairs in adapters:
        yield from _names_and_shapes(adapter, base, pairs)
    told = "; ".join(f"{adapter.name}: {len(pairs)} modules" for adapter, pairs in adapters)
    for identifier in ("M10", "M11"):
        yield looked(identifier, told)


def _names_and_shapes(adapter: Artefact, base: Artefact, pairs: list[Any]) -> Outcome:
    absent = [pair.module for pair in pairs if find_weight(pair.module, base.tensors) is None]
    qwen = "qwen" in str((base.configs.get("config.json") or {}).get("model_type", ""))
    renamed = [pair.module for pair in pairs if qwen and old_name(pair.module)]
    other = []
    for pair in pairs:
        weight = find_weight(pair.module, base.tensors)
        shape = (pair.up.shape[0], pair.down.shape[-1])
        if weight is not None and len(weight.shape) == 2 and len(pair.down.shape) == 2 and tuple(weight.shape) != shape:
            other.append(f"{pair.module}: adapter {shape}, base {tuple(weight.shape)}")
    if other:
        yield found(
            "M11", where=str(adapter.path), evidence=f"{len(other)} of {len(pairs)} shapes differ; {other[0]}",
            cause="the adapter was trained on a base of another size",
        )  # fmt: skip
    elif absent or renamed:
        names = absent or renamed
        sample = next(iter(base.tensors), "")
        yield found(
            "M10", where=str(adapter.path), evidence=f"{len(names)} of {len(pairs)} modules are not in the base under that name: "
            f"{names[0]}; the base has {sample}",
            cause="modules were renamed between the releases that saved and that load: the adapter's keys are ignored",
        )  # fmt: skip


@check("S01", "S02", needs=("artefacts",))
def merged_is_base_plus_adapter(evidence: Evidence) -> Outcome:
    """Compare merged weights with base plus adapter, over a few modules, and say how they differ."""
    merged = named(evidence, "merged", "merged_model", "export", "exported")
    base = named(evidence, "base", "base_model")
    adapters = adapters_of(evidence)
    if merged is None or base is None or not adapters:
        raise NotAvailable("artefacts: base, adapter and merged")
    result = compare_merge(base, merged, adapters)
    told = (
        f"over {result.modules} modules |merged - base| is {result.moved:.3f} and |merged - base - delta| {result.residue:.3f} "
        f"of |delta|; other weights differ by at most {result.others:.1e}"
    )
    where = str(merged.path)
    low_bits = any(
        isinstance(one.configs.get("config.json"), dict) and one.configs["config.json"].get("quantization_config")
        for one in (merged, base)
    )
    quantised = low_bits or bool(evidence.options.get("load_in_4bit") or evidence.options.get("load_in_8bit"))
    alone = [_of_one(base, merged, one) for one in adapters] if len(adapters) > 1 else []
    # the sum of half-precision weights is rounded to their own precision, which is how such a model is always merged
    usual = 0.5 if result.dtypes in (("BF16", "BF16"), ("F16", "F16")) and not quantised else 0.02
    if result.residue < usual and result.others < 1e-3:
        for identifier in ("S01", "S02"):
            yield looked(identifier, told)
        if quantised and evidence.options.get("load_in_4bit"):
            yield skipped("S02", "the score of the 4-bit base with its adapter beside that of the merged model")
        return
    if any(value is not None and value < 0.05 for value in alone):
        which = [
            adapter.name for adapter, value in zip(adapters, alone, strict=True) if value is not None and value < 0.05
        ]
        yield found(
            "S01", where=where, evidence=told, cause=f"only {', '.join(which)} of {len(adapters)} adapters was merged"
        )
    elif result.moved < 0.02:
        yield found(
            "S02" if quantised else "S01", where=where, evidence=told,
            cause="the merged weights are the base's: nothing was merged",
        )  # fmt: skip
        yield found(
            "S01" if quantised else "S02", where=where, evidence=told, certainty=0.6,
            cause="the adapter was merged into a copy that was thrown away, or its change was rounded away",
        )  # fmt: skip
    elif result.others > 0.05:
        yield found(
            "S01",
            where=where,
            evidence=told,
            cause="the adapter was merged into another base: weights that it does not touch differ too",
        )
    elif result.low_rank:
        cause = "what differs is of low rank: another adapter is missing from the merged weights, or is in them twice"
        yield found("S01", where=where, evidence=told, cause=cause)
    elif result.residue < 0.9 or quantised:
        yield found(
            "S02",
            where=where,
            evidence=told,
            cause="the sum was rounded: merged at a lower precision than that of the training",
        )
    else:
        yield found("S01", where=where, evidence=told, cause="the merged weights are not this base plus this adapter")


def _of_one(base: Artefact, merged: Artefact, adapter: Artefact) -> float | None:
    try:
        return compare_merge(base, merged, [adapter]).residue
    except NotAvailable:
        return None


@check("S03", needs=("artefacts|run_dir",))
def shards_whole(evidence: Evidence) -> Outcome:
    """Compare shards with their index: every tensor there, in its file, of its size."""
    looked_at = 0
    for one in evidence.artefacts().values():
        index = next((config for name, config in one.configs.items() if name.endswith(".safetensors.index.json")), None)
        wrong = [f"{name}: {reason}" for name, reason in one.broken.items() if name.endswith(".safetensors")]
        if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            files = set(one.files)
            wrong += [
                f"{name} is named in the index and not there"
                for name in sorted(set(index["weight_map"].values()) - files)
            ]
            lost = [name for name, file in index["weight_map"].items() if file in files and name not in one.tensors]
            moved = [
                name
                for name, file in index["weight_map"].items()
                if name in one.tensors and one.tensors[name].file.name != file
            ]
            if lost and not wrong:
                wrong.append(f"{len(lost)} tensors of the index are in no shard, {lost[0]} first")
            if moved:
                wrong.append(f"{len(moved)} tensors lie in another shard than the index says, {moved[0]} first")
            total = (index.get("metadata") or {}).get("total_size")
            size = sum(tensor.end - tensor.start for tensor in one.tensors.values())
            if isinstance(total, int) and abs(total - size) > 0.001 * total and not wrong:
                wrong.append(f"the shards hold {size:,} bytes of weights, the index says {total:,}")
        if not wrong and (empty := _empty_tensors(one)):
            wrong.append(empty)
        looked_at += bool(one.tensors or index)
        if wrong:
            yield found(
                "S03", where=str(one.path), evidence="\n".join(wrong[:4]),
                cause="saving was broken off, or every process wrote the same files at once",
            )  # fmt: skip
    if not looked_at:
        raise NotAvailable("saved weights (*.safetensors)")
    yield looked("S03", f"{looked_at} sets of weights")


def _empty_tensors(one: Artefact) -> str:
    """Tell of matrices of which nothing is left: shape 0, as a partitioned save leaves them."""
    empty = [name for name, tensor in one.tensors.items() if not math.prod(tensor.shape)]
    return f"{len(empty)} tensors are empty, {empty[0]} first" if empty else ""


@check("T06", "S04", "V12", needs=("artefacts|run_dir",))
def processor_saved(evidence: Evidence) -> Outcome:
    """Compare the saved processors with that of the training: picture limits, template, special tokens."""
    held = {name: one for name, one in evidence.artefacts().items() if one.exists}
    trained = _trained_limits(evidence, held)
    template = _trained_template(evidence, held)
    seen = 0
    for name, one in held.items():
        if name in ("train_processor", "training_processor", "base", "base_model"):
            continue
        served = any(word in name for word in ("merged", "server", "serve", "export", "deploy"))
        identifier = "S04" if served else "T06"
        low, high = one.pixels()
        low, high = _override(one, low, high)
        has_processor = bool(one.image_limits()) or high is not None
        if has_processor:
            seen += 1
        differ = [
            f"{label}: training {want:,.0f}, {name} {got:,.0f}"
            if got is not None
            else f"{label}: training {want:,.0f}, {name} has none"
            for label, want, got in (("min_pixels", trained[0], low), ("max_pixels", trained[1], high))
            if want is not None and want != got and (has_processor or name in ("processor",))
        ]
        if differ:
            yield found(
                identifier, where=str(one.path), evidence="\n".join(differ),
                cause="the processor beside these weights shows the model pictures of another size than training did",
            )  # fmt: skip
            if evidence.options.key("max_pixels", phase="train") or _by_environment(evidence):
                yield found(
                    "V12", where=str(one.path), evidence="\n".join(differ), certainty=0.6, consequence_of=identifier,
                    cause="the limits of training were set outside of the processor, and so were not saved",
                )  # fmt: skip
        elif has_processor:
            yield looked(identifier, f"{name}: min_pixels {low}, max_pixels {high}, as in training")
        added, lost = _token_changes(held, one)
        if added or lost:
            yield found(
                identifier, where=str(one.path), evidence=f"only in training: {lost[:6]}; only beside the weights: {added[:6]}",
                cause="the tokenizer beside the weights has other tokens than that of the training",
            )  # fmt: skip
        if template and one.template and _squeeze(one.template) != _squeeze(template):
            yield found(
                "T06" if not served else "S05", where=str(one.path), evidence=_first_difference(template, one.template),
                cause="another chat template lies beside the weights than training used",
            )  # fmt: skip
        if served and one.tensors and not has_processor and _saved_elsewhere(held, name):
            yield found(
                "S04", where=str(one.path), evidence=f"{name} holds {', '.join(sorted(one.files)[:8])}: no processor",
                cause="whoever loads these weights takes the base's processor, with its limits",
            )  # fmt: skip
    if not seen:
        raise NotAvailable("saved processors (preprocessor_config.json or processor_config.json)")
    yield looked("T06", f"{seen} saved processors")


def _token_changes(held: dict[str, Artefact], one: Artefact) -> tuple[list[str], list[str]]:
    """Return control tokens that only a saved tokenizer has, and those that only the training's has."""
    trained = next((held[name] for name in ("train_processor", "training_processor") if name in held), None)
    if trained is None or trained is one:
        return [], []
    before, after = end_of(trained)[2], end_of(one)[2]
    if not before or not after:
        return [], []
    return sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())


def _saved_elsewhere(held: dict[str, Artefact], name: str) -> bool:
    """Tell whether the training saved a processor, only not beside these weights."""
    return any(one.image_limits() for other, one in held.items() if other not in (name, "base", "base_model"))


def _override(one: Artefact, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """Take `mm_processor_kwargs` of a server's configuration for its limits."""
    for config in one.configs.values():
        if isinstance(config, dict):
            own = config.get("mm_processor_kwargs") or config.get("mm-processor-kwargs")
            if isinstance(own, dict):
                size = own.get("size") if isinstance(own.get("size"), dict) else {}
                low = own.get("min_pixels", (size or {}).get("shortest_edge", low))
                high = own.get("max_pixels", (size or {}).get("longest_edge", high))
            elif "max_pixels" in config:
                low, high = config.get("min_pixels", low), config["max_pixels"]
    return low, high


def _trained_limits(evidence: Evidence, held: dict[str, Artefact]) -> tuple[float | None, float | None]:
    """Return the limits of training: of a saved training processor, of the settings, else of the processor itself."""
    for name in ("train_processor", "training_processor"):
        if name in held:
            return held[name].pixels()
    options = evidence.options
    low = options.number("min_pixels", phase="train") or options.number("min_pixels")
    high = options.number("max_pixels", phase="train") or options.number("max_pixels")
    if low is None and high is None and evidence.subject.processor is not None:
        from vlmdet.doctor.evidence import processor_limits

        return processor_limits(evidence.subject.processor)
    return low, high


def _trained_template(evidence: Evidence, held: dict[str, Artefact]) -> str | None:
    for name in ("train_processor", "training_processor"):
        if name in held and held[name].template:
            return held[name].template
    processor = evidence.subject.processor
    own = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    )
    return own if isinstance(own, str) else None


def _by_environment(evidence: Evidence) -> bool:
    import os

    return bool(os.environ.get("MAX_PIXELS") or evidence.options.get("env"))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _first_difference(one: str, other: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(place - 40, 0)
    return f"training: …{one[start : place + 60]!r}\nsaved:    …{other[start : place + 60]!r}"


def end_of(artefact: Artefact) -> tuple[set[int], str, dict[str, int]]:
    """Return the end ids that an artefact's generation or model configuration names, from which file, and its control tokens."""
    ids: set[int] = set()
    source = ""
    for name in ("generation_config.json", "config.json"):
        config = artefact.configs.get(name)
        if isinstance(config, dict):
            value = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
            if value is not None and not ids:
                ids, source = set(value if isinstance(value, list) else [value]), name
    tokenizer = artefact.configs.get("tokenizer_config.json")
    tokens: dict[str, int] = {}
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("added_tokens_decoder"), dict):
        for key, value in tokenizer["added_tokens_decoder"].items():
            if isinstance(value, dict) and str(key).isdigit():
                tokens[str(value.get("content"))] = int(key)
    added = artefact.configs.get("added_tokens.json")
    if isinstance(added, dict):
        tokens |= {str(key): int(value) for key, value in added.items() if isinstance(value, int)}
    file = artefact.path / "tokenizer.json"
    if not tokens and artefact.path != Path() and file.is_file() and file.stat().st_size < 30_000_000:
        import json

        for one in json.loads(file.read_text(encoding="utf-8")).get("added_tokens", []):
            tokens[str(one.get("content"))] = int(one.get("id"))
    return ids, source, tokens


CHECKS: tuple[Check, ...] = (adapter_fits_its_base, merged_is_base_plus_adapter, shards_whole, processor_saved)
