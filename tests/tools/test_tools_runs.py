"""The runs of a study: processes in order, no more at a time than --jobs, and one failure ends
all of them.
"""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from program.settings import TINY

from megatron_hyperrouter.errors import ConfigError, DataError, HyperRouterError

pytestmark = pytest.mark.processes

NOTE = (
    "import sys, time; print(sys.argv[1], 'begins', flush=True); time.sleep(0.3); print(sys.argv[1], 'ends')"
)


@pytest.fixture
def runs() -> Any:
    from megatron_hyperrouter.studies import runs

    return runs


def plan_of(runs: Any, folder: Path, commands: list[tuple[str, list[str]]]) -> Any:
    from megatron_hyperrouter.config.cli import parse
    from megatron_hyperrouter.routers import ROUTERS

    @dataclass(frozen=True)
    class Told(runs.StudyRun):  # type: ignore[name-defined,misc]
        commands: list[tuple[str, list[str]]] = field(default_factory=list)

        def stages(self) -> list[Any]:
            return [runs.RunProcess(what, command) for what, command in self.commands]

    config = parse([*TINY, "--data-path", "x", "--run-dir", str(folder)], routers=ROUTERS)
    return Told(folder, config, {"settings": runs.digest_of(config, {})}, commands)


def test_stages_come_in_order_and_runs_one_at_a_time(
    runs: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "all.txt"
    code = f"import sys; file = open({str(log)!r}, 'a'); sys.stdout = file; exec({NOTE!r})"
    plans = [
        plan_of(runs, tmp_path / name, [(part, ["-c", code, name + part]) for part in "xy"]) for name in "ab"
    ]
    runs.run_all(plans, 1)
    words = [f"{name}{part} {what}" for name in "ab" for part in "xy" for what in ("begins", "ends")]
    assert log.read_text().splitlines() == words
    assert capfd.readouterr().err.splitlines() == [
        "a: started; 0 of 2 runs are finished",
        "b: started; 1 of 2 runs are finished",
    ]
    assert json.loads((tmp_path / "a" / "task.json").read_text()) == plans[0].task


def test_a_failure_ends_the_others_and_nothing_more_starts(runs: Any, tmp_path: Path) -> None:
    waits = [
        "-c",
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved'))); "
        "time.sleep(60)",
    ]
    fails = ["-c", "import time; time.sleep(0.5); print('no data'); raise SystemExit(3)"]
    plans = [
        plan_of(runs, tmp_path / name, [("scoring", command)])
        for name, command in (("a", waits), ("b", fails), ("c", waits))
    ]
    with pytest.raises(
        HyperRouterError,
        match=r"b: scoring ended with exit status 3\n--- end of the log of this run\nno data",
    ):
        runs.run_all(plans, 2)
    assert (tmp_path / "a" / "log.txt").read_text() == "saved\n"
    assert not (tmp_path / "c").exists()


def test_training_that_somebody_has_stopped_is_not_scored(runs: Any, tmp_path: Path) -> None:
    plan = plan_of(
        runs, tmp_path / "a", [("training", ["-c", "pass"]), ("scoring", ["-c", "print('scored')"])]
    )
    with pytest.raises(HyperRouterError, match="a: training was stopped before its last step"):
        runs.run_all([plan], 1)
    assert (tmp_path / "a" / "log.txt").read_text() == ""


def test_training_that_was_asked_to_stop_says_so(runs: Any, tmp_path: Path) -> None:
    plan = plan_of(runs, tmp_path / "a", [("training", ["-c", "raise SystemExit(6)"])])
    with pytest.raises(HyperRouterError, match="a: training was stopped before its last step"):
        runs.run_all([plan], 1)


def test_steps_of_a_run_are_those_of_its_metrics(runs: Any, tmp_path: Path) -> None:
    plan = plan_of(runs, tmp_path / "a", [])
    assert runs.trained_steps(plan) == 0
    plan.folder.mkdir()
    lines = [json.dumps({"step": step, "lm_loss": 1.0}) for step in range(1, 4)]
    (plan.folder / "metrics.jsonl").write_text("\n".join([*lines, '{"st']))
    assert runs.trained_steps(plan) == 3


def test_runs_of_other_settings_are_strangers(runs: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    plans = [plan_of(runs, tmp_path / name, []) for name in "ab"]
    for plan in plans:
        runs.write_plan(plan)
    runs.check_finished(plans)
    with pytest.raises(
        ConfigError, match="b: contains a run that was started with different settings"
    ) as caught:
        runs.check_finished([plans[0], replace(plans[1], task={"settings": "another"})])
    assert len(caught.value.problems) == 1


def test_several_ranks_are_torchrun(runs: Any) -> None:
    assert runs.on_ranks(["x.py", "--y"], 1) == ["x.py", "--y"]
    words = runs.on_ranks(["x.py", "--y"], 4)
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"] and words[
        -2:
    ] == ["x.py", "--y"]
    patience = float(words[words.index("--shutdown-timeout") + 1])
    assert 0 < patience < runs.SECONDS_TO_SAVE
    assert sys.executable not in words  # run_all puts it in front


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_damaged_files_of_a_study_are_named(runs: Any, tmp_path: Path, content: str) -> None:
    plan = plan_of(runs, tmp_path / "a", [])
    runs.write_plan(plan)
    (plan.folder / "task.json").write_text(content)
    with pytest.raises(DataError, match=r"a/task\.json cannot be read: it"):
        runs.check_finished([plan])


def test_a_folder_that_cannot_be_written_and_a_full_disk(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in (("file", "is not a folder"), ("file/x/y", "file is not a folder")):
        with pytest.raises(ConfigError, match=says), runs.filling(tmp_path / path):
            pass
    with runs.filling(tmp_path / "new" / "study"):
        assert not (tmp_path / "new").exists()
    with (
        pytest.raises(HyperRouterError, match="study cannot be written: no space"),
        runs.filling(tmp_path / "study"),
    ):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(BrokenPipeError), runs.filling(tmp_path / "study"):
        raise BrokenPipeError(errno.EPIPE, "the reader is gone")


def test_runs_share_the_cores_that_the_study_may_use(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    tell = "import os; print(os.environ['OMP_NUM_THREADS'])"
    runs.run_all([plan_of(runs, tmp_path / "a", [("scoring", ["-c", tell])])], 3)
    assert (tmp_path / "a" / "log.txt").read_text() == "2\n"


def test_simultaneous_runs_use_different_gpus(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends late, so the second and the third run have the other GPU one after the other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,-1,0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # -1 ends the list
    tell = "import os, pathlib, time; print(os.environ['CUDA_VISIBLE_DEVICES']); "
    end = str(tmp_path / "c" / "log.txt")
    wait = f"end = pathlib.Path({end!r})\nwhile not end.exists() or not end.read_text(): time.sleep(0.05)"
    plans = [
        plan_of(runs, tmp_path / name, [("scoring", ["-c", tell + "\n" + (wait if name == "a" else "")])])
        for name in "abc"
    ]
    runs.run_all(plans, 2)
    assert [(plan.folder / "log.txt").read_text() for plan in plans] == ["3\n", "5\n", "5\n"]


def test_gpus_of_a_slot(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [runs.gpus_of_slot(slot, 2).get("CUDA_VISIBLE_DEVICES") for slot in range(4)]
    assert found == ["0,1", "2,3", "0,1", "2,3"]
    assert runs.gpus_of_slot(1, 3) == {}  # one run at a time fits
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert runs.gpus_of_slot(1, 1) == {}
