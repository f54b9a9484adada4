"""What a server must see if it asks as the model was trained: token ids of the prompt, and pixels.

When: AFTER training, where answers come from a server (`evaluation.server`); needs torch, through the collators, which own
both. Only the processor of the run is loaded, not its weights:

    processor = load_processor("runs/demo/001", min_pixels=contract.min_pixels, max_pixels=contract.max_pixels)
    engine = openai_engine(url, "demo", contract=contract, rendering=Rendering(processor, contract))
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmdet.contract import Contract
from vlmdet.data.collators import EncodedPicture, collate_prompts
from vlmdet.data.collators_other import collate_other_prompts
from vlmdet.data.dataset import Messages
from vlmdet.data.resized import resize_like
from vlmdet.errors import ContractError
from vlmdet.grounding import View
from vlmdet.models.answers import token_texts
from vlmdet.models.processors import is_other_family, pixel_limits, seen_size


class Rendering:
    """The prompt and the pictures of a run, as its own processor makes them; for several threads at once.

    Args:
        processor: of the run, with the pixel limits of its contract.
        contract: of the run.

    Raises:
        ContractError: the processor is another than the contract's.
    """

    def __init__(self, processor: Any, contract: Contract) -> None:
        found = hashlib.sha256((processor.chat_template or "").encode()).hexdigest()
        if found != contract.template_sha256:
            raise ContractError(
                f"template_sha256 was {contract.template_sha256}, now {found}", "use the processor of the run"
            )
        limits = (contract.min_pixels, contract.max_pixels, contract.size_factor)
        if pixel_limits(processor) != limits:
            raise ContractError(
                f"min_pixels, max_pixels and size_factor were {limits}, now {pixel_limits(processor)}",
                "load the processor with the limits of the contract",
            )
        self.image_token_id = int(processor.image_token_id)
        self._processor = processor
        self._limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
        self._lock = threading.Lock()  # a tokenizer that two threads use at once may raise
        self._ids_of = functools.lru_cache(maxsize=1024)(self._make_ids)  # a prompt has few sizes

    def ids(self, messages: Messages, view: View) -> tuple[int, ...]:
        """Return the ids of a prompt as training had them, image tokens included.

        Input: a conversation without an answer, with one placeholder; the size of its picture.
        """
        with self._lock:
            return self._ids_of(json.dumps(messages), view.resized_width, view.resized_height)

    def _make_ids(self, messages: str, width: int, height: int) -> tuple[int, ...]:
        images = self._processor.image_processor
        if is_other_family(self._processor):  # every picture has as many tokens
            picture: Any = Image.new("RGB", seen_size(self._processor))
            collate = collate_other_prompts
        else:
            picture = EncodedPicture(1, height // images.patch_size, width // images.patch_size)
            collate = collate_prompts
        batch = collate(self._processor, [json.loads(messages)], [picture], **self._limits)
        return tuple(batch["input_ids"][0].tolist())

    def picture(self, image: Image.Image) -> Image.Image | None:
        """Resize a picture as the processor does, so that the same processor leaves it as it is; None where it would not.

        Of a family that sees every picture at one size but gets there in two steps (Idefics3), the picture is returned as given:
        the server's processor takes both.
        """
        images = self._processor.image_processor
        if not is_other_family(self._processor):
            size = {"shortest_edge": self._limits["min_pixels"], "longest_edge": self._limits["max_pixels"]}
            pixels = resize_like(images, image, size)
            return None if pixels is None else Image.fromarray(pixels)

        def squash(picture: Image.Image) -> np.ndarray:
            made = images([picture], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
            return made.reshape(-1, *made.shape[-3:])[0].astype(np.uint8).transpose(1, 2, 0)

        pixels = squash(image)
        squashed = Image.fromarray(pixels)
        return squashed if np.array_equal(pixels, squash(squashed)) else image

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the texts of an answer's tokens; together they are its text, control tokens included."""
        with self._lock:
            return token_texts(self._processor.tokenizer, ids)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, control tokens included."""
        with self._lock:
            text: str = self._processor.tokenizer.decode(ids, skip_special_tokens=False)
        return text
