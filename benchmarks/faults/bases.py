"""Untrained models of a few families with their processors, written once to the temporary folder.

The architectures, control tokens and templates are the real ones; widths, depths and the vocabulary are tiny.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(tempfile.gettempdir()) / f"vlmdet-faults-{os.getuid()}-1"
WORDS = (
    "Detect every cup, plate and sign in this image. Find all objects and report their bounding boxes as JSON. "
    "bbox_2d label box none user assistant system You are a helpful assistant. Outline the position and output all "
    "coordinates detect locate return nothing there picture of the kitchen "
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
ROPE = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]}
QWEN: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "kind": "Qwen2VL",
        "patch": 14,
        "text": {"rope_parameters": ROPE},
        "vision": {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "kind": "Qwen2_5_VL",
        "patch": 14,
        "text": {"rope_parameters": ROPE},
        "vision": {
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 96,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "kind": "Qwen3VL",
        "patch": 16,
        "text": {"head_dim": 32, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision": {
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 96,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    },
}
MIN_PIXELS, MAX_PIXELS = 56 * 56, 448 * 448


def folder_of(family: str) -> Path:
    """Give the folder of a family's untrained base, and write it when it is first asked for."""
    folder = ROOT / family
    if not folder.is_dir():
        ROOT.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=ROOT))
        (_write_qwen if family in QWEN else _write_other)(family, part)
        try:
            part.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(part)
    return folder


def processor_of(family: str, **pixels: int) -> Any:
    """Read a fresh processor; `min_pixels`/`max_pixels` as its size."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder_of(family))
    if pixels:
        size = dict(processor.image_processor.size)
        size["shortest_edge"] = pixels.get("min_pixels", size["shortest_edge"])
        size["longest_edge"] = pixels.get("max_pixels", size["longest_edge"])
        processor.image_processor.size = size
    return processor


def model_of(family: str) -> Any:
    """Read a fresh model in float32."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder_of(family), dtype=torch.float32)


@functools.cache
def _tokenizer() -> Any:
    from vlmdet.models import tiny

    return tiny.build_tokenizer([WORDS] * 4, vocab_size=1500)


def _template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _write_qwen(family: str, folder: Path) -> None:
    import transformers

    sizes, tokenizer = QWEN[family], _tokenizer()
    kind = sizes["kind"]
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | sizes["text"] | ends | {"vocab_size": len(tokenizer)},
        vision_config=vision | sizes["vision"] | {"patch_size": sizes["patch"]},
        tie_word_embeddings=family != "qwen2_5_vl",
        **ids,
    )
    transformers.set_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    video = "Qwen3VL" if family == "qwen3_vl" else "Qwen2VL"
    getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=sizes["patch"], size=size),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(patch_size=sizes["patch"]),
        chat_template=_template("qwen3_vl" if family == "qwen3_vl" else "qwen2_5_vl"),
    ).save_pretrained(folder)


def _with_tokens(begin: str, end: str, pad: str, control: list[str], **named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    from vlmdet.models import tiny

    backend = tiny.build_tokenizer([WORDS] * 4, vocab_size=1500).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(control, special_tokens=True)
    return tokenizer


def _write_other(family: str, folder: Path) -> None:
    import transformers

    transformers.set_seed(0)
    model, processor = {"paligemma": _paligemma, "florence2": _florence2, "idefics3": _idefics3}[family]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _ends(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ids | {"vocab_size": len(tokenizer)}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}


def _paligemma() -> tuple[Any, Any]:
    import transformers

    images = transformers.SiglipImageProcessor(size={"height": 112, "width": 112})
    images.image_seq_length = 64
    processor = transformers.PaliGemmaProcessor(images, _with_tokens("<bos>", "<eos>", "<pad>", []))
    config = transformers.PaliGemmaConfig(
        text_config=TEXT | _ends(processor.tokenizer) | {"model_type": "gemma", "head_dim": 32},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        projection_dim=64,
        image_token_id=processor.image_token_id,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _florence2() -> tuple[Any, Any]:
    import transformers

    images = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    control = [f"<loc_{number}>" for number in range(1000)]
    tokenizer = _with_tokens("<s>", "</s>", "<pad>", control, image_token="<image>")
    config = transformers.Florence2Config(
        text_config=_ends(tokenizer)
        | {
            "model_type": "bart",
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
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


def _idefics3() -> tuple[Any, Any]:
    import transformers

    control = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    control += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _with_tokens("<|im_start|>", "<end_of_utterance>", "<|im_end|>", control)
    config = transformers.Idefics3Config(
        text_config=TEXT | _ends(tokenizer) | {"model_type": "llama", "head_dim": 32},
        vision_config=VISION | {"image_size": 56},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_template("idefics3"))
    return transformers.Idefics3ForConditionalGeneration(config), processor
