"""Runs a file of the room ``huggingface`` in a separate process, so that the libraries do not affect each
other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter.errors import HostError, HyperRouterError, reason_of

_FILES = Path(__file__).resolve().parent.parent / "huggingface"
COMPARE, HARNESS, GGUF = _FILES / "compare.py", _FILES / "harness.py", _FILES / "gguf_file.py"
_NEEDS = {COMPARE: ("transformers",), HARNESS: ("lm_eval", "transformers", "accelerate"), GGUF: ("gguf",)}
_INSTALL = {
    COMPARE: "run: pip install 'megatron-hyperrouter[hf]', or give another Python with --python",
    HARNESS: "run: pip install 'megatron-hyperrouter[hf,eval]', or give another Python with --python",
    GGUF: "run: pip install gguf, or give another Python with --python",
}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def require(script: Path, *, python: str | None = None) -> None:
    """HostError now, before work that ``script`` needs, where that Python lacks a library."""
    look = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))"
    program = _program(python)
    done = _run([program, "-c", look, *_NEEDS[script]], cwd=str(_FILES), env=_environment())
    if done.returncode:
        raise HostError(f"{program} is not a working Python", remedy="give another Python with --python")
    if missing := done.stdout.split():
        raise HostError(f"{program} cannot import {' and '.join(missing)}", remedy=_INSTALL[script])


def ask(
    task: Mapping[str, Any], *, python: str | None = None, script: Path = COMPARE, hub: bool = False
) -> dict[str, Any]:
    """The answer of ``script`` to ``task``; HostError if that Python lacks a library.  ``hub``: whether it
    may download from the Hugging Face hub.
    """
    with tempfile.TemporaryDirectory(prefix="mhr-proof-") as folder:
        asked, answered = Path(folder) / "task.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(task), encoding="utf-8")
        program = _program(python)
        done = _run(
            [program, str(script), str(asked), str(answered)],
            cwd=folder,
            env=_environment() | {"HF_MODULES_CACHE": folder} | ({} if hub else _OFFLINE),
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            return found
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if any(
            word in last[0]
            for word in ("ModuleNotFoundError", "ImportError", "does not support this model class")
        ):
            raise HostError(f"{program}: {last[0]}", remedy=_INSTALL[script])
        raise HyperRouterError(
            f"{script.name} failed: {last[0]}",
            remedy=f"read the error output of {script.name}:\n{done.stderr.strip()[-3000:]}",
        )


def _program(python: str | None) -> str:
    """The Python to start; relative paths start here, because the process may run in another folder."""
    program = python or sys.executable
    return os.path.abspath(program) if os.sep in program else program


def _run(command: list[str], *, cwd: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise HostError(
            f"{command[0]} cannot be started: {reason_of(error)}",
            remedy="give an existing Python with --python",
        ) from error


def _environment() -> dict[str, str]:
    """This process's environment, without the variables of a launcher."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours} | _QUIET
