"""Let a user's code load its model without weights, and keep it from everything that lasts.

When: around `build_trainer`, in a process of its own. What is patched is put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.live.tiny import SMALL_ENOUGH, class_of, config_for, random_model, small_config


@dataclass
class Loads:
    """What the user's code loaded and asked for while it was watched.

    Attributes:
        models: (name, class name, keyword arguments) of each `from_pretrained` of a model.
        made: the models that were returned, in order.
        arguments: the training arguments as the user wrote them, before they were made harmless.
        adapters: names of adapters that were loaded from files.
        wrapped: the PeftModels that were made.
        given: of each trainer of TRL, whether its model carried an adapter already, and whether a `peft_config` came with it.
    """

    models: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    wrapped: list[Any] = field(default_factory=list)
    given: list[tuple[bool, bool]] = field(default_factory=list)


@contextlib.contextmanager
def patched(evidence: Evidence) -> Iterator[Loads]:
    """Patch `from_pretrained` and TrainingArguments for the time of the block; see the module."""
    loads = Loads()
    processor = evidence.subject.processor
    kept: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, value: Any) -> None:
        kept.append((holder, name, holder.__dict__.get(name, _ABSENT)))
        setattr(holder, name, value)

    original_model = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def load_model(cls: Any, name: Any = None, *args: Any, **keywords: Any) -> Any:
        name = name if name is not None else keywords.pop("pretrained_model_name_or_path", None)
        loads.models.append((str(name), cls.__name__, dict(keywords)))
        if _small_local(name):
            model = original_model(
                cls,
                name,
                *args,
                **{k: v for k, v in keywords.items() if k not in ("device_map", "quantization_config")},
            )
        else:
            config = config_for(name, evidence)
            known = getattr(cls, "config_class", None)
            if known is not None and not isinstance(config, known) and "Auto" not in cls.__name__:
                config = known()
            model = random_model(cls if known is not None else class_of(config), small_config(config, processor))
        dtype = _dtype(keywords.get("dtype", keywords.get("torch_dtype")))
        if dtype is not None:
            model = model.to(dtype)
        quantised = keywords.get("quantization_config")
        for bits in ("load_in_4bit", "load_in_8bit"):
            if keywords.get(bits) or getattr(quantised, bits, False):
                setattr(model, f"is_loaded_in_{bits[8:]}", True)
        model.eval()
        loads.made.append(model)
        return model

    def load_auto(cls: Any, name: Any = None, *args: Any, **keywords: Any) -> Any:
        name = name if name is not None else keywords.pop("pretrained_model_name_or_path", None)
        config = config_for(name, evidence)
        return class_of(config).from_pretrained(name, *args, **keywords)

    def load_config(original: Any) -> Any:
        def load(cls: Any, name: Any = None, *args: Any, **keywords: Any) -> Any:
            if isinstance(name, (str, Path)) and Path(name).exists():
                return original(cls, name, *args, **keywords)
            config = small_config(config_for(name, evidence), processor)
            config.architectures = [class_of(config).__name__]
            return config

        return load

    def load_processor(original: Any) -> Any:
        def load(cls: Any, name: Any = None, *args: Any, **keywords: Any) -> Any:
            if processor is None or (isinstance(name, (str, Path)) and Path(name).is_dir()):
                return original(cls, name, *args, **keywords)
            part = getattr(processor, "tokenizer", processor) if "Tokenizer" in cls.__name__ else processor
            part = getattr(processor, "image_processor", processor) if "ImageProcessor" in cls.__name__ else part
            return copy.deepcopy(part)

        return load

    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    with tempfile.TemporaryDirectory(prefix="vlmdet-doctor-") as folder:
        put(PreTrainedModel, "from_pretrained", classmethod(load_model))
        put(_BaseAutoModelClass, "from_pretrained", classmethod(load_auto))
        for kind in _AUTO:
            if hasattr(transformers, kind):
                put(getattr(transformers, kind), "from_pretrained", classmethod(load_auto))  # each has its own
        for holder in (transformers.AutoConfig, transformers.PretrainedConfig):
            put(holder, "from_pretrained", classmethod(load_config(holder.from_pretrained.__func__)))
        for holder in (transformers.AutoProcessor, transformers.AutoTokenizer, transformers.AutoImageProcessor,
                       transformers.ProcessorMixin, transformers.PreTrainedTokenizerBase):  # fmt: skip
            put(holder, "from_pretrained", classmethod(load_processor(holder.from_pretrained.__func__)))
        _watch_adapters(loads, put)
        before = transformers.TrainingArguments.__post_init__

        def harmless(self: Any, *args: Any, **keywords: Any) -> Any:
            loads.arguments.append(dict(vars(self)))
            make_harmless(self, folder)
            return before(self, *args, **keywords)

        put(transformers.TrainingArguments, "__post_init__", harmless)
        environment = {name: os.environ.get(name) for name in ("WANDB_DISABLED", "WANDB_MODE", "HF_HUB_OFFLINE")}
        os.environ.update({"WANDB_DISABLED": "true", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"})
        here = Path.cwd()
        try:
            yield loads
        finally:
            os.chdir(here)
            for name, value in environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for holder, name, value in reversed(kept):
                if value is _ABSENT:
                    delattr(holder, name)
                else:
                    setattr(holder, name, value)


_ABSENT = object()
_AUTO = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM",
         "AutoModelForMultimodalLM", "AutoModelForPreTraining")  # fmt: skip


def _watch_adapters(loads: Loads, put: Callable[[Any, str, Any], None]) -> None:
    """Note which adapters are loaded from files, and with what TRL's trainer is made."""
    from peft import PeftModel

    original = PeftModel.from_pretrained.__func__

    def load_adapter(cls: Any, model: Any, model_id: Any, *args: Any, **keywords: Any) -> Any:
        loads.adapters.append(str(model_id))
        return original(cls, model, model_id, *args, **keywords)

    wrap = PeftModel.__init__

    @functools.wraps(wrap)
    def wrap_model(self: Any, *args: Any, **keywords: Any) -> None:
        wrap(self, *args, **keywords)
        loads.wrapped.append(self)

    put(PeftModel, "from_pretrained", classmethod(load_adapter))
    put(PeftModel, "__init__", wrap_model)
    if "trl" not in sys.modules:
        return
    from trl import SFTTrainer

    make = SFTTrainer.__init__

    @functools.wraps(make)
    def init(self: Any, model: Any = None, *args: Any, **keywords: Any) -> None:
        loads.given.append((isinstance(model, PeftModel), keywords.get("peft_config") is not None))
        make(self, model, *args, **keywords)

    put(SFTTrainer, "__init__", init)


def make_harmless(arguments: Any, folder: str) -> None:
    """Change training arguments so that they run here and leave nothing: CPU, float32, no trackers, no hub."""
    changes = {"output_dir": folder, "report_to": "none", "push_to_hub": False, "use_cpu": True, "bf16": False, "fp16": False,
               "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False, "deepspeed": None, "fsdp": None,
               "dataloader_num_workers": 0, "dataset_num_proc": None, "torch_compile": False, "use_liger_kernel": False,
               "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False, "logging_dir": None,
               "disable_tqdm": True, "resume_from_checkpoint": None}  # fmt: skip
    for name, value in changes.items():
        if hasattr(arguments, name):
            setattr(arguments, name, value)
    if any(word in str(getattr(arguments, "optim", "")) for word in ("8bit", "4bit", "paged", "apex", "fused", "bnb")):
        arguments.optim = "adamw_torch"
    keywords = getattr(arguments, "model_init_kwargs", None)
    if isinstance(keywords, dict) and keywords.get("attn_implementation") == "flash_attention_2":
        arguments.model_init_kwargs = {**keywords, "attn_implementation": "sdpa"}


def _small_local(name: Any) -> bool:
    if not isinstance(name, (str, Path)) or not Path(name).is_dir():
        return False
    weights = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
    return bool(weights) and sum(one.stat().st_size for one in weights) <= SMALL_ENOUGH * 4


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, torch.dtype):
        return value
    known = getattr(torch, value, None) if isinstance(value, str) else None
    return known if isinstance(known, torch.dtype) else None
