"""From a raw row to the chat template: what each step must hand to the next.

Run by pytest, or alone: `python tests/test_data_format_before_chat_template.py`. Against the real Qwen2-VL vocabulary
and template, offline.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
from PIL import Image
from qwen_vl_utils import process_vision_info

from vlmdet.data.collators import restore_images_in_conversations
from vlmdet.data.dataset import IMAGE_PLACEHOLDER, convert_to_conversation_format, system_message

ANSWER = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(200,100),(600,500)<|box_end|>"


@pytest.fixture
def example() -> dict[str, Any]:
    """A raw row as `openfoodfacts/nutrition-table-detection` has them: y_min, x_min, y_max, x_max."""
    return {
        "image_id": "1234567890123_1",
        "image": Image.new("RGB", (320, 240), (200, 30, 30)),
        "width": 320,
        "height": 240,
        "meta": {"barcode": "1234567890123", "off_image_id": "1", "image_url": "https://example.org/1.jpg"},
        "objects": {"bbox": [[0.1, 0.2, 0.5, 0.6]], "category_id": [0], "category_name": ["nutrition-table"]},
    }


@pytest.fixture
def arrow_messages() -> list[dict[str, Any]]:
    """Messages as Arrow gives them back: every part has every key."""
    return [
        {"role": "system", "content": [{"type": "text", "text": "Find objects.", "image": None}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "image": IMAGE_PLACEHOLDER},
                {"type": "text", "text": "Where?", "image": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER, "image": None}]},
    ]


def parts_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


class TestConvertToConversationFormat:
    def test_basic_structure(self, example: dict[str, Any]) -> None:
        row = convert_to_conversation_format(example)
        assert set(row) == {"id", "messages", "image", "boxes", "labels"}
        assert row["image"] is example["image"]
        assert row["id"] == "1234567890123_1"
        assert row["labels"] == ["nutrition-table"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])

    def test_image_placeholder_used(self, example: dict[str, Any]) -> None:
        images = [part for part in parts_of(convert_to_conversation_format(example)["messages"]) if "image" in part]
        assert images == [{"type": "image", "image": "IMAGE_PLACEHOLDER"}]

    def test_message_roles(self, example: dict[str, Any]) -> None:
        system, user, assistant = convert_to_conversation_format(example)["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert system["content"] == [{"type": "text", "text": system_message}]
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert "nutrition-table-small-energy" in user["content"][1]["text"]

    def test_bbox_format(self, example: dict[str, Any]) -> None:
        row = convert_to_conversation_format(example)
        assert row["boxes"] == [[0.2, 0.1, 0.6, 0.5]]  # x first, fractions
        assert row["messages"][2]["content"] == [{"type": "text", "text": ANSWER}]


class TestRestoreImagesInConversations:
    def test_restores_actual_images(self, arrow_messages: list[dict[str, Any]]) -> None:
        red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        before = copy.deepcopy(arrow_messages)
        restored = restore_images_in_conversations([arrow_messages, arrow_messages], [red, [blue]])
        assert [messages[1]["content"][0]["image"].getpixel((0, 0)) for messages in restored] == [
            (255, 0, 0),
            (0, 0, 255),
        ]
        assert arrow_messages == before  # the input is not changed

    def test_no_none_values(self, arrow_messages: list[dict[str, Any]]) -> None:
        (restored,) = restore_images_in_conversations([arrow_messages], [Image.new("RGB", (8, 8))])
        values = [value for part in parts_of(restored) for value in part.values()]
        assert None not in values and "None" not in values
        assert [set(part) for part in parts_of(restored)] == [
            {"type", "text"},
            {"type", "image"},
            {"type", "text"},
            {"type", "text"},
        ]

    def test_structure_for_chat_template(self, arrow_messages: list[dict[str, Any]]) -> None:
        picture = Image.new("RGB", (8, 8))
        (restored,) = restore_images_in_conversations([arrow_messages], [picture])
        assert restored == [
            {"role": "system", "content": [{"type": "text", "text": "Find objects."}]},
            {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]


class TestChatTemplateCompatibility:
    def test_apply_chat_template(self, qwen_processor: Any, arrow_messages: list[dict[str, Any]]) -> None:
        (restored,) = restore_images_in_conversations([arrow_messages], [Image.new("RGB", (8, 8))])
        assert qwen_processor.apply_chat_template(restored, tokenize=False) == (
            "<|im_start|>system\nFind objects.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n"
            f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
        )

    def test_process_vision_info(self, arrow_messages: list[dict[str, Any]]) -> None:
        (restored,) = restore_images_in_conversations([arrow_messages], [Image.new("RGB", (320, 240), "red")])
        images, videos = process_vision_info(restored)
        assert [image.size for image in images] == [(308, 252)] and videos is None

    def test_full_pipeline(self, qwen_processor: Any, example: dict[str, Any]) -> None:
        row = convert_to_conversation_format(example)
        messages_list = restore_images_in_conversations([row["messages"]], [row["image"]])
        text = qwen_processor.apply_chat_template(messages_list, tokenize=False)
        images, _ = process_vision_info(messages_list)
        batch = qwen_processor(text=text, images=images, return_tensors="pt")
        assert batch["image_grid_thw"].tolist() == [[1, 18, 22]]  # 252 and 308 pixels in patches of 14
        ids = batch["input_ids"][0]
        assert (ids == 151655).sum() == 18 * 22 // 4
        assert qwen_processor.tokenizer.decode(ids).endswith(f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
