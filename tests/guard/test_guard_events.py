"""events.jsonl: one object a line, attempts counted over all starts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from megatron_hyperrouter.guard import events
from megatron_hyperrouter.guard.events import EventsFile, read_events, record_failure_of


def test_lines_of_two_attempts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    before = time.time()
    first = EventsFile(path)
    first.write("start", 0)
    first.write("save", 3, folder="checkpoints/step_0000003")
    with path.open("a") as file:
        file.write('{"event": "sto')  # a kill
    again = EventsFile(path)
    again.write("resume", 3)
    again.write("bad_step", 5, value=math.nan)
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert lines == read_events(path)
    assert [(line["event"], line["step"], line["attempt"]) for line in lines] == [
        ("start", 0, 1),
        ("save", 3, 1),
        ("resume", 3, 2),
        ("bad_step", 5, 2),
    ]
    assert lines[1]["folder"] == "checkpoints/step_0000003" and lines[3]["value"] == "nan"
    assert all(before <= line["time"] <= time.time() for line in lines)


def test_an_unknown_event_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event finish: must be"):
        EventsFile(tmp_path / "events.jsonl").write("finish", 1)


@pytest.mark.parametrize(
    ("closing", "facts", "cause"),
    [
        ("stop", {"reason": "SIGTERM"}, "stopped by SIGTERM"),
        (
            "failure",
            {"error": "DataError", "message": "a.bin is cut\n  remedy: x"},
            "DataError: a.bin is cut",
        ),
        ("end", {}, "had finished"),
        (None, {}, "did not record its end"),
    ],
)
def test_a_restart_names_its_cause(
    tmp_path: Path, closing: str | None, facts: dict[str, str], cause: str
) -> None:
    path = tmp_path / "events.jsonl"
    EventsFile(path).write("start", 0)
    if closing:
        EventsFile(path).write(closing, 3, **facts)
    EventsFile(path).write("resume", 3)
    first, *_, last = read_events(path)
    assert "cause" not in first and cause in str(last["cause"])
    assert "\n" not in str(last["cause"])


def test_a_rank_that_fails_alone_is_recorded_and_one_that_fails_with_rank_0_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_TURN", 0.0)
    path = tmp_path / "events.jsonl"
    EventsFile(path).write("start", 0)
    record_failure_of(3, path, 5, error="DataError", message="cut", status=3)
    record_failure_of(4, path, 5, error="DataError", message="cut", status=3)
    _, *failures = read_events(path)
    assert [(each["event"], each["rank"], each["step"]) for each in failures] == [("failure", 3, 5)]
