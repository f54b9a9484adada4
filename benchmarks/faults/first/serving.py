"""Faults of merged weights, saved processors and servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults.bases import folder_of, model_of, processor_of
from benchmarks.faults.first.model import write_adapter
from benchmarks.faults.homes import cookbook
from benchmarks.faults.registry import fault, subject


@fault("S01", stage="serving")
def merged_into_another_checkpoint_of_the_family(folder: Path) -> Any:
    import torch
    from peft import PeftModel

    adapter = write_adapter(folder / "adapter")
    other = model_of("qwen2_vl")
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(correction=0) * 0.5)
    merged = PeftModel.from_pretrained(other, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    processor_of("qwen2_vl").save_pretrained(folder / "merged")
    artefacts = {"adapter": str(adapter), "base": str(folder_of("qwen2_vl")), "merged": str(folder / "merged")}
    return subject({}, artefacts=artefacts)


@fault("S03", stage="serving")
def a_shard_is_shorter_than_its_index_says(folder: Path) -> Any:
    model_of("qwen2_vl").save_pretrained(folder / "merged", max_shard_size="400KB")
    shards = sorted((folder / "merged").glob("model-*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: len(data) * 2 // 3])
    processor_of("qwen2_vl").save_pretrained(folder / "merged")
    return subject({}, artefacts={"merged": str(folder / "merged")})


@fault("S04", stage="serving", also=("T06", "V12"))
def the_bases_processor_beside_the_merged_weights(folder: Path) -> Any:
    processor_of("qwen2_vl", min_pixels=3136, max_pixels=200_704).save_pretrained(folder / "train_processor")
    processor_of("qwen2_vl", min_pixels=3136, max_pixels=12_845_056).save_pretrained(folder / "merged")
    model_of("qwen2_vl").save_pretrained(folder / "merged")
    artefacts = {"train_processor": str(folder / "train_processor"), "merged": str(folder / "merged")}
    return subject({}, artefacts=artefacts)


@fault("S05", stage="serving", also=("C02",))
def the_server_has_its_own_system_text() -> Any:
    fields = cookbook.fields()
    server = {"serve_system_prompt": "You are a careful and honest assistant made by a company."}
    prompts = {
        "system_prompt": cookbook.SYSTEM,
        "user_prompt": cookbook.QUESTION,
        "serve_user_prompt": cookbook.QUESTION,
    }
    return subject(fields, settings=fields["settings"] | prompts | server)


@fault("S06", stage="serving")
def a_vision_adapter_for_a_server_that_ignores_it(folder: Path) -> Any:
    write_adapter(folder / "adapter", target_modules=["q_proj", "v_proj", "qkv"])
    config = {"engine": "vllm", "enable_lora": True, "lora_modules": {"boxes": str(folder / "adapter")}, "port": 8000}
    (folder / "server.json").write_text(json.dumps(config))
    artefacts = {"adapter": str(folder / "adapter"), "server_config": str(folder / "server.json")}
    return subject({}, artefacts=artefacts, settings={"engine": "vllm", "enable_lora": True})


@fault("S07", stage="serving")
def the_merged_folder_lost_its_stop_tokens(folder: Path) -> Any:
    model = model_of("qwen2_vl")
    processor = processor_of("qwen2_vl")
    model.generation_config.eos_token_id = processor.tokenizer.pad_token_id
    model.config.text_config.eos_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "merged")
    return subject({}, processor=processor, artefacts={"merged": str(folder / "merged")})


@fault("T06", stage="serving", also=("S04",))
def another_chat_template_was_saved_with_the_adapter(folder: Path) -> Any:
    trained = processor_of("qwen2_vl")
    trained.save_pretrained(folder / "train_processor")
    lost = processor_of("qwen2_vl")
    lost.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    write_adapter(folder / "adapter")
    lost.save_pretrained(folder / "adapter")
    artefacts = {"adapter": str(folder / "adapter"), "train_processor": str(folder / "train_processor")}
    return subject({}, processor=trained, artefacts=artefacts)
