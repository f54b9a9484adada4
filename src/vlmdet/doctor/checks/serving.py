"""Checks of the stage serving: merged weights, saved processors, and what a server is told.

When: WHEN WRONG, from saved files and settings; nothing is served. Weights and processors are compared in `saved.py`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, saved
from vlmdet.doctor.gather.weights import VISUAL, pairs_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

_SERVER = ("server_config", "server", "serve", "serving", "vllm", "vllm_config", "deployment", "server_args")


def _server_fields(evidence: Evidence) -> dict[str, Any]:
    """Return what the server is started with: of the settings for serving, and of a saved configuration of the server."""
    fields: dict[str, Any] = {}
    for key, value in evidence.options.flat.items():
        for prefix in ("serve_", "serving_", "server_", "vllm_", "deploy_"):
            if key.startswith(prefix):
                fields[key.removeprefix(prefix)] = value
    if evidence.subject.artefacts is not None:
        held = evidence.artefacts()
        for name in _SERVER:
            if name in held:
                for config in held[name].configs.values():
                    if isinstance(config, Mapping):
                        fields |= {str(key).replace("-", "_"): value for key, value in config.items()}
    return fields


@check("S05", needs=("settings|artefacts",))
def server_asked_as_in_training(evidence: Evidence) -> Outcome:
    """Compare the system message, the question and the endpoint of a server with those of training."""
    options, fields = evidence.options, _server_fields(evidence)
    differ: list[str] = []
    same: list[str] = []
    for name, aliases in (
        ("system_prompt", ("system_prompt", "system", "system_message")),
        ("user_prompt", ("user_prompt", "prompt")),
    ):
        served = next((fields[key] for key in aliases if key in fields), None)
        if served is None:
            served = options.get(name, phase="serve")
        trained = options.get(name, phase="train")
        trained = options.get(name) if trained is None else trained
        if trained is None:
            trained = _of_examples(evidence, name)
        if served is None or trained is None:
            continue
        line = f"{name}: training {trained!r}, server {served!r}"
        (same if str(served).strip() == str(trained).strip() else differ).append(line)
    request = _request(evidence, fields)
    if request is not None:
        differ += _request_differs(evidence, request)
        same.append("the request's messages")
    endpoint = str(fields.get("endpoint") or fields.get("path") or fields.get("url") or "")
    if re.search(r"/completions/?$", endpoint) and "chat" not in endpoint:
        differ.append(f"endpoint {endpoint}: text goes to the model without the chat template")
    elif fields.get("use_chat_template") is False or fields.get("apply_chat_template") is False:
        differ.append("the server applies no chat template")
    if differ:
        yield found(
            "S05", where="server", evidence="\n".join(differ),
            cause="the server sends the model another prompt than it was trained on",
        )  # fmt: skip
    elif same:
        yield looked("S05", "; ".join(same))
    else:
        raise NotAvailable(
            "the server's prompt or a captured request (settings serve_system_prompt, serve_user_prompt, artefacts)"
        )


def _of_examples(evidence: Evidence, name: str) -> str | None:
    """Return the system message or the question that all converted rows share, None where there is none such."""
    try:
        examples = evidence.examples()
    except (NotAvailable, UserCodeError):  # what the user's converter raises is told by other checks
        return None
    values = {one.system if name == "system_prompt" else one.prompt for one in examples[:50]}
    value = values.pop() if len(values) == 1 else None
    return value if value is not None or name != "system_prompt" else ""


def _request(evidence: Evidence, fields: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the messages of a captured request, wherever it lies."""
    if isinstance(fields.get("messages"), list):
        return fields["messages"]
    request = fields.get("request")
    if isinstance(request, Mapping) and isinstance(request.get("messages"), list):
        return request["messages"]
    if evidence.subject.artefacts is None:
        return None
    for name, one in evidence.artefacts().items():
        for config in one.configs.values():
            if "request" in name and isinstance(config, Mapping):
                held = config.get("body", config.get("json", config))
                if isinstance(held, Mapping) and isinstance(held.get("messages"), list):
                    return held["messages"]
    return None


def _request_differs(evidence: Evidence, messages: Sequence[Mapping[str, Any]]) -> list[str]:
    from vlmdet.doctor.gather.conversations import text_of

    by_role = {str(one.get("role")): text_of(one) for one in messages}
    differ = []
    for role, name in (("system", "system_prompt"), ("user", "user_prompt")):
        trained = evidence.options.get(name)
        trained = _of_examples(evidence, name) if trained is None else trained
        if trained is not None and by_role.get(role, "").strip() != str(trained).strip():
            differ.append(f"{role}: training {trained!r}, request {by_role.get(role)!r}")
    return differ


@check("S06", needs=("artefacts|run_dir",))
def vision_adapter_served(evidence: Evidence) -> Outcome:
    """Look whether an adapter of the vision tower is given to a server as an adapter."""
    adapters = saved.adapters_of(evidence)
    fields = _server_fields(evidence)
    if not adapters:
        raise NotAvailable("a saved adapter")
    lora = fields.get("enable_lora") or fields.get("lora_modules") or fields.get("lora_path") or fields.get("adapter")
    lora = lora or fields.get("adapters") or fields.get("enable_adapter")
    for adapter in adapters:
        visual = [pair.module for pair in pairs_of(adapter) if any(part in f"{pair.module}." for part in VISUAL)]
        if visual and lora and not saved.named(evidence, "merged"):
            yield found(
                "S06", where=str(adapter.path),
                evidence=f"{len(visual)} of {len(pairs_of(adapter))} adapted modules are of the vision tower ({visual[0]}); "
                f"the server is given the adapter: {lora!r}",
                cause="servers apply adapters to the language model alone, and leave the others out without a word",
            )  # fmt: skip
        elif fields:
            yield looked(
                "S06", f"{len(visual)} modules of the vision tower are adapted; the server loads adapters: {bool(lora)}"
            )
        else:
            raise NotAvailable("what the server is started with (settings serve_…, artefacts server_config)")


@check("S07", needs=("artefacts|run_dir",))
def server_knows_the_end(evidence: Evidence) -> Outcome:
    """Look whether what is served names the token at which answers end."""
    fields = _server_fields(evidence)
    names = [name for name in evidence.artefacts() if name not in ("base", "base_model", *_SERVER)]
    seen = 0
    for name in names:
        one = evidence.artefacts()[name]
        ids, source, tokens = saved.end_of(one)
        if not one.exists or ("generation_config.json" not in one.configs and "config.json" not in one.configs):
            continue
        wanted = tokens.get("<|im_end|>", tokens.get("<end_of_turn>"))
        if wanted is None and evidence.subject.processor is not None:
            control = evidence.control()
            wanted = control.get("<|im_end|>", control.get("<end_of_turn>"))
        if wanted is None:
            continue
        seen += 1
        stops = fields.get("stop_token_ids") or fields.get("stop") or []
        stops = stops if isinstance(stops, (list, tuple)) else [stops]
        if wanted not in ids and wanted not in stops and "<|im_end|>" not in stops:
            lost = "generation_config.json" not in one.configs
            yield found(
                "S07", where=str(one.path),
                evidence=f"answers end at id {wanted}; {source or 'no file'} names {sorted(ids) or 'none'}"
                + ("; there is no generation_config.json" if lost else ""),
                cause="the server goes on after the end of the answer, since nothing tells it where that is",
            )  # fmt: skip
        else:
            yield looked("S07", f"{name}: ends at {sorted(ids)}, {source}")
    if not seen:
        raise NotAvailable("a saved model with its generation_config.json and tokenizer")


@check("S08", needs=("artefacts|settings",))
def quantised_on_the_template(evidence: Evidence) -> Outcome:
    """Look at what a GPTQ or AWQ quantisation left out, and at the text that it was calibrated on."""
    configs = []
    if evidence.subject.artefacts is not None:
        for one in evidence.artefacts().values():
            for name, config in one.configs.items():
                if isinstance(config, Mapping):
                    inner = config.get("quantization_config") if "quantization_config" in config else None
                    if isinstance(inner, Mapping):
                        configs.append((f"{one.path}/{name}", inner))
                    elif (
                        "quant" in name
                        or "recipe" in name
                        or "calib" in name
                        or any("calib" in str(key) for key in config)
                    ):
                        configs.append((f"{one.path}/{name}", config))
    own = {
        key: value
        for key, value in evidence.options.flat.items()
        if "calib" in key or "quantization" in key or "ignore" in key
    }
    if own:
        configs.append(("settings", own))
    methods = [(where, one) for where, one in configs if _is_low_bit(one)]
    if not methods:
        raise NotAvailable("a GPTQ or AWQ quantisation (quantization_config)")
    for where, config in methods:
        kept = [
            str(item)
            for key in (
                "ignore",
                "modules_to_not_convert",
                "ignored_layers",
                "modules_not_to_convert",
                "exclude_modules",
            )
            for item in _as_list(config.get(key))
        ]
        text = next((value for key, value in config.items() if "calib" in str(key) and _texts(value)), None)
        samples = _texts(text)
        if not any("visual" in item or "vision" in item for item in kept):
            yield found(
                "S08", where=where, evidence=f"left out: {kept or 'nothing'}", certainty=0.9,
                cause="the vision tower is quantised too",
            )  # fmt: skip
        elif samples and not any("<|im_start|>" in sample or "<start_of_turn>" in sample for sample in samples):
            yield found(
                "S08", where=where, evidence=f"calibrated on {samples[0][:120]!r}",
                cause="calibration saw no chat template, so ranges are of other text than that of use",
            )  # fmt: skip
        else:
            yield looked("S08", f"{where}: left out {', '.join(kept[:3])}")


def _is_low_bit(config: Mapping[str, Any]) -> bool:
    method = str(config.get("quant_method") or config.get("method") or config.get("quantization") or "").lower()
    return method in ("gptq", "awq", "compressed-tensors", "autoawq", "marlin") or any(
        "calib" in str(key) for key in config
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if " " in value or "<" in value else []
    if isinstance(value, (list, tuple)):
        return [str(one.get("text", "")) if isinstance(one, Mapping) else str(one) for one in value if one]
    return []


@check("S09", needs=("run_dir|artefacts",))
def throughput_of_work_done(evidence: Evidence) -> Outcome:
    """Look whether a load test counts failed requests, or the same picture again and again."""
    requests = _requests(evidence)
    pictures = [
        str(one[key])
        for one in requests
        for key in ("image", "image_path", "image_id", "image_sha1", "file")
        if key in one
    ]
    failed = [
        one
        for one in requests
        if one.get("error") or one.get("ok") is False or str(one.get("status", "200")) not in _FINE
    ]
    told = f"{len(requests)} requests, {len(set(pictures))} different pictures, {len(failed)} failed"
    spent = sum(float(next((one[key] for key in _LATENCIES if key in one), 0) or 0) for one in requests)
    if len(pictures) >= 10 and len(set(pictures)) < 0.2 * len(pictures):
        yield found(
            "S09",
            where="load test",
            evidence=told,
            cause="the same picture is sent again and again, and the server keeps what it made of it",
        )
    elif len(failed) > 0.05 * len(requests):
        yield found("S09", where="load test", evidence=told, cause="requests that failed at once are counted as done")
    else:
        yield looked("S09", f"{told}, {spent:.1f} s in all")


_LATENCIES = ("latency", "latency_s", "latency_ms", "seconds", "duration", "elapsed", "ttft", "e2e_latency")
_FINE = {"200", "ok", "success", "done", "none", "True", "completed"}


def _requests(evidence: Evidence) -> Sequence[Mapping[str, Any]]:
    if evidence.subject.run_dir is not None:
        from vlmdet.doctor.gather.files import read_lines

        for file in sorted(evidence.run().path.rglob("*.jsonl")):
            rows = read_lines(file, 5000)
            if len(rows) >= 10 and any(key in rows[0] for key in _LATENCIES) and "status" in rows[0]:
                return rows
    if evidence.subject.artefacts is not None:
        for one in evidence.artefacts().values():
            for config in one.configs.values():
                held = config.get("requests", config.get("results")) if isinstance(config, Mapping) else config
                if (
                    isinstance(held, list)
                    and held
                    and isinstance(held[0], Mapping)
                    and any("latency" in key for key in held[0])
                ):
                    return held
    raise NotAvailable("the requests of a load test with their latencies")


@check("S10", needs=())
def server_in_its_own_environment(evidence: Evidence) -> Outcome:
    """Compare the versions that an installed server asks for with those that are there."""
    versions = evidence.versions()
    told = evidence.options.get("versions", phase="serve") or evidence.options.get("versions_after")
    before = evidence.options.get("versions", phase="train") or evidence.options.get("versions_before") or versions
    if isinstance(told, Mapping) and isinstance(before, Mapping):
        changed = [
            f"{key} {before[key]} -> {told[key]}"
            for key in told
            if key in before and str(before[key]) != str(told[key])
        ]
        if changed:
            yield found(
                "S10",
                where="environment",
                evidence=", ".join(changed),
                cause="installing the server changed what training runs on",
            )
        else:
            yield looked("S10", f"{len(told)} libraries are as before")
        return
    wrong = []
    for name in ("vllm", "sglang", "lmdeploy"):
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in needs:
            match = re.match(r"(torch|transformers|torchvision)\s*==\s*([\w.]+)", need)
            if match and match[1] in versions and not versions[match[1]].startswith(match[2]):
                wrong.append(f"{name} needs {match[1]} {match[2]}, there is {versions[match[1]]}")
    if wrong:
        yield found(
            "S10",
            where="environment",
            evidence="; ".join(wrong),
            cause="the server's libraries and those of training share an environment",
        )
    else:
        yield looked(
            "S10",
            ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "vllm") if name in versions),
        )


CHECKS: tuple[Check, ...] = (
    *saved.CHECKS,
    server_asked_as_in_training,
    vision_adapter_served,
    server_knows_the_end,
    quantised_on_the_template,
    throughput_of_work_done,
    server_in_its_own_environment,
)
