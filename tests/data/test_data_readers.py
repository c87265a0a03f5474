"""4,000 mutated files for each reader: each ends in the contract's error or is accepted, in bounded memory.

MHR_FUZZED_FILES=4000 for as many; 1,000 otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import traceback
from pathlib import Path
from typing import Any

import pytest
from readers import READERS, Reader

FILES = int(os.environ.get("MHR_FUZZED_FILES", "1000"))
MOST_BYTES = 4 << 30  # of memory beyond what the test itself has
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**31 - 2, 2**31, 2**63, 2**70, 1e308, 1.5),
    *("", "x", "\ud800", [], [1], {}, {"a": 1}),
)


def test_good_files_are_accepted(tmp_path: Path) -> None:
    for number, reader in enumerate(READERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader.read(reader.make(folder))


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_end_in_a_message(tmp_path: Path, name: str) -> None:
    """In a process of its own: a library that crashes, or fills the memory, is told from one that refuses."""
    path = READERS[name].make(tmp_path)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            status = len(failures(READERS[name], path, tmp_path / "failures")) > 0
        os._exit(int(status))
    _, ended = os.waitpid(child, 0)
    told = (tmp_path / "failures").read_text() if (tmp_path / "failures").exists() else ""
    assert os.WIFEXITED(ended) and os.WEXITSTATUS(ended) == 0, f"ended with {ended}\n{told}"


def failures(reader: Reader, path: Path, report: Path) -> list[str]:
    """What went wrong, each once; also written to ``report``."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, hard))
    good, draw, found = path.read_bytes(), random.Random(0), dict[str, str]()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that panic say so
    for number in range(FILES):
        path.write_bytes(mutated(good, draw, json_lines=reader.json_lines))
        try:
            reader.read(path)
        except reader.refuses:
            continue
        except BaseException as error:  # noqa: BLE001 - any other error is what this test looks for
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.setdefault(f"{type(error).__name__} in {where.name}", f"file {number}: {error!r:.200}")
    report.write_text("\n".join(f"{name}: {what}" for name, what in found.items()))
    return list(found)


def mutated(good: bytes, draw: random.Random, *, json_lines: bool) -> bytes:
    """A few changes of bytes or, of JSON, of values."""
    if json_lines and draw.random() < 0.6:
        return with_other_value(good, draw)
    content = bytearray(good)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place : place + draw.choice((1, 4, 8))] = draw.randbytes(draw.choice((1, 4, 8)))
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + draw.choice((1, 8, 100))]
        else:
            start = draw.randrange(len(content) + 1)
            content[place:place] = content[start : start + draw.choice((1, 8, 100))]
    return bytes(content)


def with_other_value(good: bytes, draw: random.Random) -> bytes:
    """JSON, or lines of it, with one value, or one key, in another's place."""
    try:
        trees = [json.loads(good)]
    except ValueError:
        trees = [json.loads(line) for line in good.splitlines()]
    place = draw.randrange(len(trees))
    trees[place] = replaced(trees[place], draw)
    return "".join(json.dumps(tree) + "\n" for tree in trees).encode()


def replaced(tree: Any, draw: random.Random) -> Any:
    inner: list[Any] = []
    if isinstance(tree, dict | list):
        inner = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not inner or draw.random() < 0.15:
        return copy.deepcopy(draw.choice(VALUES))
    key = draw.choice(inner)
    if draw.random() < 0.1:
        del tree[key]
    else:
        tree[key] = replaced(tree[key], draw)
    return tree
