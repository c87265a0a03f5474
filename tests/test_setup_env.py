"""tools/setup_env.sh, with a stand-in for Python whose pip only records its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = ".megatron_hyperrouter"

# A Python that runs our -c programs, "makes" environments of itself, and "installs" by touching the
# extension's file.
STAND_IN = r"""#!/usr/bin/env bash
if [[ ${{1:-}} == -m && ${{2:-}} == venv ]]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [[ ${{1:-}} == -m && ${{2:-}} == ensurepip ]]; then
  [[ -n ${{ENSURE:-}} ]] && touch {log}.ensured
elif [[ ${{1:-}} == -m && ${{2:-}} == pip ]]; then
  [[ -z ${{NO_PIP:-}} || -e {log}.ensured ]] || exit 1
  [[ $* == *" install "* ]] || exit 0
  printf '%s\n' "${{*: -2}}" >> {log}
  if [[ -e {broken} ]]; then exit 1; fi
  if [[ $* == *" -e ." && -z ${{NO_BUILD:-}} ]]; then touch "$({python} -c '{suffix}')"; fi
else
  exec {python} "$@"
fi
"""
SUFFIX = (
    'import sysconfig; print("megatron_hyperrouter/data/_index" + sysconfig.get_config_var("EXT_SUFFIX"))'
)


@dataclass
class Checkout:
    """A small copy of the repository and the stand-in beside it."""

    root: Path
    python: Path
    log: Path

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script without an active environment, unless one is given."""
        kept = {
            name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHON", "CXX")
        }
        env = {**kept, "PYTHON": str(self.python), "CXX": "true", **environment}
        return subprocess.run(
            ["bash", "tools/setup_env.sh"], cwd=self.root, env=env, capture_output=True, text=True, timeout=60
        )

    def installs(self) -> list[str]:
        """The last words of each pip install so far, which are then forgotten."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


FULL = ["-r requirements.txt", "-e ."]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    root = tmp_path / "with space"
    (root / "tools").mkdir(parents=True)
    (root / "megatron_hyperrouter/data/csrc").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tools/setup_env.sh", root / "tools")
    for name in (
        "requirements.txt",
        "pyproject.toml",
        "setup.py",
        "megatron_hyperrouter/data/csrc/index.cpp",
    ):
        (root / name).write_text(name)
    python = tmp_path / "python"
    log, broken = tmp_path / "pip.log", tmp_path / "broken"
    python.write_text(
        STAND_IN.format(log=log, broken=broken, python=sys.executable, suffix=SUFFIX.replace("'", '"'))
    )
    python.chmod(0o755)
    return Checkout(root, python, log)


def test_a_fresh_checkout_gets_an_environment_and_keeps_it(checkout):
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.root}/.venv\n"
    assert checkout.installs() == FULL
    started = time.monotonic()
    again = checkout.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert checkout.installs() == []
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "name", ["requirements.txt", "pyproject.toml", "setup.py", "megatron_hyperrouter/data/csrc/index.cpp"]
)
def test_whatever_the_environment_was_made_from_makes_it_anew(checkout, name):
    checkout.setup()
    checkout.installs()
    (checkout.root / name).write_text("changed")
    assert checkout.setup().returncode == 0
    assert checkout.installs() == FULL


def test_an_environment_without_pip_gets_one(checkout):
    """As ``uv venv`` leaves it."""
    done = checkout.setup(NO_PIP="1", ENSURE="1")
    assert done.returncode == 0 and "adding pip" in done.stderr
    assert checkout.installs() == FULL


def test_pip_that_cannot_be_had_is_a_message(checkout):
    done = checkout.setup(NO_PIP="1")
    assert done.returncode == 5 and "python3-venv" in done.stderr.splitlines()[-1]
    assert checkout.installs() == []


def test_a_new_source_file_or_a_lost_extension_is_noticed(checkout):
    checkout.setup()
    (checkout.root / "megatron_hyperrouter/data/csrc/more.h").write_text("")
    checkout.installs()
    checkout.setup()
    assert checkout.installs() == FULL
    (built,) = (checkout.root / "megatron_hyperrouter/data").glob("_index*")
    built.unlink()
    checkout.setup()
    assert checkout.installs() == FULL


def test_the_active_environment_is_used(checkout, tmp_path):
    active = tmp_path / "active"
    subprocess.run([checkout.python, "-m", "venv", active], check=True)
    result = checkout.setup(VIRTUAL_ENV=str(active))
    assert result.stdout == f"{active}\n"
    assert checkout.installs() == FULL
    assert not (checkout.root / ".venv").exists()


def test_an_active_environment_that_has_gone_is_not(checkout):
    assert checkout.setup(VIRTUAL_ENV="/no/such/environment").stdout == f"{checkout.root}/.venv\n"


def test_an_interrupted_run_is_mended(checkout):
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / MARK).write_text("making\n")
    (checkout.root / ".venv/leftover").write_text("half a file")
    result = checkout.setup()
    assert result.returncode == 0, result.stderr
    assert checkout.installs() == FULL
    assert not (checkout.root / ".venv/leftover").exists()


def test_a_failed_install_says_so_and_the_next_run_goes_on(checkout, tmp_path):
    (tmp_path / "broken").touch()
    failed = checkout.setup()
    assert failed.returncode == 5
    assert failed.stdout == ""
    assert "pip" in failed.stderr
    (tmp_path / "broken").unlink()
    checkout.installs()
    assert checkout.setup().returncode == 0
    assert checkout.installs() == FULL


def test_an_environment_whose_python_has_gone_is_made_again_if_it_is_ours(checkout):
    checkout.setup()
    (checkout.root / ".venv/bin/python").unlink()
    assert checkout.setup().returncode == 0
    (checkout.root / ".venv/bin/python").unlink()
    (checkout.root / ".venv" / MARK).unlink()
    (checkout.root / ".venv/precious").touch()
    refused = checkout.setup()
    assert refused.returncode == 5
    assert "remove" in refused.stderr
    assert (checkout.root / ".venv/precious").exists()


def test_too_old_a_python_is_refused(checkout, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    refused = checkout.setup(PYTHON=str(old))
    assert refused.returncode == 5
    assert "no Python >= 3.10 found (Python 3.9.1" in refused.stderr
    assert not (checkout.root / ".venv").exists()


def test_without_a_compiler_it_goes_on_and_says_so(checkout):
    first = checkout.setup(CXX="no-such-compiler", NO_BUILD="1")
    assert first.returncode == 0
    assert "NumPy" in first.stderr
    assert checkout.installs() == FULL
    assert checkout.setup(CXX="no-such-compiler", NO_BUILD="1").stderr == ""  # told once
    assert checkout.installs() == []
    assert "NumPy" not in checkout.setup().stderr  # a compiler has been installed since
    assert checkout.installs() == FULL


def test_an_extension_that_does_not_build_is_told_once(checkout):
    assert "the C++ extension could not be built" in checkout.setup(NO_BUILD="1").stderr
    assert checkout.setup(NO_BUILD="1").stderr == ""


def test_a_stale_extension_does_not_outlive_its_sources(checkout):
    checkout.setup()
    (checkout.root / "megatron_hyperrouter/data/csrc/index.cpp").write_text("no longer C++")
    checkout.setup(NO_BUILD="1")
    assert list((checkout.root / "megatron_hyperrouter/data").glob("_index*")) == []
