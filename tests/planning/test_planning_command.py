"""``mhr plan`` as a user meets it: the JSON form of the contract, the table, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import environment

from megatron_hyperrouter.commands.cluster.plan import main
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
num_layers: 4
hidden_size: 64
num_attention_heads: 4
num_query_groups: 2
moe_ffn_hidden_size: 96
seq_length: 32
num_experts: 8
micro_batch_size: 2
global_batch_size: 16
bf16: true
expert_model_parallel_size: 3   # a layout, which the command ignores
"""


def plan(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(TMPDIR=str(folder)),
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    (made / "model.yaml").write_text(MODEL, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    file = folder / "sub" / "plan.json"
    ended = plan(
        folder, "--config", str(folder / "model.yaml"), "--gpus", "8", "--per-node", "4", "--json", str(file)
    )
    assert ended.returncode == 0, ended.stderr
    return ended, json.loads(file.read_text(encoding="utf-8"))


def test_json_form(done: tuple[Any, dict[str, Any]]) -> None:
    _, told = done
    assert told["layouts"] and told["refused"]
    for each in told["layouts"]:
        assert isinstance(each["fits"], bool)
        parts = dict(each["memory_bytes"])
        total = parts.pop("total")
        assert abs(sum(parts.values()) - total) <= len(parts)  # rounded
        assert each["fits"] == (total <= 80e9)
        assert each["step_seconds"] > 0
        assert len(each["parameters_per_rank"]) == 8
        layout = each["layout"]
        sizes = [layout[f"{name}_parallel_size"] for name in ("data", "context")]
        sizes += [layout[f"{name}_model_parallel_size"] for name in ("tensor", "pipeline")]
        product = 1
        for size in sizes:
            product *= size
        assert product == 8
    assert all(set(each) == {"layout", "reason"} and each["reason"] for each in told["refused"])
    fast = [each["step_seconds"] for each in told["layouts"] if each["fits"]]
    assert fast == sorted(fast)
    assert {each["layout"]["engine"] for each in told["layouts"]} == {"deepspeed", "megatron"}


def test_text(done: tuple[Any, Any]) -> None:
    text = done[0].stdout
    for words in (
        "8 GPUs",
        "Assumptions:",
        "Start the first layout:",
        "refused:",
        "pretrain_gpt_hyperrouter.py",
    ):
        assert words in text


def test_the_command_line_is_accepted_by_the_program(folder: Path, done: tuple[Any, dict[str, Any]]) -> None:
    for each in done[1]["layouts"]:
        config = parse(
            ["--config", str(folder / "model.yaml"), "--mock-data", *each["flags"]],
            routers=ROUTERS,
            world_size=8,
        )
        assert config.engine.engine == each["layout"]["engine"]


def test_refusals_are_those_of_the_program(folder: Path, done: tuple[Any, dict[str, Any]]) -> None:
    """Each layout that a rule refuses is refused by the program itself, for the same reason."""
    refused = [each for each in done[1]["refused"] if "GiB" not in each["reason"]]
    assert refused
    for each in refused:
        words = []
        for name, value in each["layout"].items():
            flag = "--" + name.replace("_", "-")
            if name != "data_parallel_size" and value is not None and value is not False:
                words += [flag] if value is True else [flag, str(value)]
        with pytest.raises(ConfigError) as caught:
            parse(
                ["--config", str(folder / "model.yaml"), "--mock-data", *words], routers=ROUTERS, world_size=8
            )
        assert all(problem.rule in each["reason"] for problem in caught.value.problems)


def test_a_thousand_gpus_take_less_than_a_minute_of_one_core(capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.process_time()
    config = str(ROOT / "examples" / "models" / "mixtral-8x7b.yaml")
    main(["--config", config, "--gpus", "1024", "--top", "1", "--vocab-size", "32000"])
    assert time.process_time() - begun < 60
    assert "1024 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "0"], "--gpus = 0: must be at least 1"),
        (["--gpus", "12"], "--gpus = 12: must be divisible by --per-node = 8"),
        (["--gpus", "8", "--gpu-memory", "2"], "--reserve = 2.5: must be at least 0"),
        (["--gpus", "8", "--expert-model-parallel-size", "2"], "is chosen by this command"),
        (["--gpus", "8", "--hidden-sise", "2"], "--hidden-size"),
        (["--gpus", "8", "--calibration", "nowhere.json"], "--calibration = nowhere.json: cannot be read"),
        (["--gpus", "7", "--per-node", "7"], "--global-batch-size"),
        (["--gpus", "8", "--config", "other.yaml"], "other.yaml"),
    ],
)
def test_bad_input(folder: Path, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["--config", str(folder / "model.yaml"), *flags])
    assert caught.value.exit_status == 2 and words in str(caught.value)


def test_nothing_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(folder / "model.yaml"), "--gpus", "1", "--gpu-memory", "2.5001"])
    told = capsys.readouterr().out
    assert caught.value.code == 1 and "does not fit" in told and "take most" in told
