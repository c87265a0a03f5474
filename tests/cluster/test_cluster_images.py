"""The Dockerfiles, as far as they can be checked without a daemon: paths, and what pip makes of the pins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import REPOSITORY, environment

FILES = [REPOSITORY / "examples" / name for name in ("Dockerfile", "Dockerfile.cpu")]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, text), with continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, text.strip()) for name, _, text in (line.partition(" ") for line in joined)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_an_image_copies_and_runs_is_in_the_repository(path: Path) -> None:
    given = instructions(path)
    assert {name for name, _ in given} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    sources = [source for name, text in given if name == "COPY" for source in text.split()[:-1]]
    run = " ".join(text for name, text in given if name == "RUN")
    named = re.findall(r"(?<![/\w])(?:requirements\.txt|setup\.py|tools/\w+\.sh)", run)
    assert sources and named
    assert all((REPOSITORY / each).exists() for each in [*sources, *named])
    assert f"docker build -f examples/{path.name} " in path.read_text()


def test_pip_takes_our_pins_beside_the_torch_of_an_image(tmp_path: Path) -> None:
    """Runs the image's pip commands in this environment, with --dry-run."""
    (run,) = [text for name, text in instructions(FILES[0]) if name == "RUN"]
    asked, filtered, install, *_ = run.split(" && ")
    assert "-c /tmp/kept.txt -r /tmp/requirements.txt" in install
    commands = f"{asked} && {filtered} && {install}".replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(
        ["bash", "-ec", commands.replace("pip install", "pip install --dry-run --no-index")],
        cwd=REPOSITORY,
        env=environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install" not in done.stdout
    left = (tmp_path / "requirements.txt").read_text()
    assert "deepspeed==" in left and not re.search("^(torch|numpy|pytest|mkdocs)==", left, re.MULTILINE)


def test_the_python_of_the_cpu_image_is_one_that_we_support() -> None:
    base = next(text for name, text in instructions(FILES[1]) if name == "FROM")
    version = tuple(map(int, base.removeprefix("python:").partition("-")[0].split(".")))
    project = (REPOSITORY / "pyproject.toml").read_text()
    least = project.split('requires-python = ">=')[1].split('"')[0]
    assert version >= tuple(map(int, least.split(".")))
