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
_INSTALL = {
    COMPARE: "pip install 'megatron-hyperrouter[hf]', or name a Python that has it with --python",
    HARNESS: "pip install 'megatron-hyperrouter[hf,eval]', or name a Python that has it with --python",
    GGUF: "pip install gguf, or name a Python that has it with --python",
}
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def ask(task: Mapping[str, Any], *, python: str | None = None, script: Path = COMPARE) -> dict[str, Any]:
    """The answer of ``script`` to ``task``; HostError if that Python lacks a library."""
    with tempfile.TemporaryDirectory(prefix="mhr-proof-") as folder:
        asked, answered = Path(folder) / "task.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(task), encoding="utf-8")
        program = python or sys.executable
        if os.sep in program:  # a path, from here: the process runs in another folder
            program = os.path.abspath(program)
        try:
            done = subprocess.run(
                [program, str(script), str(asked), str(answered)],
                env=_environment() | {"HF_MODULES_CACHE": folder},
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise HostError(
                f"{program} cannot be started: {reason_of(error)}", remedy="name a Python with --python"
            ) from error
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            return found
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if any(word in last[0] for word in ("ModuleNotFoundError", "ImportError", "does not have the class")):
            raise HostError(f"{program}: {last[0]}", remedy=_INSTALL[script])
        raise HyperRouterError(
            f"{script.name} failed: {last[0]}",
            remedy="its output:\n" + done.stderr.strip()[-3000:],
        )


def _environment() -> dict[str, str]:
    """This process's, without what makes it a rank of a launcher, and without a way to the network."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours} | _QUIET
