"""Merged weights do what base + adapter did, load in plain transformers, and appear only when that is proven."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmdet.cli import main
from vlmdet.config import load_settings, to_yaml
from vlmdet.contract import Contract
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.errors import ConfigError, ContractError, DataError, ModelError
from vlmdet.models.loader import load, make_contract
from vlmdet.training import merge
from vlmdet.training.merge import merge_adapter, merge_run
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
IDS = torch.arange(40)[None]
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quiet(text: str) -> None:
    """Print nothing."""


def write_adapter(folder: Path, base: Path | str, *, seed: int = 0, **options: Any) -> Path:
    """Write a checkpoint that holds an adapter with random updates, as PEFT itself saves it."""
    loaded = load(str(base), as_base=True, **LIMITS)
    contract = make_contract(
        loaded, labels=["sign"], codec="auto", box_order="raster", max_new_tokens=6, data_fingerprint="0"
    )
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(loaded.model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "magnitude" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    contract.write(folder)
    return folder


def write_run(name: str, base: Path | str, *overrides: str, seed: int = 0, **options: Any) -> Path:
    """Make `runs/NAME/001` with one adapter as its best checkpoint; its data set does not exist."""
    run = Path("runs") / name / "001"
    best = write_adapter(run / "checkpoints" / "checkpoint-5", base, seed=seed, **options)
    (best.parent / "best").symlink_to(best.name)
    settings = load_settings(None, ["data.source=gone", f"name={name}", f"model.name={base}", *overrides])
    (run / "config.yaml").write_text(to_yaml(settings))
    Contract.read(best).write(run)
    return best


def plain_logits(folder: Path | str) -> torch.Tensor:
    """Compute logits as anybody would who has no vlmdet."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def peft_logits(base: Path | str, *adapters: Path) -> torch.Tensor:
    """Compute logits with PEFT alone: all but the last adapter merged, the last one laid on."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.inference_mode():
        return PeftModel.from_pretrained(model, adapters[-1]).eval()(input_ids=IDS).logits


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora, ranks by layer": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"down_proj": 3},
    },
    "vision": {"target_modules": r".*visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)|merger\.mlp\.(0|2))"},
    "tied head": {"target_modules": ["lm_head", "q_proj"]},
    "tied embeddings saved whole": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_of_adapter_is_merged_as_peft_applies_it(small_base: Path, kind: str) -> None:
    best = write_run("kind", small_base, **KINDS[kind])
    result = merge_run("kind", say=quiet)
    merged = Path("runs/kind/001/merged")
    wanted = peft_logits(small_base, best)
    assert (plain_logits(merged) - wanted).abs().max() < 1e-4
    if kind != "vision":
        assert (plain_logits(small_base) - wanted).abs().max() > 1e-2  # or nothing would have been shown
    assert result["verified"]["max_logit_difference"] < 1e-4
    assert result["verified"]["identical_rows"] == result["verified"]["rows"] == 8
    assert "drawn" in result["verified"]["pictures"]
    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] == (not kind.startswith("tied"))


def test_a_real_run_is_merged_and_used_in_plain_transformers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_drawn_set(here / "drawn", train=8, val=9)
    settings = load_settings(
        None,
        [
            f"data.source={source}",
            "name=real",
            "training.max_steps=3",
            "training.learning_rate=1e-3",
            "training.overfit_gate=false",
            "training.eval_rows=2",
            "evaluation.max_new_tokens=32",
            "evaluation.resamples=20",
            "evaluation.split=val",
            "lora.targets=[language.attn,language.mlp,vision.attn,merger]",
        ],
    )
    run = train(prepare(settings, say=quiet), say=quiet)
    assert main(["merge", "runs/real", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    merged = run / "merged"
    assert result == json.loads((merged / "merge.json").read_text())
    assert result["verified"]["pictures"] == "8 pictures of val"
    assert result["verified"]["boxes"] > 0
    assert (result["base"], result["dtype"], result["nf4"]) == ("tiny", "float32", None)
    assert {path.suffix for path in merged.iterdir()} <= {".json", ".jinja", ".safetensors", ".yaml"}
    assert Contract.read(merged) == Contract.read(run)
    assert [path.name for path in run.iterdir() if "part" in path.name] == []

    # plain transformers: the picture limits and the end token are those of the run, and the answers too
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    contract = Contract.read(run)
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (contract.min_pixels, contract.max_pixels)
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tuned = load("runs/real", dtype="float32", device="cpu")
    image = prepare_image(source)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": contract.system_prompt}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": contract.user_prompt}],
        },
    ]
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        assert (model(**batch).logits - tuned.model(**batch).logits).abs().max() < 1e-3
        answers = [one.generate(**batch, max_new_tokens=32, do_sample=False) for one in (model, tuned.model)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > batch["input_ids"].shape[1] + 5

    assert main(["predict", str(here / "picture.png"), "--model", str(merged), "--out", "out"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] in ("ok", "none", "parse_failure")
    assert main(["eval", str(merged), "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"]["f1_50"]["n"] == 2


def prepare_image(source: Path) -> Any:
    from vlmdet.data.readers import open_dataset

    image = open_dataset(str(source)).splits["val"][0].image
    image.save("picture.png")
    return image


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_families_are_merged_too(family_base: Callable[[str], Path], family: str) -> None:
    base = family_base(family)
    linear = r".*(language_model|visual\.blocks|visual\.merger|deepstack).*(proj|qkv|fc[12])"
    best = write_run("cells", base, target_modules=linear)
    result = merge_run("cells", say=quiet)
    assert result["verified"]["identical_rows"] == 8
    wanted = peft_logits(base, best)
    assert (plain_logits("runs/cells/001/merged") - wanted).abs().max() < 1e-4
    assert (plain_logits(base) - wanted).abs().max() > 1e-2


def test_stages_are_merged_in_order(small_base: Path) -> None:
    first = write_run("one", small_base, seed=1)
    second = write_run("two", first.resolve(), seed=2, target_modules=r".*self_attn\.(q|v)_proj")
    result = merge_run("two", say=quiet)
    wanted = peft_logits(small_base, first, second)
    merged = plain_logits("runs/two/001/merged")
    assert (merged - wanted).abs().max() < 1e-4
    assert (peft_logits(small_base, second) - wanted).abs().max() > 1e-2  # the first stage matters
    assert (result["base"], result["weights"]) == (str(small_base), str(small_base))
    assert [Path(stage["folder"]).resolve() for stage in result["stages"]] == [first.resolve(), second.resolve()]
    assert [stage["contract"]["base_model"] for stage in result["stages"]] == [str(small_base), str(first.resolve())]
    assert Contract.read(Path("runs/two/001/merged")) == Contract.read(second)


def left_behind(run: str) -> list[str]:
    return sorted(path.name for path in Path(run).iterdir())


def test_weights_that_do_something_else_are_not_kept(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("cells", small_base)
    before = left_behind("runs/cells/001")
    forgetful = (lambda model: model.unload(), r"do not do what base \+ adapter does")
    broken = (lambda model: with_nan(merge_adapter(model)), "nan")
    for how, word in (forgetful, broken):
        monkeypatch.setattr(merge, "merge_adapter", how)
        with pytest.raises(ModelError, match=word):
            merge_run("cells", say=quiet)
        assert left_behind("runs/cells/001") == before


def with_nan(model: Any) -> Any:
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
    return model


def test_rounded_weights_are_half_the_size_and_the_effect_is_measured(small_base: Path) -> None:
    write_run("cells", small_base)
    said: list[str] = []
    exact = merge_run("cells", out=Path("exact"), say=quiet)
    rounded = merge_run("cells", out=Path("rounded"), dtype="bfloat16", say=said.append)
    sizes = [(Path(name) / "model.safetensors").stat().st_size for name in ("exact", "rounded")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    assert exact["rounding"] is None
    # bfloat16 keeps 8 bits, float32 24: the one difference must be thousands of times the other
    assert rounded["rounding"]["max_logit_difference"] > 100 * rounded["verified"]["max_logit_difference"]
    assert any("rounding the weights to bfloat16" in line for line in said)
    assert json.loads(Path("rounded/config.json").read_text())["dtype"] == "bfloat16"
    assert load("rounded").contract == Contract.read(Path("runs/cells/001"))


def test_what_a_four_bit_base_changes_is_measured(small_base: Path, here: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = write_drawn_set(here / "drawn", train=2, val=4)
    write_run("cells", small_base)
    config = Path("runs/cells/001/config.yaml")
    four = ["model.quantization=nf4", f"data.source={source}", "evaluation.max_new_tokens=6", "evaluation.resamples=50"]
    config.write_text(to_yaml(load_settings(config, four)))
    said: list[str] = []
    result = merge_run("cells", say=said.append)
    assert (result["nf4"]["split"], result["nf4"]["n"]) == ("val", 4)
    assert {"nf4", "merged", "difference"} == set(result["nf4"]["f1_50"])
    assert any("f1_50 on val, 4-bit base + adapter and merged" in line for line in said)
    assert {path.name for path in Path("runs/cells/001/eval/val").iterdir()} == {"nf4", "merged"}
    assert merge_run("cells", out=Path("again"), skip_eval=True, say=quiet)["nf4"] is None


def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(
    small_base: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="no finished run"):
        merge_run("cells", say=quiet)
    best = write_run("cells", small_base)
    (here / "full").mkdir()
    (here / "full" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="there already"):
        merge_run("cells", out=Path("full"), say=quiet)
    with pytest.raises(ConfigError, match="there already"):
        merge_run("cells", out=Path("full/mine.txt"), say=quiet)
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        merge_run("cells", dtype="bfloat", say=quiet)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="2 processes"):
            merge_run("cells", say=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(ModelError, match=r"0\.0 GiB free"):
            merge_run("cells", say=quiet)
    contract = json.loads((best / "contract.json").read_text())
    (best / "contract.json").write_text(json.dumps(contract | {"base_fingerprint": "0" * 16}))
    with pytest.raises(ModelError, match="fingerprint"):
        merge_run("cells", say=quiet)
    (best / "contract.json").write_text(json.dumps(contract | {"template_sha256": "0" * 64}))
    with pytest.raises(ContractError, match="--allow template_sha256"):
        merge_run("cells", say=quiet)
    assert main(["merge", "runs/cells", "--allow", "template"]) == 2
    assert "did you mean 'template_sha256'" in capsys.readouterr().err
    assert main(["merge", "runs/cells", "--allow", "template_sha256", "--out", "allowed"]) == 0
    assert "--allow template_sha256: was '000" in capsys.readouterr().out
    now = {"trained": "0" * 64, "now": contract["template_sha256"]}
    assert json.loads((here / "allowed/merge.json").read_text())["allow"] == {"template_sha256": now}
    assert Contract.read(here / "allowed").template_sha256 == contract["template_sha256"]  # as its processor is
    (best / "adapter_config.json").rename(best / "config.json")
    with pytest.raises(ModelError, match="whole already"):
        merge_run("cells", say=quiet)
    assert left_behind("runs/cells/001") == ["checkpoints", "config.yaml", "contract.json"]
