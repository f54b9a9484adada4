"""The shipped base really points at what it was pre-trained on, and has never seen a table."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

import vlmdet.data.synthetic.shapes as shapes
from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.dataset import build_messages
from vlmdet.data.synthetic.shapes import SHAPES, draw_scene
from vlmdet.grounding import View, get_codec
from vlmdet.models.inference import generate_answers
from vlmdet.models.loader import load
from vlmdet.models.tiny import CONTROL_TOKENS, TINY_DIR, TINY_MAX_PIXELS, TINY_MIN_PIXELS


def test_it_is_small_safe_and_whole() -> None:
    names = {path.name for path in TINY_DIR.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert sum(path.stat().st_size for path in TINY_DIR.iterdir()) <= 12_000_000
    loaded = load("tiny")
    assert 3_000_000 <= sum(weight.numel() for weight in loaded.model.parameters()) <= 6_000_000
    assert loaded.model.config.model_type == "qwen2_vl"
    tokenizer = loaded.processor.tokenizer
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in CONTROL_TOKENS)
    assert all(len(tokenizer(str(value))["input_ids"]) == 1 for value in range(1000))
    assert tokenizer.decode(tokenizer("Grüße, 桌子 🍫 1000")["input_ids"]) == "Grüße, 桌子 🍫 1000"


def test_it_points_at_drawn_objects_by_name() -> None:
    """Mean best IoU over the true boxes of 96 scenes that no training step has seen is at least .5."""
    rng = np.random.default_rng(20_261_122)
    loaded = load("tiny")
    scenes, labels = [], []
    for _ in range(96):
        scene = draw_scene(rng, 260, 260, objects=int(rng.integers(1, 5)), smallest=0.18, largest=0.75)
        names = scene.names()
        counts = {name: sum(name in own for own in names) for own in names for name in own}
        full = sorted(name for name, count in counts.items() if count <= 3 and " " in name)
        labels.append(str(rng.choice(full or sorted(counts))))
        scenes.append(scene)
    best = []
    for start in range(0, len(scenes), 32):
        part = slice(start, start + 32)
        answers = generate_answers(
            loaded.model,
            loaded.processor,
            [build_messages([label]) for label in labels[part]],
            [scene.image for scene in scenes[part]],
            min_pixels=TINY_MIN_PIXELS,
            max_pixels=TINY_MAX_PIXELS,
            max_new_tokens=96,
        )
        for scene, label, answer in zip(scenes[part], labels[part], answers, strict=True):
            found = get_codec("qwen2_vl").parse(answer.text, View(260, 260, 260, 260)).boxes
            wanted = scene.boxes[[label in own for own in scene.names()]]
            truth = Boxes.from_array(wanted, FRACTIONS, 260, 260)
            best += list(truth.iou(found).max(axis=1)) if len(found) else [0.0] * len(truth)
    assert np.mean(best) >= 0.5


def test_no_shape_is_a_table_and_no_shape_uses_its_drawing_code() -> None:
    assert not [name for name in SHAPES if "table" in name or "nutrition" in name]
    tree = ast.parse(Path(str(shapes.__file__)).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "vlmdet.data.synthetic.packages" not in imported
    primitives = Path(str(shapes.__file__)).with_name("primitives.py").read_text(encoding="utf-8")
    assert "packages" not in "".join(line for line in primitives.splitlines() if "import" in line)
