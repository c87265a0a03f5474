"""An installation without a compiler continues with a warning, and lacks only the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.processes
def test_no_compiler_is_a_warning(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
    ]
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | missing, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "megatron_hyperrouter.data._index was not built" in done.stderr
    assert "/nonexistent/c++" in done.stderr and "Install a C++17 compiler" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".o")]
