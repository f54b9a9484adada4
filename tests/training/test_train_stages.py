"""A recipe of two stages trains the second on the result of the first, and does no stage twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmdet.config import load_stages
from vlmdet.contract import Contract
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.models.fingerprint import fingerprint
from vlmdet.models.loader import load
from vlmdet.settings import Settings
from vlmdet.training.train import train_stages

SHORT = (
    "training.max_steps=2", "training.eval_every=0", "training.eval_rows=1", "training.sample_rows=0",
    "training.overfit_gate=false", "training.report_to=[]", "training.gradient_checkpointing=false", "training.loader_workers=0",
    "training.gradient_accumulation=1", "evaluation.max_new_tokens=4",
)  # fmt: skip


def two_stages(folder: Path, base: Path, *more: str) -> list[Settings]:
    (folder / "vision.yaml").write_text("name: vision\ntraining: {method: full, areas: [vision, merger]}\n")
    (folder / "words.yaml").write_text("name: words\nlora: {targets: [language.attn]}\n")
    recipe = folder / "two.yaml"
    recipe.write_text(f"name: two\nstages: ['{folder / 'vision.yaml'}', '{folder / 'words.yaml'}']\n")
    model = {"name": str(base), "min_pixels": 3136, "max_pixels": 12544}
    return load_stages(recipe, [*SHORT, *more], {"data": {"source": "set"}, "model": model})


def test_the_second_stage_stands_on_the_first(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_drawn_set(tmp_path / "set", train=4, val=1, test=1, seed=3)
    lines: list[str] = []
    stages = two_stages(tmp_path, small_base)
    folder, prepared = train_stages(stages, say=lines.append)

    assert folder == Path("runs/two/001")
    first = Path("runs/two-1-vision/001")
    result = (first / "checkpoints" / "best").resolve()
    contract = Contract.read(folder)
    assert Path(contract.base_model).resolve() == result
    assert contract.base_fingerprint == fingerprint(str(result)) != Contract.read(first).base_fingerprint
    assert Contract.read(first).base_fingerprint == fingerprint(str(small_base))

    # Stage 1 moved vision and merger alone, stage 2 nothing of them
    base = load_file(small_base / "model.safetensors")
    tuned = load_file(result / "model.safetensors")
    moved = {name for name, weight in base.items() if not torch.equal(weight, tuned[name])}
    assert moved and all("visual" in name for name in moved)
    loaded = load(str(folder))
    adapter = {name for name, _ in loaded.model.named_parameters() if "lora_" in name}
    assert adapter and all("language_model" in name and "self_attn" in name for name in adapter)
    seen = dict(loaded.model.get_base_model().named_parameters())
    patch = next(name for name in tuned if "patch_embed" in name)
    now = next(weight for name, weight in seen.items() if "patch_embed" in name)
    assert torch.equal(now, tuned[patch])

    assert prepared.lock is not None
    prepared.lock.close()
    (folder / "done.json").unlink()
    lines.clear()
    again, prepared = train_stages(stages, say=lines.append)
    assert again == folder
    assert sorted(path.name for path in Path("runs/two-1-vision").iterdir()) == ["001"]
    assert sum(line.startswith("best checkpoint") for line in lines) == 1  # stage 1 was not trained again
    assert prepared.lock is not None
    prepared.lock.close()


def test_order_by_length_depends_on_seed_and_epoch_alone() -> None:
    from vlmdet.training.batches import LengthGroups

    lengths = [10, 90, 20, 80, 30, 70, 40, 60] * 4
    epoch = 0
    order = LengthGroups(lengths, batch=4, seed=1, epoch=lambda: epoch)
    first = list(order)
    torch.rand(3)  # whatever the global generator does
    assert list(order) == first and sorted(first) == list(range(32)) and len(order) == 32
    batches = [[lengths[i] for i in first[k : k + 4]] for k in range(0, 32, 4)]
    assert (
        sum(max(batch) - min(batch) for batch in batches) < 8 * 40
    )  # unsorted batches of four differ by 54 on average
    epoch = 1
    assert list(order) != first
