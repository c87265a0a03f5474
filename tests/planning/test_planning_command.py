"""``mhr plan`` from a user's view: the JSON of the contract, the table, and bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import environment

from megatron_hyperrouter.commands.cluster import doctor
from megatron_hyperrouter.commands.cluster.plan import main, settings_of
from megatron_hyperrouter.config.check import problems
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.planning.layouts import Candidate, structures, variants, without_layout
from megatron_hyperrouter.planning.machine import Machine
from megatron_hyperrouter.planning.plan import Planner
from megatron_hyperrouter.planning.start_command import start_command
from megatron_hyperrouter.routers import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
PLAIN = """
num_layers: 8
hidden_size: 64
num_attention_heads: 4
num_query_groups: 2
moe_ffn_hidden_size: 96
seq_length: 32
num_experts: 8
micro_batch_size: 2
global_batch_size: 16
bf16: true
"""
MODEL = f"""{PLAIN}
# a layout, which the command ignores
expert_model_parallel_size: 3
pipeline_model_parallel_size: 2
virtual_pipeline_model_parallel_size: 4
decoder_first_pipeline_num_layers: 1
sequence_parallel: true
# settings that the command chooses, too
engine: megatron
recompute_granularity: full
use_distributed_optimizer: true
overlap_grad_reduce: true
overlap_param_gather: true
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
    (made / "plain.yaml").write_text(PLAIN, encoding="utf-8")
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
        "To train with layout 1, run:",
        "layouts are ruled out",
        "pretrain_gpt_hyperrouter.py",
    ):
        assert words in text


def test_flags_of_a_layout_ask_for_it_whatever_the_file_says(
    folder: Path, done: tuple[Any, dict[str, Any]]
) -> None:
    command = ["--config", str(folder / "model.yaml"), "--mock-data"]
    for each in done[1]["layouts"]:
        config = parse([*command, *each["flags"]], routers=ROUTERS, world_size=8)
        assert Candidate(config, 8).layout() == each["layout"]
    # the printed command starts the first of them
    line = shlex.split(done[0].stdout.split("To train with layout 1, run:")[1].replace("\\\n", ""))
    printed = line[line.index("--config") :]
    config = parse([*printed, "--mock-data"], routers=ROUTERS, world_size=8)
    assert Candidate(config, 8).layout() == done[1]["layouts"][0]["layout"]


def test_the_printed_command_finds_a_file_with_a_dollar_sign_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "7$each.yaml"
    file.write_text(PLAIN, encoding="utf-8")
    config = parse(["--config", str(file).replace("$", "$$"), "--mock-data"], routers=ROUTERS)
    line = shlex.split(start_command(Candidate(config, 1), str(file), [], 8, set()).replace("\\\n", ""))
    printed = line[line.index("--config") :]
    assert parse([*printed, "--mock-data"], routers=ROUTERS).model == config.model


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        ("recompute_granularity: selective\nrecompute_modules: [moe]", {"selective"}),
        ("recompute_granularity: full\nrecompute_method: block\nrecompute_num_layers: 2", {"full"}),
        ("recompute_granularity: selective", {"selective", "full"}),
        ("", {None, "full"}),
    ],
)
def test_recomputation_that_the_settings_describe_stays(
    tmp_path: Path, settings: str, tried: set[str | None]
) -> None:
    """Only such layouts are planned as the program accepts."""
    (tmp_path / "model.yaml").write_text(PLAIN + settings, encoding="utf-8")
    config, engines, _ = settings_of(str(tmp_path / "model.yaml"), [])
    base = without_layout(config, 8)
    found = [each for each in structures(base, 8, 8, engines) if isinstance(each, Candidate)]
    made = [variant.config for candidate in found for variant in variants(candidate)]
    assert {each.train.recompute_granularity for each in made} == tried
    assert not [problem for each in made for problem in problems(each, world_size=8)]


def test_refusals_are_those_of_the_program(folder: Path, done: tuple[Any, dict[str, Any]]) -> None:
    """Each layout that a rule refuses is refused by the program itself, for the same reason."""
    refused = [each for each in done[1]["refused"] if "GiB" not in each["reason"]]
    assert refused
    for each in refused:
        words = []
        for name, value in each["layout"].items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif name != "data_parallel_size":
                words += [f"--{flag}", str(value)]
        with pytest.raises(ConfigError) as caught:
            parse(
                ["--config", str(folder / "plain.yaml"), "--mock-data", *words], routers=ROUTERS, world_size=8
            )
        assert all(problem.rule in each["reason"] for problem in caught.value.problems)


def test_a_thousand_gpus_take_less_than_a_minute_of_one_core(capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.process_time()
    config = str(ROOT / "examples" / "models" / "mixtral-8x7b.yaml")
    main(["--config", config, "--gpus", "1024", "--top", "1", "--vocab-size", "32000"])
    assert time.process_time() - begun < 60
    assert "1024 GPUs" in capsys.readouterr().out


def test_ways_to_save_memory_keep_the_rules_too(folder: Path) -> None:
    """A DeepSpeed file may name one ZeRO stage, so the other is not planned."""
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    file = str(folder / "plain.yaml")
    config, _, _ = settings_of(file, ["--deepspeed-config", str(folder / "ds.json")])
    made = Planner(config, 1000, Machine(memory=2.52e9, per_node=8), ["deepspeed"]).plan(8)
    assert {each.candidate.config.engine.zero_stage for each in made.layouts} == {1}
    assert not [each for each in made.layouts if problems(each.candidate.config, world_size=8)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "0"], "--gpus = 0: must be at least 1"),
        (["--gpus", "12"], "--gpus = 12: must be divisible by --per-node = 8"),
        (["--gpus", "8", "--gpu-memory", "nan"], "--gpu-memory = nan: must be a finite number"),
        (["--gpus", "8", "--skew", "inf"], "--skew = inf: must be a finite number"),
        (["--gpus", "8", "--gpu-memory", "2"], "--reserve = 2.5: must be at least 0"),
        (["--gpus", "8", "--expert-model-parallel-size", "2"], "is set by this command"),
        (["--gpus", "8", "--hidden-sise", "2"], "--hidden-size"),
        (["--gpus", "8", "--calibration", "nowhere.json"], "--calibration = nowhere.json: cannot be read"),
        (["--gpus", "11", "--per-node", "11"], "--global-batch-size"),
        (["--gpus", "8", "--config", "other.yaml"], "other.yaml"),
    ],
)
def test_bad_input(folder: Path, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["--config", str(folder / "model.yaml"), *flags])
    assert caught.value.exit_status == 2 and words in str(caught.value)


@pytest.mark.parametrize("command", [main, doctor.main])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, command: Callable[[list[str]], None]
) -> None:
    flags = ["--config", str(folder / "model.yaml"), "--gpus", "8"] if command is main else []
    with pytest.raises(ConfigError, match="is not a file"):
        command([*flags, "--json", str(folder)])
    with pytest.raises(ConfigError, match="cannot be written"):
        command([*flags, "--json", str(folder / "model.yaml" / "plan.json")])


@pytest.mark.parametrize("flags", [["--hidden-size", "7"], ["--calibration", "nowhere.json"]])
def test_a_refused_plan_leaves_no_folder(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        main(
            [
                *["--config", str(folder / "model.yaml"), "--gpus", "8"],
                *["--json", str(tmp_path / "new" / "plan.json"), *flags],
            ]
        )
    assert not list(tmp_path.iterdir())


def test_nothing_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(folder / "model.yaml"), "--gpus", "1", "--gpu-memory", "2.5001"])
    told = capsys.readouterr().out
    assert caught.value.code == 1 and "too large for a GPU" in told and "the largest part is" in told


PLANS_OF_DOCS = re.findall(
    r"```bash\nmhr plan (--config examples[^\n]*)\n```\n+```text\n(.*?)```",
    (ROOT / "docs" / "planning.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("flags", "shown"), PLANS_OF_DOCS)
def test_plans_of_the_docs(
    flags: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every line of ``docs/planning.md`` is what the command prints."""
    monkeypatch.chdir(tmp_path)  # where no tokenizer file is
    main(shlex.split(flags.replace("examples/", f"{ROOT}/examples/")))
    printed = capsys.readouterr().out.splitlines()
    assert not [line for line in shown.splitlines() if line not in printed]


def test_the_docs_have_three_plans() -> None:
    assert len(PLANS_OF_DOCS) == 3
