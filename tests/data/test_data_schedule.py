"""--data-schedule: what it means, and what is refused before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write_corpus

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.schedule import mixes_of
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
        ("", "no list"),
        ("{from_step: 0}", "no list"),
        ("[", "cannot be read"),
        ("- 3", "entry 1 must have"),
        ("- {from_step: 0}", "entry 1 must have"),
        ("- {from_step: 0, data_path: [A], more: 1}", "nothing else"),
        ("- {from_step: -1, data_path: [A]}", "from_step must be a whole number"),
        ("- {from_step: 1.5, data_path: [A]}", "from_step must be a whole number"),
        ("- {from_step: 0, data_path: A}", "must be a list of prefixes"),
        ("- {from_step: 0, data_path: []}", "must be a list of prefixes"),
        ("- {from_step: 0, data_path: [A, A]}", "names a file twice"),
        ("- {from_step: 0, data_path: [gone]}", r"gone\.bin is not there"),
        ("- {from_step: 0, data_path: [0.5, A, B]}", "alternate|weight"),
        ("- {from_step: 2, data_path: [A]}", "begins at step 2"),
        ("- {from_step: 0, data_path: [A]}\n- {from_step: 4, data_path: [A]}\n- {from_step: 4, data_path: [A]}", "do not rise: 0, 4, 4"),
    ],
)
def test_what_is_no_schedule(tmp_path: Path, text: str, rule: str) -> None:
    prefix = write_corpus(tmp_path / "a", [5])
    with pytest.raises(ConfigError, match=rule):
        mixes_of(given(tmp_path, text.replace("A", prefix)))


def test_a_schedule_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        mixes_of(DataConfig(data_schedule=str(tmp_path / "gone.yaml")))
