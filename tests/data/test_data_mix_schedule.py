"""--data-schedule: what it means, and what is refused before a run starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import write_corpus

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of, settled
from megatron_hyperrouter.errors import ConfigError


def given(tmp_path: Path, text: str) -> DataConfig:
    (tmp_path / "mixes.yaml").write_text(text)
    return DataConfig(data_path=("x",), data_schedule=str(tmp_path / "mixes.yaml"))


def test_without_one_the_mix_is_the_runs() -> None:
    assert mixes_of(DataConfig(data_path=("0.3", "a", "0.7", "b"))) == ((0, ("0.3", "a", "0.7", "b")),)
    assert mixes_of(DataConfig(train_data_path=("a",))) == ((0, ("a",)),)


def test_mixes_and_their_steps(tmp_path: Path) -> None:
    a, b = (write_corpus(tmp_path / name, [5]) for name in "ab")
    text = f"- {{from_step: 0, data_path: [{a}]}}\n- {{from_step: 7, data_path: [0.5, {a}, 2, {b}]}}\n"
    assert mixes_of(given(tmp_path, text)) == ((0, (a,)), (7, ("0.5", a, "2", b)))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be a list"),
        ("{from_step: 0}", "must be a list"),
        ("[", "cannot be read"),
        ("- 3", "entry 1 must have"),
        ("- {from_step: 0}", "entry 1 must have"),
        ("- {from_step: 0, data_path: [A], more: 1}", "no other key"),
        ("- {from_step: -1, data_path: [A]}", "from_step must be an integer"),
        ("- {from_step: 1.5, data_path: [A]}", "from_step must be an integer"),
        ("- {from_step: 0, data_path: A}", "must be a list of prefixes"),
        ("- {from_step: 0, data_path: []}", "must be a list of prefixes"),
        ("- {from_step: 0, data_path: [A, A]}", "names a file twice"),
        ("- {from_step: 0, data_path: [gone]}", r"gone\.bin does not exist"),
        ("- {from_step: 0, data_path: [0.5, A, B]}", "alternate|weight"),
        ("- {from_step: 2, data_path: [A]}", "must begin at step 0, not at step 2"),
        (
            "- {from_step: 0, data_path: [A]}\n- {from_step: 4, data_path: [A]}\n- {from_step: 4, "
            "data_path: [A]}",
            "must have increasing from_step values, not 0, 4, 4",
        ),
    ],
)
def test_what_is_no_schedule(tmp_path: Path, text: str, rule: str) -> None:
    prefix = write_corpus(tmp_path / "a", [5])
    with pytest.raises(ConfigError, match=rule):
        mixes_of(given(tmp_path, text.replace("A", prefix)))


def test_a_schedule_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file or directory\n"):
        mixes_of(DataConfig(data_schedule=str(tmp_path / "gone.yaml")))


def test_settled_it_needs_no_file(tmp_path: Path) -> None:
    a, b = (write_corpus(tmp_path / name, [5]) for name in "ab")
    data = replace(
        given(
            tmp_path,
            f"- {{from_step: 0, data_path: [{a}]}}\n- {{from_step: 7, data_path: [0.5, {a}, 2, {b}]}}\n",
        ),
        data_path=(),
    )
    mixes = mixes_of(data)
    found = settled(data, mixes)
    (tmp_path / "mixes.yaml").unlink()
    assert mixes_of(found) == mixes and settled(found, mixes) == found
    assert json.loads(str(found.data_schedule))[1] == {"from_step": 7, "data_path": ["0.5", a, "2", b]}
    with pytest.raises(ConfigError, match=r"--data-schedule = \[\{.{58} \.\.\.: entry 2 must have"):
        mixes_of(replace(data, data_schedule=str(found.data_schedule).replace('7, "data_path"', '7, "data"')))


@pytest.mark.parametrize("name", ["\N{GRINNING FACE}", "\N{EURO SIGN}", 'a"b', "a: b", "$a"])
def test_the_list_in_a_runs_settings_names_the_same_files(tmp_path: Path, name: str) -> None:
    mixes = ((0, (write_corpus(tmp_path / name, [5]),)),)
    assert mixes_of(settled(DataConfig(data_schedule="mixes.yaml"), mixes)) == mixes


def test_whose_files_validation_reads(tmp_path: Path) -> None:
    a = write_corpus(tmp_path / "a", [5])
    data = given(tmp_path, f"- {{from_step: 0, data_path: [1.5, {a}]}}\n")
    mixes = mixes_of(data)
    paths = [
        (settled(now, mixes).data_path, settled(now, mixes).train_data_path)
        for now in (data, replace(data, data_path=()), replace(data, data_path=(), valid_data_path=("v",)))
    ]
    assert paths == [(("x",), ()), (("1.5", a), ()), ((), ("1.5", a))]
    without = DataConfig(data_path=("x",))
    assert settled(without, mixes_of(without)) is without


def test_files_of_mixes_that_are_over_may_be_gone(tmp_path: Path) -> None:
    a = write_corpus(tmp_path / "a", [5])
    data = given(tmp_path, f"- {{from_step: 0, data_path: [gone]}}\n- {{from_step: 4, data_path: [{a}]}}\n")
    with pytest.raises(ConfigError, match=r"entry 1: the file gone\.bin does not exist"):
        mixes_of(data, step=3)
    assert mixes_of(data, step=4) == ((0, ("gone",)), (4, (a,)))
