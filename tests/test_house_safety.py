"""No file that is loaded can run code: no pickle, and no ``torch.load`` or ``numpy.load`` that reads one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house_sources import PACKAGE

ROOT = Path(__file__).resolve().parents[1]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def unsafe(text: str) -> list[str]:
    """The imports and calls of a file that can run what another file holds."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            told = {each.arg: ast.unparse(each.value) for each in node.keywords}
            safe = {  # by what is called
                "torch.load": told.get("weights_only") == "True",
                "np.load": told.get("allow_pickle", "False") == "False",
            }
            if not safe.get(ast.unparse(node.func), True):
                found.append(ast.unparse(node))
    return found


def test_the_package_loads_no_code() -> None:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert len(files) > 300
    assert [f"{path}: {each}" for path in files for each in unsafe(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path)", 0),
    ],
)
def test_what_it_finds(text: str, count: int) -> None:
    assert len(unsafe(text)) == count
