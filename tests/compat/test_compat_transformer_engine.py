"""--transformer-impl: what is chosen, what is refused with status 5 and the command that installs it, and
what is reported.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from megatron_hyperrouter import console
from megatron_hyperrouter.compat import transformer_engine
from megatron_hyperrouter.compat.transformer_engine import implementation
from megatron_hyperrouter.errors import HostError


class Machine:
    """A machine that has what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version: str | None = "2.8.0"
        self.gpu, self.error = True, None
        find, load = importlib.util.find_spec, importlib.import_module
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.gpu)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: self.version if name == "transformer_engine" else find(name),
        )
        monkeypatch.setattr(
            importlib,
            "import_module",
            lambda name: self.load() if name.startswith("transformer_engine") else load(name),
        )

    error: Exception | None

    def load(self) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(__version__=self.version)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("wanted", "bf16"), [("auto", True), ("transformer_engine", True), ("transformer_engine", False)]
)
def test_used_where_it_is_and_its_version_named(
    machine: Machine, wanted: str, bf16: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert implementation(wanted, bf16=bf16) == "transformer_engine"
    told = capsys.readouterr().err
    assert "transformer-engine 2.8.0 was not tested" in told and "--transformer-impl local" in told


@pytest.mark.parametrize(("wanted", "bf16"), [("local", True), ("local", False), ("auto", False)])
def test_left_alone(machine: Machine, wanted: str, bf16: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert implementation(wanted, bf16=bf16) == "local"
    assert capsys.readouterr() == ("", "")


OBSTACLES = [
    ({"version": None}, "is not installed", False),
    ({"gpu": False}, "needs a GPU", False),
    ({"error": ImportError("libnccl")}, "cannot be imported (libnccl)", True),
    ({"error": OSError("libcudart.so.12")}, "cannot be imported (libcudart.so.12)", True),
    ({"version": "2.0.1"}, "2.0.1 is older than 2.1", True),
]


@pytest.mark.parametrize(("lacks", "words", "told"), OBSTACLES)
def test_what_it_cannot_have(
    machine: Machine, lacks: dict[str, object], words: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in lacks.items():
        setattr(machine, name, value)
    assert implementation("auto", bf16=True) == "local"
    assert (words in capsys.readouterr().err) == told  # silent where nobody could expect it
    with pytest.raises(HostError) as caught:
        implementation("transformer_engine", bf16=True)
    assert (
        words in caught.value.message
        and "pip install" in caught.value.remedy
        and "--transformer-impl local" in caught.value.remedy
    )
    assert console.run(lambda: implementation("transformer_engine", bf16=True)) == 5  # type: ignore[arg-type,return-value]


def test_this_machine_tells_the_truth() -> None:
    reason = transformer_engine.obstacle()
    assert (reason == "is not installed") == (not transformer_engine.present())
