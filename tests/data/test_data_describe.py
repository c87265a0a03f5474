"""What inspect_data.py says, against the arrays that were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from encode_settings import settings

from megatron_hyperrouter.data.store import manifest
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.describe import describe
from megatron_hyperrouter.data.tokenize.preprocess import preprocess
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([*b"hello", 256])
        writer.add_document(list(b"one two"), [3, 4])
        writer.add_document([], [])
        writer.add_document(list(b"x" * 1234))
    return str(tmp_path / "p")


def test_numbers(prefix: str) -> None:
    found = describe(prefix, num_first=3)
    assert found["documents"] == "4"
    assert found["sequences"] == "4"
    assert found["tokens"] == "1,247"
    assert found["dtype"] == "uint16"
    assert found["lengths"] == "min 0, median 6.5, max 1,234"
    assert found["empty documents"] == "1"
    assert found["first tokens"] == "104 101 108"
    for ending in ("bin", "idx"):
        assert (
            found[f"sha256 .{ending}"] == hashlib.sha256(Path(f"{prefix}.{ending}").read_bytes()).hexdigest()
        )
    assert "first text" not in found


def test_progress_ends_with_all_bytes(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BLOCK", 100)
    told: list[tuple[int, int]] = []
    describe(prefix, progress=lambda done, total: told.append((done, total)))
    total = sum(Path(f"{prefix}.{ending}").stat().st_size for ending in ("bin", "idx"))
    assert told[0] == (100, total) and told[-1] == (total, total) and len(told) > 10
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_name_with_an_ending_is_the_same(prefix: str) -> None:
    assert describe(prefix + ".bin") == describe(prefix + ".idx") == describe(prefix)


def test_text(prefix: str) -> None:
    assert (
        describe(prefix, num_first=9, tokenizer=build_tokenizer("ByteTokenizer"))["first text"]
        == "'hello<|endoftext|>one'"
    )


def test_a_tokenizer_of_other_data(prefix: str) -> None:
    with pytest.raises(
        DataError, match=r"p\.bin: token id 256 is outside the tokenizer's vocabulary of 100 ids"
    ):
        describe(prefix, tokenizer=build_tokenizer("NullTokenizer", vocab_size=99))
    with IndexedWriter(f"{prefix}-padded", np.int32) as writer:
        writer.add_document([1, -1])
    with pytest.raises(DataError, match="token id -1 is outside the tokenizer's vocabulary of 257 ids"):
        describe(f"{prefix}-padded", tokenizer=build_tokenizer("ByteTokenizer"))


def test_a_tokenizer_that_did_not_make_the_data(tmp_path: Path) -> None:
    """The manifest knows it, whether or not the files are compared with it."""
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n')
    preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "a"), settings("ByteTokenizer", None, ("text",)))
    train_bpe(iter(["one two"]), 300, str(tmp_path / "tokenizer.json"))
    other = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
    for verify in (False, True):
        with pytest.raises(DataError, match="were made with the tokenizer ByteTokenizer and 257 ids, "):
            describe(str(tmp_path / "a_text_document"), tokenizer=other, verify=verify)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.idx"):
        describe(str(tmp_path / "gone"))
