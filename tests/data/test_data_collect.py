"""A corpus from a folder: which files, in which order, and no half-written output."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_hyperrouter.data.text.collect import default_root, find_text_files, read_text_file, write_corpus
from megatron_hyperrouter.errors import DataError

KEPT = {
    "one.py": "print(1)\n",
    "deep/er/two.txt": "żółw\n",
    "deep/README": "# readme\r\n",
    "three.md": "\ufeffmark",
    "é.rst": "x",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name, text in KEPT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    for name in (
        "__pycache__/x.py",
        "site-packages/y.py",
        "deep/dist-packages/z.py",
        ".hidden/h.py",
        ".secret",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left out\n")
    (root / "latin.txt").write_bytes(b"caf\xe9 in another encoding")
    (root / "early.bin").write_bytes(b"\x00\x01text")
    (root / "late.bin").write_bytes(b"x" * 20000 + b"\x00")
    (root / "empty.py").write_bytes(b"")
    (root / "blank.py").write_bytes(b" \n\n")
    (root / "link.py").symlink_to(root / "one.py")
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe")
    return root


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_text_file_once_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "corpus.jsonl"
    made = write_corpus(str(tree), str(out))
    assert {line["source"]: line["text"] for line in lines(out)} == {
        name: text.removeprefix("\ufeff") for name, text in KEPT.items()
    }
    assert all(list(line) == ["text", "source"] for line in lines(out))
    assert (made.documents, made.size, made.left_out) == (len(KEPT), out.stat().st_size, 5)
    assert os.listdir(out.parent) == ["corpus.jsonl"]


def test_order_is_that_of_the_hashed_names(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus.jsonl"
    write_corpus(str(tree), str(out))
    assert [line["source"] for line in lines(out)] == sorted(
        KEPT, key=lambda name: hashlib.sha256(name.encode()).hexdigest()
    )
    again = tmp_path / "again.jsonl"
    write_corpus(str(tree) + "/", str(again))
    assert again.read_bytes() == out.read_bytes()


def test_no_more_bytes_than_asked(tree: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    write_corpus(str(tree), str(whole))
    sizes = [len(line) for line in whole.read_bytes().splitlines(keepends=True)]
    for limit in (sizes[0], sum(sizes[:2]) - 1, sum(sizes[:3]), sum(sizes) + 99):
        write_corpus(str(tree), str(part), max_bytes=limit)
        fit = max(n for n in range(len(sizes) + 1) if sum(sizes[:n]) <= limit)
        assert part.read_bytes() == whole.read_bytes()[: sum(sizes[:fit])]


def test_a_first_document_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    first, second = sorted(("a", "b"), key=lambda name: hashlib.sha256(name.encode()).digest())
    (root / first).write_text("long " * 100)
    (root / second).write_text("short")
    write_corpus(str(root), str(tmp_path / "out"), max_bytes=100)
    assert [line["source"] for line in lines(tmp_path / "out")] == [second]


def test_no_text_and_no_folder(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("from before")
    (tmp_path / "none").mkdir()
    for root, limit, message in (
        (tmp_path / "none", None, "there are no files"),
        (tree, 5, "of at most 5 bytes"),
        (tmp_path / "gone", None, "no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            write_corpus(str(root), str(tmp_path / "out"), max_bytes=limit)
    assert (tmp_path / "out").read_text() == "from before"
    assert not list(tmp_path.glob("*.partial"))


def test_an_interruption_leaves_what_was_there(tree: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert list(tmp_path.glob("*.partial"))
        raise KeyboardInterrupt

    (tmp_path / "out").write_text("from before")
    with pytest.raises(KeyboardInterrupt):
        write_corpus(str(tree), str(tmp_path / "out"), progress=stop)
    assert (tmp_path / "out").read_text() == "from before"
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_one_at_once_is_refused_and_does_no_harm(tree: Path, tmp_path: Path) -> None:
    def start_another(done: int, total: int) -> None:
        with pytest.raises(DataError, match="out: another process is writing this file"):
            write_corpus(str(tree), str(tmp_path / "out"))

    write_corpus(str(tree), str(tmp_path / "alone"))
    (tmp_path / "out.partial").write_text("of a process that was killed")
    write_corpus(str(tree), str(tmp_path / "out"), progress=start_another)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "alone").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_text("a")
    calls: list[tuple[int, int]] = []
    write_corpus(
        str(tmp_path / "root"),
        str(tmp_path / "out"),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 1)]


def test_unreadable_is_no_text(tmp_path: Path) -> None:
    assert read_text_file(str(tmp_path / "gone")) is None
    assert read_text_file(str(tmp_path)) is None


def test_a_folder_that_cannot_be_read_is_told(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("er"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="deep/er cannot be read: Permission denied"):
        write_corpus(str(tree), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_default_is_the_standard_library() -> None:
    assert os.path.isfile(os.path.join(default_root(), "json", "decoder.py"))
    sources = find_text_files(default_root())
    assert "json/decoder.py" in sources
    assert not any("site-packages" in source for source in sources)
