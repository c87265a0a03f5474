"""The YAML files of the tools are read as strictly as the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_hyperrouter
from megatron_hyperrouter.commands.models.finetune_flags import words_of
from megatron_hyperrouter.commands.studies.compare import read_options
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.report.sources import settings_in
from megatron_hyperrouter.studies.loss import read_axes

READERS: dict[str, Callable[[Path], Any]] = {
    "finetune --config": words_of,
    "compare --options": lambda path: read_options(str(path), ["a"]),
    "scaling loss --axes": lambda path: read_axes(str(path)),
    "report": settings_in,
}
BOMB = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
WRONG = {
    "aliases": BOMB.encode(),
    "itself": b"a: &a {b: *a}\n",
    "an odd time": b"a: !!timestamp 2001-99X99\n",
    "code": b"a: !!python/object/apply:os.getcwd []\n",
    "nested": b"a: " + b"[" * 20_000,
    "digits": b"a: " + b"9" * 5000,
    "not UTF-8": b"a: caf\xe9\n",
    "a list": b"- 1\n",
    "cut": b"a: {b: ",
    "a key twice": b"a: 1\nb: 2\na: 3\n",
    "a key twice inside": b"a: [{b: 1, b: 2}]\n",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", WRONG)
def test_odd_files_are_refused(tmp_path: Path, reader: str, content: str) -> None:
    (tmp_path / "a.yaml").write_bytes(WRONG[content])
    with pytest.raises(ConfigError, match=r"a\.yaml") as refused:
        READERS[reader](tmp_path / "a.yaml")
    assert len(str(refused.value)) < 1000


def test_values_are_read_as_in_the_settings_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + b"lr: 1e-4\nsteps: 1_000\nname: 2001-01-01\nwarm: 1:30\nword: no\r\n")
    words = words_of(path)
    assert [float(words[1]), *words[2:]] == [
        1e-4, "--steps", "1_000", "--name", "2001-01-01", "--warm", "1:30", "--word", "no"
    ]  # fmt: skip
    path.write_text("num_experts: [4, 08]\nlr: [1e-4]\n")
    assert read_axes(str(path)) == {
        "num_experts": [{"num_experts": 4}, {"num_experts": "08"}],
        "lr": [{"lr": 1e-4}],
    }


def test_no_other_reader_of_yaml() -> None:
    package = Path(megatron_hyperrouter.__file__).parent
    other = [
        str(file)
        for file in package.rglob("*.py")
        if "safe_load" in file.read_text() or "yaml.load" in file.read_text()
    ]
    assert other == []
