"""events.jsonl: one object a line, attempts counted over all starts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from megatron_hyperrouter.guard.events import EventsFile, read_events


def test_lines_of_two_attempts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    before = time.time()
    first = EventsFile(path)
    first.write("start", 0)
    first.write("save", 3, folder="checkpoints/step_0000003")
    with path.open("a") as file:
        file.write('{"event": "sto')  # a kill
    with path.open("a") as file:
        file.write("\n")
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
    with pytest.raises(ValueError, match="'finish'"):
        EventsFile(tmp_path / "events.jsonl").write("finish", 1)
