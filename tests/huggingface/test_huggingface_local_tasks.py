"""The two tasks that need no download."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from megatron_hyperrouter.huggingface.local_tasks import TASKS, questions, write_tasks

TEXTS = ["\n".join(f"line {number} of {name}" for number in range(40)) for name in ("a", "b")]


def test_the_answer_is_the_line_that_follows() -> None:
    found = list(questions(TEXTS))
    assert found == list(questions(TEXTS)) and len(found) == 13
    places = set()
    for question in found:
        choices, label = question["choices"], question["label"]
        assert isinstance(choices, list) and isinstance(label, int) and len(set(choices)) == 4
        assert f"{question['prompt']}{choices[label]}" in "\n".join(TEXTS)
        places.add(label)
    assert len(places) > 1  # the place gives nothing away


def test_both_tasks_are_files_of_the_harness(tmp_path: Path) -> None:
    assert write_tasks(tmp_path, TEXTS) == []
    for name in TASKS:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        wanted = {"held_out": {"text"}, "next_line": {"prompt", "choices", "label"}}[name]
        assert task["task"] == name and rows and all(row.keys() == wanted for row in rows)


def test_texts_without_lines_have_no_questions(tmp_path: Path) -> None:
    assert write_tasks(tmp_path, ["one", "two"]) == ["next_line"]
