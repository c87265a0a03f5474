"""A missing host ends the run with status 5, a version that was not tested gives a warning, and the pinned
versions give none.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from megatron_hyperrouter import console
from megatron_hyperrouter.compat import versions

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that this test pretends to have."""
    found = {library: tested for library, (_, tested) in versions.TESTED.items()}

    def version(library: str) -> str:
        if library not in found:
            raise metadata.PackageNotFoundError(library)
        return found[library]

    monkeypatch.setattr(metadata, "version", version)
    return found


def test_tested_versions_are_the_pinned_ones() -> None:
    pinned = dict(
        line.split("==") for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if "==" in line
    )
    assert {library: pinned[library] for library in versions.TESTED} == {
        library: version for library, (_, version) in versions.TESTED.items()
    }


@pytest.mark.parametrize("engine", versions.NEEDED)
def test_tested_versions_are_silent(
    installed: dict[str, str], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    versions.check(engine)
    installed |= {"torch": "2.13.1+cu130", "megatron-core": "0.16.7"}
    versions.check(engine)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("library", "version"),
    [
        ("torch", "2.12.1"),
        ("torch", "3.13.0"),
        ("megatron-core", "0.16.0rc2"),
        ("megatron-core", "0.17.0"),
        ("megatron-core", "0.18.2"),
        ("deepspeed", "main"),
    ],
)
def test_others_are_named(
    installed: dict[str, str], library: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    installed[library] = version
    versions.check("deepspeed")
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"{library} {version} was not tested" in told
    assert ("(tested: 0.16.1 and 0.19.2)" in told) == (library == "megatron-core")
    assert f"pip install {library}=={versions.TESTED[library][1]}" in told


def test_only_the_hosts_of_the_engine_matter(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del installed["deepspeed"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    versions.check("megatron")
    with pytest.raises(
        versions.HostError, match="--engine deepspeed needs deepspeed, which is not installed"
    ):
        versions.check("deepspeed")


def test_triton_is_needed_where_megatron_core_imports_it(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch's builds for CPUs come without it."""
    installed["megatron-core"] = "0.19.3"
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(versions.HostError, match=r"megatron-core 0\.19\.3 needs triton") as caught:
            versions.check("megatron")
    assert caught.value.remedy == "run: pip install triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton")
    versions.check("megatron")
    assert capsys.readouterr() == ("", "")


def test_missing_hosts_end_with_status_5(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.clear()

    def no_module(name: str) -> None:
        raise ModuleNotFoundError(name)  # what find_spec does where the package around a module is missing

    monkeypatch.setattr("importlib.util.find_spec", no_module)
    assert console.run(lambda: versions.check("deepspeed")) == 5
    told = capsys.readouterr().err
    assert "torch and megatron-core and deepspeed, which are not installed" in told
    assert "pip install torch==2.13.0 megatron-core==0.16.1 deepspeed==0.19.8" in told


def test_a_checkout_without_metadata_tells_its_version(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del installed["deepspeed"]
    checkout = ModuleType("deepspeed")
    checkout.__version__ = "0.18.2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", checkout)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert versions.installed("deepspeed") == "0.18.2"
