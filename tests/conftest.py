"""Fixtures that many tests share: the data beside the checkout, and the real Qwen2-VL vocabulary without a hub."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_CONTROL_ID = 151643


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with public data sets and reference files (`VLMDET_SHARED`, default `../shared`); skips where absent."""
    folder = Path(os.environ.get("VLMDET_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no {folder}/data; set VLMDET_SHARED")
    return folder


def _package_file(package: str, file: str) -> Path:
    """Find a file that an installed package ships, without importing the package; skips where absent."""
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or []))) / file if spec is not None else None
    if path is None or not path.is_file():
        pytest.skip(f"the package {package} with its {file} is not installed")
    return path


def _write_vocabulary(tiktoken_file: Path, folder: Path) -> None:
    """Turn tiktoken's ranks into `vocab.json` and `merges.txt`, as Qwen2 publishes them.

    A token's merge is what byte-pair encoding makes of its bytes just before the last step: its two last parts.
    """
    lines = tiktoken_file.read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(f"{written(parts[0])} {written(parts[1])}\n")
    vocab = json.dumps(
        {written(token): rank for token, rank in ranks.items()}, ensure_ascii=False, separators=(",", ":")
    )
    files = {"vocab.json": (vocab, "ca10d7e9fb3ed185"), "merges.txt": ("".join(merges), "599bab5407508877")}
    for name, (text, sha256) in files.items():
        found = hashlib.sha256(text.encode()).hexdigest()
        assert found.startswith(sha256), f"{name} is not Qwen2's: sha256 {found}, published {sha256}…"
        (folder / name).write_text(text, encoding="utf-8", newline="")
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config()), encoding="utf-8")


def _tokenizer_config() -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {
            str(FIRST_CONTROL_ID + i): {"content": token, **plain} for i, token in enumerate(CONTROL_TOKENS)
        },
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }


@pytest.fixture(scope="session")
def qwen_processor(request: pytest.FixtureRequest) -> Any:
    """The real Qwen2-VL processor: true vocabulary, ids and chat template, built offline; skips where that cannot be.

    The ranks ship with the PyPI package dashscope, the template with trl; the sums of both vocabulary files are those
    of the published ones. The files are kept in pytest's cache.
    """
    ranks = _package_file("dashscope", "resources/qwen.tiktoken")
    template = _package_file("trl", "chat_templates/qwen2_5_vl.jinja").read_text(encoding="utf-8")
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    folder = Path(request.config.cache.mkdir("qwen2-vl")) / "vocabulary"
    if not folder.is_dir():  # written beside it and renamed: another worker may be doing the same
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        _write_vocabulary(ranks, part)
        with contextlib.suppress(OSError):  # the other was quicker
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    )


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained Qwen2-VL of about 0.3 M parameters with the tiny base's template: a base by its path."""
    from transformers import Qwen2VLForConditionalGeneration, set_seed

    from vlmdet.models import tiny

    tokenizer = tiny.build_tokenizer(
        ["Detect every red sign in this image. If there is none, answer: none system user assistant"] * 4,
        vocab_size=1400,
    )
    config = tiny.build_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 128, 2
    text.layer_types = text.layer_types[:2]
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.rope_parameters = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]}
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = 2, 64, 2, 64
    set_seed(0)
    folder = tmp_path_factory.mktemp("small_base")
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    template = (tiny.TINY_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    tiny.build_processor(tokenizer, template).save_pretrained(folder)
    return folder


def _written_once(
    write: Callable[[str, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that gives a base's folder by its `model_type`, and writes it when it is first asked for."""

    @functools.cache
    def folder_of(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        write(model_type, folder)
        return folder

    return folder_of


FAMILY_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_vl": {
        "text_config": {},
        "vision_config": {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    },
    "qwen2_5_vl": {
        "text_config": {},
        "vision_config": {
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 96,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 96,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    },
}
"""What differs between the tiny models of `family_base`; two vision blocks and two decoder layers each."""


@pytest.fixture(scope="session")
def family_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of an untrained base of about 0.3 M parameters by its `model_type`, a key of `FAMILY_SIZES`.

    The architecture, the module names, the processor class and the chat template are the real ones; the tokenizer is the tiny
    base's. Embeddings are tied, but for `qwen2_5_vl`.
    """
    return _written_once(_write_family, tmp_path_factory)


def _write_family(model_type: str, folder: Path) -> None:
    import transformers

    from vlmdet.models import tiny

    tokenizer = tiny.build_tokenizer(
        ["Detect every red sign in this image. If there is none, answer: none system user assistant bbox_2d label"] * 4,
        vocab_size=1400,
    )
    kind, video, template = {
        "qwen2_vl": ("Qwen2VL", "Qwen2VL", "qwen2_5_vl"),
        "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", "qwen2_5_vl"),
        "qwen3_vl": ("Qwen3VL", "Qwen3VL", "qwen3_vl"),
    }[model_type]
    sizes = FAMILY_SIZES[model_type]
    tied = model_type != "qwen2_5_vl"
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | sizes["text_config"],
        vision_config=vision | sizes["vision_config"],
        tie_word_embeddings=tied,
        **ids,
    )
    transformers.set_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    model.save_pretrained(folder)
    patch = sizes["vision_config"]["patch_size"]
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(patch_size=patch),
        chat_template=_package_file("trl", f"chat_templates/{template}.jinja").read_text(encoding="utf-8"),
    )
    processor.save_pretrained(folder)


# ---- untrained bases of the families beside Qwen-VL ---------------------------------------------------------------------

OTHER_FAMILIES = ("paligemma", "florence2", "internvl", "idefics3")
_CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROLES = (  # a blank between the role and an answer, as Idefics3's own template has it
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] == 'text' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of an untrained base of at most 0.4 M parameters by its `model_type`, one of `OTHER_FAMILIES`.

    The architecture, the module names, the processor class and the control tokens are the real ones, the chat templates like
    the real ones; the tokenizer is the tiny base's with the family's control tokens. Pictures are seen at 56 x 56 (64 x 64 by
    Florence-2).
    """
    return _written_once(_write_other_family, tmp_path_factory)


def _other_tokenizer(begin: str, end: str, pad: str, control: list[str], **named: str) -> Any:
    """Make the tiny base's tokenizer with a family's control tokens; `named` ones become its attributes."""
    from transformers import PreTrainedTokenizerFast

    from vlmdet.models import tiny

    words = "Detect every red sign in this image. If there is none, answer: none system user assistant bbox label "
    backend = tiny.build_tokenizer([words + "Locate the phrases in the caption: cup. plate"] * 4, vocab_size=1350)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend.backend_tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(control, special_tokens=True)
    return tokenizer


def _write_other_family(model_type: str, folder: Path) -> None:
    import torch
    import transformers

    transformers.set_seed(0)
    model, processor = {
        "paligemma": _paligemma,
        "florence2": _florence2,
        "internvl": _internvl,
        "idefics3": _idefics3,
    }[model_type]()
    with torch.no_grad():  # untrained layers are so faint that no adapter could make such a model say anything
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _ids(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ids | {"vocab_size": len(tokenizer)}


def _paligemma() -> tuple[Any, Any]:
    import transformers

    images = transformers.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, _other_tokenizer("<bos>", "<eos>", "<pad>", []))
    config = transformers.PaliGemmaConfig(
        text_config=_TEXT | _ids(processor.tokenizer) | {"model_type": "gemma"},
        vision_config=_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        projection_dim=64,
        image_token_id=processor.image_token_id,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _florence2() -> tuple[Any, Any]:
    import transformers

    images = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 places and their mean
    control = [f"<loc_{number}>" for number in range(1000)]
    tokenizer = _other_tokenizer("<s>", "</s>", "<pad>", control, image_token="<image>")
    config = transformers.Florence2Config(
        text_config=_ids(tokenizer)
        | {
            "model_type": "bart",
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 256,
            "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": None,
        },
        vision_config={
            "depths": (1, 1, 1, 1),
            "embed_dim": (16, 16, 16, 32),
            "num_heads": (2, 2, 2, 2),
            "num_groups": (2, 2, 2, 2),
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 64,
        },
        image_token_id=tokenizer.image_token_id,
    )
    return transformers.Florence2ForConditionalGeneration(config), transformers.Florence2Processor(images, tokenizer)


def _internvl() -> tuple[Any, Any]:
    import transformers

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    control = ["<ref>", "</ref>", "<box>", "</box>"]
    tokenizer = _other_tokenizer("<|endoftext|>", "<|im_end|>", "<|endoftext|>", control, **named)
    config = transformers.InternVLConfig(
        text_config=_TEXT | _ids(tokenizer) | {"model_type": "qwen2", "bos_token_id": None},
        vision_config=_VISION | {"image_size": (56, 56), "patch_size": (14, 14)},
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=_CHAT_ML,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    import transformers

    control = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    control += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _other_tokenizer("<|im_start|>", "<|endoftext|>", "<|im_end|>", control)
    config = transformers.Idefics3Config(
        text_config=_TEXT | _ids(tokenizer) | {"model_type": "llama"},
        vision_config=_VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_ROLES)
    return transformers.Idefics3ForConditionalGeneration(config), processor
