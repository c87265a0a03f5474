"""States and errors without a real run: files written by hand, with chosen times."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import environment

from megatron_hyperrouter.errors import ConfigError, DataError
from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.guard.heartbeat import Beat, file_of, write_beat
from megatron_hyperrouter.guard.run_lock import HOLDER, LOCK
from megatron_hyperrouter.report.sources import read_run
from megatron_hyperrouter.watch.restart import worth_restarting
from megatron_hyperrouter.watch.status import Status, status_of
from megatron_hyperrouter.watch.trace import read_steps, read_trace
from megatron_hyperrouter.watch.words import duration, lines_of


def write_events(run_dir: Path, *events: dict[str, Any]) -> None:
    run_dir.mkdir(exist_ok=True)
    lines = [json.dumps({"step": 0, "attempt": 1, **event}) for event in events]
    (run_dir / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write_steps(run_dir: Path, steps: int, seconds: float = 2.0) -> None:
    lines = [
        {"step": step, "lm_loss": 1.0, "step_time": seconds, "tokens_per_second": 50.0}
        for step in range(1, steps + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_beats(run_dir: Path, now: float, *facts: dict[str, Any]) -> None:
    """``ago``: seconds since the beat; ``still``: seconds without progress when it was written."""
    folder = run_dir / "heartbeat"
    folder.mkdir(exist_ok=True)
    for rank, fact in enumerate(facts):
        at = now - fact.get("ago", 0.0)
        beat = Beat(
            rank,
            f"node{rank}",
            7,
            fact.get("step", 5),
            "step",
            at - fact.get("still", 0.1),
            at,
            "f (x.py:1)",
            waits=fact.get("waits", True),
        )
        write_beat(folder, beat)
        os.utime(file_of(folder, rank), (at, at))


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """As a run holds its folder."""
    with (run_dir / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def now(run_dir: Path) -> Status:
    return status_of(read_trace(run_dir))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks that began 100 s ago and has taken 10 of 40 steps."""
    folder = tmp_path / "run"
    write_events(folder, {"event": "start", "time": time.time() - 100, "total": 40, "world_size": 2})
    write_steps(folder, 10)
    return folder


class TestState:
    def test_speed_and_eta(self, run_dir: Path) -> None:
        write_beats(run_dir, time.time(), {}, {})
        with held(run_dir):
            status = now(run_dir)
        assert (status.state, status.step, status.total, status.speed) == ("running", 10, 40, 50.0)
        # 30 steps of 2 s are left, and of the 100 s so far 20 were spent in steps
        assert status.eta == pytest.approx(30 * 2 * 100 / 20, rel=0.01)
        assert status.goodput == pytest.approx(20 / 100, rel=0.01)

    @pytest.mark.parametrize(
        ("beats", "named"),
        [
            ([{}, {"ago": 45}], "rank 1 (node1, pid 7)"),  # says nothing any more
            ([{"still": 70}, {"still": 70, "waits": False}], "rank 1 (node1, pid 7)"),  # waits for nobody
            ([{"still": 70, "step": 4}, {"still": 70}], "rank 0 (node0, pid 7)"),  # is a step behind
        ],
    )
    def test_hung(self, run_dir: Path, beats: list[dict[str, Any]], named: str) -> None:
        write_beats(run_dir, time.time(), *beats)
        with held(run_dir):
            status = now(run_dir)
        assert status.state == "hung" and len(status.late) == 1 and named in status.late[0], status
        assert status.eta is None

    def test_a_long_step_is_no_hang(self, run_dir: Path) -> None:
        """Ten usual steps may pass; and the first step of an attempt may compile for half an hour."""
        write_steps(run_dir, 10, seconds=30.0)
        write_beats(run_dir, time.time(), {"still": 250}, {"still": 250})
        with held(run_dir):
            assert now(run_dir).state == "running"
            write_steps(run_dir, 0)
            write_beats(run_dir, time.time(), {"still": 250, "step": 0}, {"still": 250, "step": 0})
            assert now(run_dir).state == "running"

    def test_beats_of_an_earlier_attempt_do_not_count(self, run_dir: Path) -> None:
        """It had more ranks, and has left their files."""
        write_beats(run_dir, time.time(), {}, {}, {"ago": 50}, {"ago": 5000})
        with held(run_dir):
            assert now(run_dir).state == "running"

    def test_a_rank_whose_data_are_late(self, run_dir: Path) -> None:
        alarm = {"event": "alarm", "alarm": "late_data", "rank": 1, "value": 0.4, "since": 3, "step": 22}
        opening = {"event": "start", "time": time.time() - 100, "total": 40, "world_size": 2}
        write_events(run_dir, opening, alarm | {"time": time.time()})
        write_beats(run_dir, time.time(), {}, {})
        with held(run_dir):
            status = now(run_dir)
        assert status.state == "running"
        assert status.late == [
            "rank 1 (node1): all ranks waited for the data of this rank, for 40% of the time of steps 3 to 22"
        ]

    def test_a_rank_that_computes_slowly(self, run_dir: Path) -> None:
        """The newest alarm counts, of this attempt; the rank needs no heartbeat file."""
        alarm = {"event": "alarm", "alarm": "slow_rank", "value": 1.5, "since": 3, "step": 22, "rank": 100}
        opening = {"event": "resume", "time": time.time() - 100, "total": 40, "world_size": 128}
        newest = alarm | {"value": 1.31, "since": 523, "step": 542, "host": "node7", "more": 3}
        write_events(run_dir, opening, alarm | {"time": time.time()}, newest | {"time": time.time()})
        write_beats(run_dir, time.time(), {}, {})
        with held(run_dir):
            status = now(run_dir)
            write_events(run_dir, alarm | {"time": time.time() - 200}, opening)
            assert now(run_dir).late == []
            later = newest | {"time": time.time()}
            write_events(run_dir, opening, later, {"event": "save", "time": time.time(), "step": 1100})
            write_steps(run_dir, 1100)
            assert now(run_dir).late == []  # not named again: the rank has recovered
        assert status.state == "running"
        assert status.late == [
            "rank 100 (node7): all ranks waited for this rank, because in steps 523 to 542, it took 1.31 "
            "times as long as the median rank for the same work; 3 more ranks are late as well"
        ]

    def test_a_new_attempt_that_is_starting(self, run_dir: Path) -> None:
        begun = time.time() - 100
        write_events(run_dir, {"event": "start", "time": begun}, {"event": "stop", "time": begun + 50})
        assert now(run_dir).state == "stopped"
        (run_dir / HOLDER).write_text('{"host": "elsewhere", "pid": 1}')
        with held(run_dir):
            assert now(run_dir).state == "running" and "starting" in now(run_dir).reason

    def test_locks_that_this_machine_cannot_see(self, run_dir: Path) -> None:
        """The run is on another machine: it is alive as long as it beats."""
        (run_dir / HOLDER).write_text('{"host": "elsewhere", "pid": 1}')
        (run_dir / LOCK).touch()
        write_beats(run_dir, time.time(), {}, {})
        assert now(run_dir).state == "running"
        write_beats(run_dir, time.time(), {"ago": 40}, {"ago": 40})
        assert now(run_dir).state == "failed"

    def test_the_first_failure_is_the_cause(self, run_dir: Path) -> None:
        write_events(
            run_dir,
            {"event": "start", "time": 1.0},
            {"event": "failure", "time": 2.0, "error": "DataError", "message": "cut", "status": 3, "rank": 5},
            {
                "event": "failure",
                "time": 3.0,
                "error": "RuntimeError",
                "message": "closed by peer",
                "status": 1,
            },
        )
        status = now(run_dir)
        assert (status.state, status.exit_status, status.reason) == ("failed", 3, "rank 5: DataError: cut")

    def test_a_run_that_ended_before_its_first_event(self, tmp_path: Path) -> None:
        (tmp_path / LOCK).touch()
        assert now(tmp_path).state == "failed"
        with held(tmp_path):
            assert now(tmp_path).state == "running"


class TestRestart:
    """What a job script asks before it puts a job back into the queue."""

    @pytest.mark.parametrize(
        ("closing", "launcher", "answer"),
        [
            ({"event": "end", "status": 0}, 0, False),
            ({"event": "stop", "status": 6}, 6, True),
            ({"event": "stop", "status": 6}, 1, True),  # torchrun makes 1 of everything
            ({"event": "stop", "status": 6}, 143, True),
            ({"event": "failure", "status": 1}, 1, True),
            ({"event": "failure", "status": 4}, 4, True),
            ({"event": "failure", "status": 3}, 137, False),  # the launcher killed the other ranks
            ({"event": "failure", "status": 5}, 1, False),
            (None, 137, True),
            (None, 2, False),  # of a start that was refused, before its first event
            (None, 3, False),
        ],
    )
    def test_by_what_the_run_and_the_launcher_say(
        self, run_dir: Path, closing: dict[str, Any] | None, launcher: int, answer: bool
    ) -> None:
        events = [{"event": "start", "time": 1.0}, *([closing | {"time": 2.0}] if closing else [])]
        write_events(run_dir, *events)
        assert worth_restarting(run_dir, launcher)[0] is answer

    @pytest.mark.parametrize(
        ("alarm", "answer"),
        [
            ({"alarm": "collapse", "action": "stop"}, False),
            ({"alarm": "collapse", "action": "note"}, True),
            ({"alarm": "replicas", "action": "stop"}, True),
        ],
    )
    def test_by_the_alarm_that_ended_the_run(
        self, run_dir: Path, alarm: dict[str, Any], answer: bool
    ) -> None:
        start, failure = {"event": "start", "time": 1.0}, {"event": "failure", "time": 3.0, "status": 1}
        write_events(run_dir, start, {"event": "alarm", "time": 2.0} | alarm, failure)
        assert worth_restarting(run_dir, 1)[0] is answer
        write_events(run_dir, start, {"event": "alarm", "time": 2.0} | alarm, start, failure)
        assert worth_restarting(run_dir, 1)[0] is True

    def test_a_run_on_another_machine_that_was_killed_just_now(self, run_dir: Path) -> None:
        """Its last beats are fresh, but its launcher says that it has ended."""
        (run_dir / HOLDER).write_text('{"host": "elsewhere", "pid": 1}')
        (run_dir / LOCK).touch()
        write_beats(run_dir, time.time(), {}, {})
        assert now(run_dir).state == "running"
        assert worth_restarting(run_dir, 137)[0] is True

    def test_attempts_that_get_no_further(self, run_dir: Path) -> None:
        opening = {"event": "resume", "time": 1.0, "step": 100}
        write_events(run_dir, {"event": "start", "time": 1.0}, opening, opening)
        assert worth_restarting(run_dir, 1)[0] is True
        write_events(run_dir, {"event": "start", "time": 1.0}, opening, opening, opening)
        assert worth_restarting(run_dir, 1) == (
            False,
            "3 attempts in a row started after step 100, and none of them saved a later checkpoint",
        )
        write_events(run_dir, opening, opening, {**opening, "step": 120})
        assert worth_restarting(run_dir, 1)[0] is True

    @pytest.mark.parametrize(
        ("recorded", "now", "answer"),
        [
            ("SLURM_JOB_ID=7", {"SLURM_JOB_ID": "7"}, True),
            ("SLURM_JOB_ID=7 SLURM_RESTART_COUNT=4", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "4"}, True),
            ("SLURM_JOB_ID=7 SLURM_RESTART_COUNT=4", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "6"}, True),
            (
                "SLURM_JOB_ID=7 SLURM_RESTART_COUNT=4",
                {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "7"},
                False,
            ),
            ("SLURM_JOB_ID=6 SLURM_RESTART_COUNT=4", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
            (
                "SLURM_JOB_ID=6 SLURM_RESTART_COUNT=4",
                {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"},
                False,
            ),
        ],
    )
    @pytest.mark.parametrize("stopped", [True, False])
    def test_attempts_that_end_before_their_first_event(
        self, run_dir: Path, recorded: str, now: dict[str, str], answer: bool, stopped: bool
    ) -> None:
        """They leave nothing but Slurm's count: what an earlier attempt recorded must not speak for them."""
        job, *count = recorded.split()
        opening = {"event": "start", "time": 1.0, "job": job, "launcher_restarts": "".join(count)}
        write_events(run_dir, opening, *([{"event": "stop", "time": 2.0, "status": 6}] if stopped else []))
        assert worth_restarting(run_dir, 1, environ=now)[0] is answer

    def test_before_the_first_event(self, tmp_path: Path) -> None:
        (tmp_path / LOCK).touch()
        assert worth_restarting(tmp_path, 1)[0] is False


class TestBadInput:
    def test_no_run(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ConfigError, match="RUN = "):
                read_trace(folder)

    @pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
    @pytest.mark.parametrize("content", [b"\x00\xff\x80 not json\n", b"[1, 2]\n"])
    def test_a_file_of_something_else(self, run_dir: Path, name: str, content: bytes) -> None:
        (run_dir / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_trace(run_dir)

    def test_damaged_lines_are_reported(self, run_dir: Path) -> None:
        with (run_dir / "events.jsonl").open("a") as file:
            file.write('{"event": "sa\n{"event": "stop", "time": 5, "step": 10, "attempt": 1}\n{"ev')
        status = now(run_dir)
        assert status.state == "stopped" and status.notes == [
            "events.jsonl: lines 2, 4 cannot be read and are ignored"
        ]

    def test_messages_and_statuses_of_the_command(self, run_dir: Path, tmp_path: Path) -> None:
        def command(*words: object) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "megatron_hyperrouter", "status", *map(str, words)],
                capture_output=True, text=True, check=False, env=environment(),
            )  # fmt: skip

        shown = json.loads(command(run_dir, "--json").stdout)
        assert shown["state"] == "failed" and shown["step"] == 10
        refused = command(tmp_path / "nowhere")
        assert refused.returncode == 2 and refused.stderr.count("error") == 1
        (run_dir / "events.jsonl").write_text("?\n")
        damaged = command(run_dir)
        assert damaged.returncode == 3 and "Traceback" not in damaged.stderr


def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    """Sums over a long file, against a plain loop over its lines."""
    path = tmp_path / "metrics.jsonl"
    layers = {f"router/entropy/{layer}": 1.25 for layer in range(8)}
    with path.open("w") as file:
        for step in range(1, 20_001):
            file.write(
                json.dumps({"step": step, "step_time": step / 1000, "tokens_per_second": 7.0} | layers) + "\n"
            )
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "split": "valid", "lm_loss": 1.0}) + "\n")
        file.write('{"step": 20001, "skipped": true, "lm_loss": null}\n{"step": 20002, "step_ti')
    steps = read_steps(path, after=19_990)
    assert (steps.last, steps.speed) == (20_002, pytest.approx(7.0))
    assert steps.trained == pytest.approx(sum(step / 1000 for step in range(1, 20_001)))
    assert steps.since == pytest.approx(sum(step / 1000 for step in range(19_991, 20_001)))
    assert steps.step_times[-1] == 20.0 and len(steps.step_times) == 100


def test_a_byte_order_mark_costs_no_line(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        content = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert now(run_dir).trained == 20.0
    assert [event["event"] for event in read_events(run_dir / "events.jsonl")] == ["start"]
    assert [record["step"] for record in read_run(run_dir).steps] == list(range(1, 11))


def test_words(run_dir: Path) -> None:
    lines = dict(lines_of(now(run_dir)))
    assert lines["step"] == "10 of 40 (25.0%)" and lines["speed"] == "50 tokens/s, 2 s per step"
    assert lines["last save"] == "none yet" and lines["goodput"].startswith("20.0% (0:00:20 of 0:01:40")
    assert duration(93784) == "1 d 2:03:04"


def test_damaged_metrics_of_an_earlier_attempt_are_a_note(tmp_path: Path) -> None:
    write_events(tmp_path / "run", {"event": "start", "time": time.time(), "world_size": 1})
    write_steps(tmp_path / "run", 3)
    (tmp_path / "run/metrics-earlier.jsonl").write_bytes(b"\x80 no record")
    trace = read_trace(tmp_path / "run")
    assert trace.steps.last == 3 and trace.repeated == 0
    assert any("metrics-earlier.jsonl" in note for note in trace.notes)


def test_an_alarm_about_replicas_is_an_event(run_dir: Path) -> None:
    """Its hosts are a text, as ``train/resuming/recovery.py`` writes it."""
    alarm = {"event": "alarm", "time": time.time(), "step": 9, "attempt": 1, "alarm": "replicas"}
    alarm |= {"ranks": [1], "hosts": "node-b", "tensor": "embedding", "tensors": 1, "action": "stop"}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(alarm) + "\n")
    assert read_trace(run_dir).events[-1]["hosts"] == "node-b" and now(run_dir).notes == []


DAMAGE = (None, True, -1, 10**400, float("inf"), float("nan"), "x", "", [], {}, [1])


@pytest.mark.parametrize("number", range(4))
def test_no_damaged_value_ends_the_command(run_dir: Path, number: int) -> None:
    """Any value of any event takes any other type, or is missing: the event counts, or is ignored."""
    begun = time.time() - 100
    found = [
        {"event": "start", "time": begun, "total": 40, "world_size": 2, "hosts": ["a"], "job": "A=1"},
        {"event": "save", "time": begun + 5, "step": 5, "folder": "step_5", "seconds": 0.1, "waited": 0.01},
        {"event": "alarm", "time": begun + 6, "alarm": "late_data", "rank": 1, "value": 0.5, "since": 1},
        {"event": "failure", "time": begun + 7, "error": "Hang", "message": "no", "status": 1, "rank": 1},
    ]
    found[0]["launcher_restarts"] = "SLURM_RESTART_COUNT=0"
    environ = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"}
    for name in ["step", "attempt", *found[number]]:
        for value in DAMAGE:
            event = {"step": 0, "attempt": 1, **found[number], name: value}
            if value == []:
                del event[name]
            lines = [{"step": 0, "attempt": 1, **each} for each in found]
            lines[number] = event
            (run_dir / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            assert lines_of(now(run_dir)) and json.dumps(now(run_dir).as_json())
            worth_restarting(run_dir, 1, environ=environ)
    write_events(run_dir, *found, {"time": begun, "what": "an event without a name"})
    assert now(run_dir).notes == ["events.jsonl: line 5 cannot be read and is ignored"]


@pytest.mark.parametrize("name", ["alarm", "rank", "value", "since", "more", "host", "step"])
def test_a_late_rank_with_a_damaged_value(run_dir: Path, name: str) -> None:
    """The event of a run that is alive counts, or is ignored."""
    opening = {"event": "start", "time": time.time() - 100, "total": 40, "world_size": 2}
    facts = {
        "alarm": "slow_rank",
        "rank": 1,
        "value": 1.5,
        "since": 3,
        "step": 22,
        "more": 2,
        "host": "node1",
    }
    write_beats(run_dir, time.time(), {}, {})
    with held(run_dir):
        for value in DAMAGE:
            event = {"event": "alarm", "time": time.time(), **facts, name: value}
            if value == []:
                del event[name]
            lines = [{"step": 0, "attempt": 1, **each} for each in (opening, event)]
            (run_dir / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            assert now(run_dir).state == "running" and lines_of(now(run_dir)), value
