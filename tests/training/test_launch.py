"""Files for accelerate say what accelerate reads; what cannot be launched is refused, and several processes really start."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from vlmdet.cli import parse
from vlmdet.errors import ConfigError
from vlmdet.training.launch import launch

FILES = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))
KINDS = {
    "ddp": "MULTI_GPU",
    "cpu": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
}


def arguments(path: Path) -> Any:
    """Return what accelerate makes of `accelerate launch --config_file PATH -m vlmdet`."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "vlmdet"])
    return _validate_launch_command(args)[0]


def test_all_files_are_there() -> None:
    assert {path.stem for path in FILES} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_bound_to_the_class_that_accelerate_reads(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == DistributedType(KINDS[path.stem])
    known = {action.dest for action in launch_command_parser()._actions}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= known  # others it would pass over in silence
    args = arguments(path)
    assert (args.num_processes, args.main_process_port) == (2, 0)
    for section in (config.fsdp_config, config.deepspeed_config):
        assert {key: getattr(args, key) for key in section} == section


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_a_file_names_the_file_and_a_recipe_that_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"--config_file configs/accelerate/{path.name} -m vlmdet train" in text
    command = text.split("-m vlmdet ")[1].split("\n\n")[0].split("\n#\n")[0].replace("\\\n#", "").split("\n")[0]
    args = parse(command.split())
    assert (path.parents[1] / f"{args.recipe}.yaml").is_file()


def test_fsdp2_is_what_the_plugin_becomes() -> None:
    with patch_environment(**prepare_multi_gpu_env(arguments(FILES[[p.stem for p in FILES].index("fsdp2")]))):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"]
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading


def test_layers_that_are_cut_are_those_of_the_families() -> None:
    text = (FILES[0].parent / "fsdp2.yaml").read_text(encoding="utf-8")
    for family, kind in (
        ("qwen2_vl", "Qwen2VLDecoderLayer,Qwen2VLVisionBlock"),
        ("qwen2_5_vl", "Qwen2_5_VLDecoderLayer,Qwen2_5_VLVisionBlock"),
        ("qwen3_vl", "Qwen3VLTextDecoderLayer,Qwen3VLVisionBlock"),
    ):
        assert kind in text
        spec = importlib.util.find_spec("transformers")
        assert spec is not None and spec.origin is not None
        code = (Path(spec.origin).parent / "models" / family / f"modeling_{family}.py").read_text(encoding="utf-8")
        for name in kind.split(","):
            assert f"class {name}(" in code  # not imported: that takes ten seconds


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_what_the_plugin_becomes(stage: int) -> None:
    path = FILES[0].parent / f"deepspeed_zero{stage}.yaml"
    args = arguments(path)
    args.deepspeed_fields_from_accelerate_config = ",".join(yaml.safe_load(path.read_text())["deepspeed_config"])
    _, environment = prepare_deepspeed_cmd_env(args)
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.offload_optimizer_device == plugin.offload_param_device == "none"
    assert plugin.zero3_save_16bit_model is (stage == 3)


def test_what_cannot_be_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="two or more"):
        launch(1, ["env"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="not both"):
        launch(2, ["env"])


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vlmdet", "train", "absent", "--num-processes", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "vlmdet train:" in done.stderr and "ended with exit code 2; the others were stopped" in done.stderr
    assert "Traceback" not in done.stderr
