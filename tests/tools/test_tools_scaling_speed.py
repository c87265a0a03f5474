"""The speed study: tiny runs on one and two ranks, numbers against loops, what it submits and collects, and
what is refused.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from distributed import REPOSITORY, environment
from program.launched import PROGRAM, Zygote, metrics
from program.settings import TINY_MODEL, write_text

TOOL = REPOSITORY / "tools" / "scaling_study.py"
SETTINGS = f"""{TINY_MODEL}micro_batch_size: 2
moe_router_topk: 2
topk_schedule: linear
topk_start: 1
router: {{name: hyper}}
lr_warmup_iters: 2000
train_iters: 100000
split: 8,1,1
num_workers: 0
"""
WARMUP, STEPS, SEQ = 1, 3, 16
LAYOUTS = ["--ranks", "1", "2", "--layouts", "", "ep=2"]


def words_of(folder: Path, *arguments: object, settings: str = SETTINGS) -> list[str]:
    (folder / "run.yaml").write_text(settings, encoding="utf-8")
    words = [
        "speed",
        "--config",
        folder / "run.yaml",
        "--output",
        folder / "out",
        "--data-path",
        folder / "text",
        *arguments,
    ]
    return [str(word) for word in words]


def rows(path: Path) -> list[Mapping[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def submitted(job: Any) -> list[tuple[list[str], dict[str, Any]]]:
    """(words, settings of the run) of each line that --dry-run printed."""
    lines = [shlex.split(line) for line in job.stdout.splitlines()]
    return [(line, yaml.safe_load(Path(line[line.index("--config") + 1]).read_text())) for line in lines]


class Study(NamedTuple):
    """A finished study on this machine."""

    folder: Path
    arguments: list[str]
    out: str


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("speed")
    write_text(folder / "text")
    words = words_of(folder, *LAYOUTS, "--warmup", WARMUP, "--steps", STEPS, "--repeats", 1)
    ended = subprocess.run(
        [sys.executable, str(TOOL), *words], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    return Study(folder, words, ended.stdout)


@pytest.mark.processes
@pytest.mark.slow
def test_the_table_against_the_metrics_of_the_runs(study: Study) -> None:
    found = rows(study.folder / "out" / "runs.csv")
    assert [(row["ranks"], row["layout"]) for row in found] == [("1", "dp"), ("2", "dp"), ("2", "ep=2")]
    speeds = []
    for row in found:
        ranks = int(row["ranks"])
        run = study.folder / "out" / "runs" / f"ranks={ranks},{row['layout']}-run1"
        records = metrics(run, times=True)
        # and nothing was evaluated
        assert [record["step"] for record in records] == list(range(1, WARMUP + STEPS + 1))
        assert {record["topk"] for record in records} == {2}
        # weak: as many samples for each rank
        assert records[-1]["consumed_tokens"] == (WARMUP + STEPS) * 2 * ranks * SEQ
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["expert_model_parallel_size"] == (2 if row["layout"] == "ep=2" else 1)
        timed = records[WARMUP:]
        step_time = statistics.median(record["step_time"] for record in timed)
        assert float(row["step_time"]) == step_time
        assert float(row["tokens_per_second"]) == pytest.approx(2 * ranks * SEQ / step_time)
        assert float(row["tokens_per_second_per_rank"]) == pytest.approx(2 * SEQ / step_time)
        assert float(row["data_share"]) == statistics.median(
            record["data_time"] / record["step_time"] for record in timed
        )
        speeds.append(2 * SEQ / step_time)
        assert float(row["efficiency"]) == pytest.approx(speeds[-1] / speeds[0])
        assert not (run / "checkpoints").exists()
    assert study.out == (study.folder / "out" / "table.md").read_text(encoding="utf-8")
    assert "do not apply to a cluster" in study.out
    assert (
        "Layout ep=2 was not run on 1 rank, because it breaks a rule: --expert-model-parallel-size: must "
        "divide the number of data-parallel ranks, 1 " in study.out
    )
    calibration = json.loads((study.folder / "out" / "calibration.json").read_text(encoding="utf-8"))
    (processor,) = calibration["measured"]["devices"]
    assert f": {processor}\n" in Path("/proc/cpuinfo").read_text() or processor == platform.machine()
    pytest.importorskip("matplotlib")
    assert (study.folder / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
@pytest.mark.slow
def test_finished_runs_stay_and_more_repetitions_are_submitted_and_collected(
    study: Study, zygote: Zygote
) -> None:
    again = zygote.run(study.arguments, program=TOOL)
    assert again.stdout == study.out and "started" not in again.stderr
    more = [*study.arguments[:-1], "2"]
    jobs = submitted(zygote.run([*more, "--dry-run"], program=TOOL))
    names = [Path(settings["run_dir"]).name for _, settings in jobs]
    # the other way round, what is finished left out
    assert names == [
        "ranks=2,ep=2-run2",
        "ranks=2,dp-run2",
        "ranks=1,dp-run2",
    ]
    for words, _ in jobs[:2]:
        assert words[1:4] == [f"--job-name={names[jobs.index((words, _))]}", "--nodes=1", "--gpus-per-node=2"]
    # what the job does
    zygote.run(jobs[0][0][jobs[0][0].index("examples/cluster/slurm.sh") + 1 :], program=PROGRAM, ranks=2)
    partly = zygote.run([*more, "--collect"], program=TOOL)
    assert partly.stderr.count("not finished: ") == 2
    assert [row["runs"] for row in rows(study.folder / "out" / "table.csv")] == ["1", "1", "2"]
    assert "under Slurm" in partly.stdout
    other = zygote.run([*study.arguments, "--hidden-size", "64"], program=TOOL, expect=2)
    assert other.stderr.count("contains a run that was started with different settings") == 3


def test_rows_take_turns_and_quiet_settings(zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(
        words_of(tmp_path, "--ranks", 16, 8, "--repeats", 2, "--dry-run", "--gpus-per-node", 4), program=TOOL
    )
    jobs = submitted(job)
    found = [(words[2], Path(settings["run_dir"]).name) for words, settings in jobs]
    assert found == [
        ("--nodes=2", "ranks=8,as_in_--config-run1"),
        ("--nodes=4", "ranks=16,as_in_--config-run1"),
        ("--nodes=4", "ranks=16,as_in_--config-run2"),
        ("--nodes=2", "ranks=8,as_in_--config-run2"),
    ]
    for words, settings in jobs:
        assert words[words.index("--load") + 1] == "none"
        quiet = (
            "eval_interval",
            "save_interval",
            "topk_schedule",
            "topk_start",
            "train_iters",
            "lr_warmup_iters",
            "lr_decay_style",
        )
        assert [settings[name] for name in quiet] == [0, 0, "constant", None, 25, 0, "constant"]


BATCHES: dict[str, tuple[list[str], list[int]]] = {
    "weak": (["--ranks", "2", "4", "8", "--global-batch-size", "12"], [12, 24, 48]),
    "weak by default": (["--ranks", "2", "4", "8"], [4, 8, 16]),
    "weak with tensor parallelism": (["--ranks", "2", "4", "--layouts", "", "tp=2"], [4, 4, 8, 8]),
    "strong": (["--ranks", "2", "4", "8", "--scaling", "strong", "--global-batch-size", "48"], [48, 48, 48]),
    "ranks of the layouts": (
        ["--layouts", "pp=2,ep=2", "dp=2", "cp=2,dp=2", "--engine", "megatron"],
        [4, 8, 8],
    ),
}


@pytest.mark.parametrize(("arguments", "batches"), BATCHES.values(), ids=BATCHES)
def test_what_the_ranks_share(
    zygote: Zygote, tmp_path: Path, arguments: list[str], batches: list[int]
) -> None:
    jobs = submitted(zygote.run(words_of(tmp_path, *arguments, "--repeats", 1, "--dry-run"), program=TOOL))
    assert [settings["global_batch_size"] for _, settings in jobs] == batches


def test_efficiency_is_taken_in_each_repetition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine is half as fast in the second repetition: speeds spread, efficiency does not."""
    from megatron_hyperrouter.config.cli import parse
    from megatron_hyperrouter.routers import ROUTERS
    from megatron_hyperrouter.studies.speed import TimedLayout
    from megatron_hyperrouter.studies.speed_tables import write_results

    plans = []
    for number, slow in ((1, 1.0), (2, 2.0)):
        for ranks, seconds in ((1, 0.1), (2, 0.125)):
            folder = tmp_path / f"{ranks}-{number}"
            folder.mkdir()
            told = {
                "tokens_per_step": 100 * ranks,
                "step_time": seconds * slow,
                "data_share": 0.01,
                "peak_memory": ranks * 2.0**30,
            }
            told |= {
                "tokens_per_second": 100 * ranks / seconds / slow,
                "tokens_per_second_per_rank": 100 / seconds / slow,
            }
            (folder / "results.json").write_text(json.dumps({**told, "started": "under Slurm"}))
            config = parse(["--mock-data"], routers=ROUTERS, world_size=ranks)
            row = TimedLayout(ranks, "dp")
            plans.append(Namespace(folder=folder, row=row, number=number, config=config))
    write_results(
        plans,
        [TimedLayout(2, "ep=4", refused="no")],
        Namespace(output=tmp_path, scaling="weak", steps=3, warmup=1, gpus_per_node=8),
    )
    one, two = rows(tmp_path / "table.csv")
    assert (
        float(one["efficiency"]),
        float(two["efficiency"]),
        float(two["efficiency_half95"]),
    ) == pytest.approx((1.0, 0.8, 0.0))
    assert float(two["tokens_per_second"]) == pytest.approx((1600 + 800) / 2)
    one_degree = 12.7062047364  # of freedom, from a printed table
    assert float(two["tokens_per_second_half95"]) == pytest.approx(
        one_degree * 800 / math.sqrt(2) / math.sqrt(2), rel=1e-9
    )
    out = capsys.readouterr().out
    assert "| 2 | dp | 200 |" in out and "0.800 ± 0.000" in out and "| 2.00 ± 0.00 |" in out
    assert "Layout ep=4 was not run on 2 ranks, because it breaks a rule: no." in out
    assert "do not apply to a cluster" not in out


def test_measures_of_one_run_by_hand() -> None:
    from megatron_hyperrouter.studies.speed import measures

    times = [(0.5, 0.1, 10.0), (0.25, 0.1, 30.0), (1.0, 0.1, 20.0)]
    told = measures(
        [
            {"step_time": s, "data_time": d, "tokens_per_second": 64 / s, "peak_memory_bytes": m}
            for s, d, m in times
        ],
        4,
    )
    assert told == {
        "tokens_per_step": 64,
        "step_time": 0.5,
        "tokens_per_second": 128.0,
        "tokens_per_second_per_rank": 32.0,
        "data_share": 0.2,
        "peak_memory": 30.0,
    }


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hyperrouter.errors import ConfigError
    from megatron_hyperrouter.studies import speed

    for gpus in (0, 4, 8):
        monkeypatch.setattr(speed, "gpus_here", lambda gpus=gpus: gpus)
        speed.check_start(4)
    monkeypatch.setattr(speed, "gpus_here", lambda: 2)
    with pytest.raises(
        ConfigError, match="--ranks = 4: must be at most 2, the number of GPUs of this machine"
    ):
        speed.check_start(4)


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing asked for": ([], "--ranks or --layouts: one of the two is required"),
    "no rank": (["--ranks", "1", "0"], "--ranks = 1 0: must be at least 1"),
    "no step": (["--ranks", "1", "--steps", "0"], "--steps = 0: must be at least 1"),
    "no such size": (["--layouts", "xp=2"], "xp is not a setting"),
    "a fault": (["--layouts", "ep=2,fault=aux-loss"], "must not set fault"),
    "steps of a layout": (["--layouts", "ep=2,train_iters=4"], "must not set train_iters"),
    "no digit": (["--layouts", "ep=\u00b2"], "must be an integer of at least 1"),
    "two sizes": (["--layouts", "ep=2,ep=4"], "ep must have one value"),
    "nothing can run": (["--ranks", "3", "--layouts", "tp=2"], "must be divisible by"),
    "strong without a batch": (
        ["--ranks", "1", "2", "--scaling", "strong"],
        "must be given with --scaling strong",
    ),
    "steps as a flag": (["--ranks", "1", "--train-iters", "4"], "--train-iters: is set by this command"),
    "skipped steps": (["--ranks", "1", "--skip-steps", "2"], "--skip-steps: is set by this command"),
    "a layout twice": (
        ["--layouts", "ep=2", "--expert-model-parallel-size", "4"],
        "cannot be combined with --layouts",
    ),
    "an unknown flag": (["--ranks", "1", "--no-such-flag", "1"], "unknown flag"),
    "nothing to collect": (["--ranks", "1", "--collect"], "none of the 3 runs of this study is finished"),
    "half a node": (
        ["--ranks", "12", "--dry-run"],
        "must be at most --gpus-per-node = 8, or divisible by it",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_ends_with_status_2_before_anything_starts(
    tmp_path: Path, zygote: Zygote, arguments: list[str], says: str
) -> None:
    job = zygote.run(words_of(tmp_path, *arguments), program=TOOL, expect=2)
    assert says in job.stderr
    assert "Traceback" not in job.stderr
    assert not (tmp_path / "out").exists()


def test_a_rank_of_a_launcher_starts_no_ranks(tmp_path: Path, zygote: Zygote) -> None:
    job = zygote.run(words_of(tmp_path, "--ranks", 1), program=TOOL, launched=True, expect=2)
    assert "a launcher: must not start this command" in job.stderr
    assert not (tmp_path / "out").exists()


def test_the_study_has_to_be_named(zygote: Zygote) -> None:
    assert "study: must be given" in zygote.run([], program=TOOL, expect=2).stderr
    assert "study = lose: must be one of" in zygote.run(["lose"], program=TOOL, expect=2).stderr
    for study, flag in (("loss", "--curve-for"), ("speed", "--scaling")):
        assert flag in zygote.run([study, "--help"], program=TOOL).stdout
