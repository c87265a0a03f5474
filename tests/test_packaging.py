"""Packaging: the sdist gives a wheel, and the wheel gives the command ``mhr`` in any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_hyperrouter.commands.names import GROUPS

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of this checkout, and the wheel that is built from it elsewhere."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "checkout"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel alone; the libraries come from this environment."""
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "install", "--no-deps", "--no-compile", "--target", site, built[1], cwd=site)
    return site


@pytest.mark.processes
def test_the_sdist_has_what_a_checkout_has(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pretrain_gpt_hyperrouter.py", "tools/evaluate.py", "examples/quickstart.sh", "README.md"}
    assert wanted | {"megatron_hyperrouter/data/csrc/bindings.cpp", "docs/data.md"} <= names


@pytest.mark.processes
def test_the_wheel_is_typed_and_has_the_command(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "mhr = megatron_hyperrouter.commands.main:mhr" in archive.read(entry).decode()
    assert "megatron_hyperrouter/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "benchmarks/"))]


@pytest.mark.processes
def test_mhr_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed)}
    shown = run(installed / "bin" / "mhr", "--help", cwd=tmp_path, **path).stdout
    assert all(f"  {name} " in shown for group in GROUPS.values() for name in group)
    where = run(
        sys.executable, "-c", "import megatron_hyperrouter as m; print(m.__file__)", cwd=tmp_path, **path
    )
    assert Path(where.stdout.strip()).is_relative_to(installed)
    (tmp_path / "a.txt").write_text("one text\n")
    run(sys.executable, "-m", "megatron_hyperrouter", "corpus", "--root", tmp_path, "--output", "c.jsonl",
        cwd=tmp_path, **path)  # fmt: skip
    assert "one text" in (tmp_path / "c.jsonl").read_text()


@pytest.mark.processes
def test_every_command_is_there(installed: Path) -> None:
    modules = [command.module for group in GROUPS.values() for command in group.values()]
    found = "[m for m in {0!r} if u.find_spec('megatron_hyperrouter.commands.' + m) is None]"
    code = f"import importlib.util as u; print({found})"
    done = run(sys.executable, "-c", code.format(modules), cwd=installed, PYTHONPATH=str(installed))
    assert done.stdout.strip() == "[]"
