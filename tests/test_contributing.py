"""CONTRIBUTING.md is correct: its example router is one file, and passes the tests of all routers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# Runs the example as if the file stood in the package, but leaves the package alone.
PROGRAM = """
import importlib.util, sys
import megatron_hyperrouter.routers

spec = importlib.util.spec_from_file_location("megatron_hyperrouter.routers.centroid", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
"""

FLAGS = """
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers import ROUTERS

config = parse(["--data-path", "a", "--router.name", "centroid", "--router.temperature", "0.5"],
routers=ROUTERS)
assert config.router.options == module.CentroidRouter.Config(temperature=0.5)
try:
    parse(["--data-path", "a", "--router.name", "centroid", "--router.temperature", "0"], routers=ROUTERS)
except ConfigError as error:
    assert "--router.temperature = 0: must be a number > 0" in str(error)
else:
    raise AssertionError("a temperature of 0 passed")
"""

MATHS = """
import torch
from megatron_hyperrouter import build_router

router = build_router("centroid", hidden_size=6, num_experts=4, topk=2, temperature=0.5)
x_TD = torch.randn(5, 6)
centroids = router.centroid_ED.tolist()
expected_TE = torch.tensor([[-sum((a - b) ** 2 for a, b in zip(x,
c)) / (2 * 6 * 0.5) for c in centroids] for x in x_TD.tolist()])
assert torch.allclose(router(x_TD).logits_TE.softmax(-1), expected_TE.softmax(-1), atol=1e-6)
assert torch.equal(router.fold()(x_TD).experts_TK, router(x_TD).experts_TK)
"""

CONTRACT = """
import pytest
sys.exit(pytest.main(["tests/routers/test_routers_contract.py", "-q", "-k", "centroid", "-p",
"no:cacheprovider", "-p", "no:xdist"]))
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The router of the guide, as a file."""
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "Router, name=" in block
    ]
    path = tmp_path_factory.mktemp("guide") / "centroid.py"
    path.write_text(code, encoding="utf-8")
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("program", [FLAGS, MATHS], ids=["flags", "maths"])
def test_the_routers_file_is_all_it_takes(example, program):
    result = run("-c", PROGRAM + program, example)
    assert result.returncode == 0, result.stderr


def test_the_router_keeps_the_contract(example):
    result = run("-c", PROGRAM + CONTRACT, example)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 10, result.stdout[-1000:]


def test_the_router_is_written_as_the_house_writes(example):
    result = run("-m", "ruff", "check", "--config", ROOT / "pyproject.toml", example)
    assert result.returncode == 0, result.stdout
    result = run("-m", "ruff", "format", "--check", "--config", ROOT / "pyproject.toml", example)
    assert result.returncode == 0, result.stdout


def test_the_files_that_the_guide_names_exist():
    for name in re.findall(r"`((?:tools|tests|examples|megatron_hyperrouter|\.ci)/[\w./]+)`", GUIDE):
        assert (ROOT / name).exists() or name.endswith("/centroid.py"), name
