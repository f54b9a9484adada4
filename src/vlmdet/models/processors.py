"""How processors of other families than Qwen-VL are asked, and that they show a picture whole.

When: PER RUN, when a processor is loaded; `data.collators_other` builds batches by it.

A picture is seen whole, at the one size of the model, squashed. InternVL and Idefics3 could cut it into tiles besides (12 or
25 times the tokens), and LLaVA would crop its middle. All that is off, in training and in inference alike: boxes are
relative to the whole picture, and the pixel limits of a run must say what the model sees.

    InternVL   1 tile of 448 x 448, 256 tokens             Idefics3, SmolVLM  364 or 512 squared, 169 or 64 tokens
    PaliGemma  224, 448 or 896 squared, 256 to 4,096       Florence-2         768 squared, 577 tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vlmdet.errors import ModelError


class Layout(NamedTuple):
    """How a processor's family is asked, and answers.

    Attributes:
        kind: `chat`: by the chat template; `prefix`: a question, and the answer as its suffix; `encoder`: the question goes to an
            encoder, the answer to the decoder.
        control: pattern of the control tokens in an answer, each a single id; empty for none.
        whole: arguments of the processor that keep it from cutting a picture into tiles.
    """

    kind: Literal["chat", "prefix", "encoder"] = "chat"
    control: str = ""
    whole: Mapping[str, Any] = {}


LAYOUTS: dict[str, Layout] = {
    "PaliGemmaProcessor": Layout("prefix", r"<loc\d{4}>"),
    "Florence2Processor": Layout("encoder", r"<loc_\d{1,3}>"),
    "InternVLProcessor": Layout("chat", r"</?(?:ref|box)>", {"crop_to_patches": False}),
    "Idefics3Processor": Layout("chat", "", {"do_image_splitting": False}),
    "SmolVLMProcessor": Layout("chat", "", {"do_image_splitting": False}),
}
"""By the class of a processor; any other one is asked by its chat template."""


def layout_of(processor: Any) -> Layout:
    """Return how the family of a processor is asked."""
    return LAYOUTS.get(type(processor).__name__, Layout())


def is_other_family(processor: Any) -> bool:
    """Tell whether batches for a processor are made here, and not in `data.collators`."""
    return not type(processor).__name__.startswith("Qwen")


def show_whole_pictures(processor: Any) -> None:
    """Set a loaded processor so that it squashes every picture, whole, to the model's one size; saved with it.

    When: once per run, when the processor is loaded.

    Raises:
        ModelError: its pictures have no one size.
    """
    images = processor.image_processor
    if getattr(images, "do_center_crop", False):  # CLIP's, in LLaVA: it would cut boxes off
        images.size = {"height": images.crop_size["height"], "width": images.crop_size["width"]}
        images.do_center_crop = False
    for name, value in layout_of(processor).whole.items():
        setattr(images, name, value)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    seen_size(processor)


def seen_size(processor: Any) -> tuple[int, int]:
    """Return width and height at which a model sees every picture, `(224, 224)`, as its processor says.

    Raises:
        ModelError: it has no one size.
    """
    images = processor.image_processor
    if "do_image_splitting" in layout_of(processor).whole:
        side = images.max_image_size["longest_edge"]
        return side, side
    size = dict(images.size)
    height, width = size.get("height"), size.get("width")
    if not height or not width:
        raise ModelError(
            f"{type(processor).__name__}: pictures have no one size, but {size}",
            "this family is not supported; Qwen-VL, PaliGemma, Florence-2, InternVL, Idefics3 and LLaVA are",
        )
    return width, height


def pixel_limits(processor: Any) -> tuple[int, int, int]:
    """Return min_pixels, max_pixels and size factor of a loaded processor, as a contract holds them.

    When: once per run, for the contract. Where a model sees every picture at one size, both limits are its area and the factor
    is its side: 50176, 50176 and 224 for PaliGemma at 224 x 224.
    """
    images = processor.image_processor
    if is_other_family(processor):
        width, height = seen_size(processor)
        return width * height, width * height, math.gcd(width, height)
    return images.size["shortest_edge"], images.size["longest_edge"], images.patch_size * images.merge_size
