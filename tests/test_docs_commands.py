"""Every command line in the README and the docs names a command that exists and flags that it has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from distributed import environment

from megatron_hyperrouter.commands.names import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {name for group in GROUPS.values() for name in group}
PASSES_ON = {"compare", "scaling", "index", "verify", "plan"}  # other flags go to the program
LAUNCHER = re.compile(r"^(deepspeed|torchrun|srun|sbatch|bash)\b")


@cache
def flags_of(command: str) -> frozenset[str]:
    """All flags that ``--help`` of a command shows; the studies of ``scaling`` have help of their own."""
    helps = [[command, "loss"], [command, "speed"]] if command == "scaling" else [[command]]
    shown = ""
    for words in helps:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_hyperrouter", *words, "--help"],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
            timeout=120,
        )
        shown += done.stdout
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown))


def blocks_of(text: str) -> list[str]:
    """What stands between each pair of fences."""
    return [part.partition("\n")[2] for part in re.split(r"^```", text, flags=re.MULTILINE)[1::2]]


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of each command in a code block, continued lines joined."""
    found = []
    for page in PAGES:
        for line in "".join(blocks_of(page.read_text("utf-8"))).replace("\\\n", " ").splitlines():
            text = line.split(" # ")[0].strip()
            if re.match(r"^(mhr|python tools/|python -m megatron_hyperrouter)", text):
                found.append((page.name, text))
            elif LAUNCHER.match(text) and "pretrain_gpt_hyperrouter.py" in text:
                found.append((page.name, "mhr train " + text.split("pretrain_gpt_hyperrouter.py")[1]))
    return found


LINES = command_lines()


def test_there_are_commands_to_check() -> None:
    assert len(LINES) > 20
    assert {shlex.split(line)[1] for _, line in LINES if line.startswith("mhr ")} >= {"train", "evaluate"}


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: value[:60])
def test_a_command_line_of_the_docs_is_understood(page: str, line: str) -> None:
    words = shlex.split(line.replace("[", " ").replace("]", " ").replace("...", " ").replace("|", " "))
    if words[0] == "mhr":
        name = words[1]
    elif words[1] == "-m":
        name = words[3]
    else:
        wrapper = (ROOT / words[1]).read_text(encoding="utf-8")
        (name,) = re.findall(r'start\("([\w-]+)"\)', wrapper)
    if name in ("--help", "NAME", "COMMAND"):
        return
    assert name in NAMES, f"{page}: {line}"
    known = flags_of(name) | (flags_of("train") if name in PASSES_ON else frozenset())
    asked = {word.partition("=")[0] for word in words if re.match(r"^--[a-z]", word)} - {"--flag", "--help"}
    plain = {word.replace("_", "-") if word.startswith("--router.") else word for word in asked}
    assert plain <= known | {word.replace("_", "-") for word in known}, f"{page}: {line}"
