"""The watchdog: heartbeats, which rank is named, and when the run ends."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperrouter.guard import watchdog
from megatron_hyperrouter.guard.heartbeat import (
    Beat,
    Progress,
    file_of,
    read_beats,
    write_beat,
    writes_file,
)
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.stopping import StopRequest
from megatron_hyperrouter.guard.watchdog import Watchdog, apart, describe

BEAT = Beat(0, "node-a", 11, 56, "step", 1000.0, 1300.0, "wait (x.py:3)", waits=True)


def dog(folder: Path, progress: Progress, *, rank: int = 0, limit: float = 10.0, **more: Any) -> Watchdog:
    ended: list[int] = more.pop("ended", [])
    known: dict[str, Any] = {"stop": StopRequest(), "launcher": Launcher(())}
    return Watchdog(
        folder,
        rank=rank,
        world_size=2,
        limit=limit,
        progress=progress,
        end=ended.append,
        **(known | more),
    )


def moved_on(progress: Progress, step: int, ago: float) -> None:
    progress.enter("step", step)
    progress.since -= ago
    progress.moved -= ago


class TestWhoIsNamed:
    def test_a_rank_that_is_a_step_behind(self) -> None:
        assert apart({0: BEAT, 1: replace(BEAT, rank=1, step=55), 2: replace(BEAT, rank=2)}) == [1]

    def test_a_rank_that_waits_for_no_other(self) -> None:
        assert apart({0: BEAT, 1: replace(BEAT, rank=1, phase="data", waits=False)}) == [1]

    def test_a_rank_in_another_phase(self) -> None:
        beats = {rank: replace(BEAT, rank=rank, waits=False) for rank in range(3)}
        beats[2] = replace(beats[2], phase="save")
        assert apart(beats) == [2]

    def test_nobody_where_all_do_the_same(self) -> None:
        assert apart({0: BEAT, 1: replace(BEAT, rank=1)}) == []

    def test_words(self) -> None:
        assert describe(BEAT) == (
            "rank 0 (node-a, pid 11) has been in step 57 (step) for 300 s, at wait (x.py:3)"
        )


class TestRounds:
    def test_a_beat_says_what_the_rank_does(self, tmp_path: Path) -> None:
        progress = Progress()
        progress.enter("save", 7)
        dog(tmp_path, progress).look()
        (path,) = (tmp_path / "heartbeat").iterdir()
        told = json.loads(path.read_text())
        assert (told["rank"], told["pid"], told["step"], told["phase"]) == (0, os.getpid(), 7, "save")
        assert abs(told["time"] - time.time()) < 5

    def test_a_run_that_moves_goes_on(self, tmp_path: Path) -> None:
        progress, ended = Progress(), []
        watch = dog(tmp_path, progress, ended=ended)
        moved_on(progress, 5, ago=4.0)
        watch.look()
        assert not ended

    def test_a_silent_rank_is_named_and_the_run_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(watchdog, "_LAST_WORDS", 0.0)
        clock = 500.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock)
        progress, ended = Progress(), []
        watch = dog(tmp_path, progress, ended=ended)
        (tmp_path / "heartbeat").mkdir()
        write_beat(tmp_path / "heartbeat", replace(BEAT, rank=1))
        moved_on(progress, 56, ago=0.0)
        watch.look()
        clock += 8
        moved_on(progress, 56, ago=6.0)
        watch.look()
        assert not ended and "no progress: rank 1 (node-a, pid 11)" in capfd.readouterr().err
        clock += 2
        moved_on(progress, 56, ago=9.5)
        watch.look()
        told = capfd.readouterr().err
        assert ended == [1]
        assert "rank 1 (node-a, pid 11) has been in step 57" in told and "silent for 10 s" in told
        assert "test_guard_watchdog.py" in told  # the stacks of this process

    def test_the_second_rank_speaks_where_the_first_is_silent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(watchdog, "_LAST_WORDS", 0.0)
        clock = 500.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock)
        progress, ended = Progress(), []
        watch = dog(tmp_path, progress, rank=1, ended=ended)
        (tmp_path / "heartbeat").mkdir()
        write_beat(tmp_path / "heartbeat", BEAT)
        watch.look()
        clock += 9.5
        moved_on(progress, 56, ago=9.5)
        watch.look()
        assert ended == [1] and "rank 0 (node-a, pid 11)" in capfd.readouterr().err

    def test_the_first_step_may_take_long(self, tmp_path: Path) -> None:
        progress, ended = Progress(), []
        watch = dog(tmp_path, progress, ended=ended)
        moved_on(progress, 0, ago=1000.0)
        watch.look()
        assert not ended

    def test_a_clock_that_is_set_is_no_hang(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        progress, ended = Progress(), []
        watch = dog(tmp_path, progress, ended=ended)
        moved_on(progress, 56, ago=0.0)
        now = time.time()
        monkeypatch.setattr(watchdog.time, "time", lambda: now + 3600)
        watch.look()
        assert not ended

    def test_a_launcher_that_died_is_a_request_to_stop(self, tmp_path: Path) -> None:
        request, progress = StopRequest(), Progress()
        progress.enter("step", 1)
        dog(tmp_path, progress, stop=request, launcher=Launcher(((os.getpid(), -1),))).look()
        assert request.reason == "the end of the launcher"

    def test_a_folder_that_cannot_be_written_is_one_warning(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "heartbeat").write_text("in the way")
        progress = Progress()
        progress.enter("step", 1)
        watch = dog(tmp_path, progress)
        watch.look()
        watch.look()
        assert capfd.readouterr().err.count("heartbeats cannot be written to ") == 1


class TestProgress:
    def test_phases_of_micro_batches(self) -> None:
        progress = Progress()
        phases = [progress.phase for _ in progress.through([1, 2], "data", "step", 3)]
        assert phases == ["step", "step"] and progress.phase == "step" and progress.step == 3

    def test_reading_shows_that_the_run_moves(self) -> None:
        progress = Progress()
        progress.enter("evaluation of valid", 3)
        progress.since = 0.0
        assert progress.of_reading([5, 6])[1] == 6
        assert progress.since > 0 and progress.phase == "evaluation of valid"


def test_beats_of_an_earlier_attempt_on_more_ranks_name_nobody(tmp_path: Path) -> None:
    for rank in (1, 3):
        write_beat(tmp_path, replace(BEAT, rank=rank))
    file_of(tmp_path, 0).write_text(json.dumps({**asdict(BEAT), "step": "many"}))
    assert set(read_beats(tmp_path, 2)) == {1} and set(read_beats(tmp_path)) == {1, 3}


def test_a_file_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Path, pattern: str) -> None:
        raise OSError(116, "Stale file handle")

    write_beat(tmp_path, BEAT)
    monkeypatch.setattr(Path, "glob", stale)
    assert read_beats(tmp_path) == {}


def test_files_of_few_and_of_many_ranks(tmp_path: Path) -> None:
    assert writes_file(63, 64, 7)
    assert writes_file(64, 128, 0) and not writes_file(65, 128, 1)
    write_beat(tmp_path, BEAT)
    file_of(tmp_path, 1).write_text('{"rank": 1')
    assert read_beats(tmp_path) == {0: BEAT}
