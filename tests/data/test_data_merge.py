"""Merged shards are the bytes of one run; manifests reveal shards that are missing, damaged or made with
other settings.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from encode_settings import settings

from megatron_hyperrouter.data.store.journal import Journal
from megatron_hyperrouter.data.store.manifest import read_manifest
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.text.inputs import InputRange
from megatron_hyperrouter.data.tokenize import merge as merging
from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.describe import describe
from megatron_hyperrouter.data.tokenize.merge import find_shards, merge
from megatron_hyperrouter.data.tokenize.preprocess import EncodeSettings, preprocess
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.errors import DataError

RECIPE = settings("ByteTokenizer", keys=("text", "note"), append_eod=True)
ENDINGS = (".bin", ".idx", ".manifest.json")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    records = [
        {"text": [f"document {n}", "", "x" * (n % 5)] if n % 3 else "", "note": f"note {n}"}
        for n in range(40)
    ]
    lines = [
        "".join(json.dumps(record) + "\n" for record in records[begin : begin + 20]).encode()
        for begin in (0, 20)
    ]
    (tmp_path / "a.jsonl").write_bytes(lines[0])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (tmp_path / "c.txt").write_text("plain text\n")
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]


def contents(prefix: Path, keys: tuple[str, ...] = ("text", "note")) -> list[bytes]:
    return [Path(f"{prefix}_{key}_document{ending}").read_bytes() for key in keys for ending in ENDINGS]


def shards(tmp_path: Path, inputs: list[str], of: int, recipe: EncodeSettings = RECIPE) -> str:
    for number in range(1, of + 1):
        preprocess(inputs, str(tmp_path / "p"), recipe, part=InputRange(number, of))
    return str(tmp_path / "p")


@pytest.mark.parametrize("of", [1, 2, 3, 11, 64])
def test_shards_end_to_end_are_one_run(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, of: int
) -> None:
    monkeypatch.setattr(merging, "_CHUNK", 3)
    preprocess(inputs, str(tmp_path / "whole"), RECIPE)
    before = set(tmp_path.iterdir())
    prefix = shards(tmp_path, inputs, of)
    if of == 1:
        assert contents(tmp_path / "p") == contents(tmp_path / "whole")
        return
    passed: list[tuple[int, int]] = []
    written = merge(prefix, remove_shards=True, progress=lambda done, total: passed.append((done, total)))
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {
        f"p_{key}_document{e}" for key in RECIPE.keys for e in ENDINGS
    }
    assert sorted(pair.documents for pair in written) == [41, 41]
    assert passed[-1][0] == passed[-1][1] == sum(len(content) for content in contents(tmp_path / "p")[::3])


def test_the_manifest_says_what_is_there(tmp_path: Path, inputs: list[str]) -> None:
    (pair, _) = preprocess(inputs, str(tmp_path / "p"), RECIPE)
    manifest = read_manifest(pair.prefix)
    for ending in ("bin", "idx"):
        content = Path(f"{pair.prefix}.{ending}").read_bytes()
        assert asdict(getattr(manifest, ending)) == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert (manifest.documents, manifest.sequences, manifest.tokens) == (
        pair.documents,
        pair.sequences,
        pair.tokens,
    )
    assert [(each["path"], each["bytes"]) for each in manifest.inputs] == [
        (path, Path(path).stat().st_size) for path in inputs
    ]
    assert manifest.settings == {"key": "text", "append_eod": True}
    assert manifest.tokenizer == {"type": "ByteTokenizer", "sha256": None, "vocab_size": 257}
    assert "verified" in describe(pair.prefix, verify=True)["manifest"]
    assert "manifest" not in describe(pair.prefix)


DAMAGE = {
    "changed token": (
        "bin",
        lambda data: data[:10] + b"\x01" + data[11:],
        r"p_text_document\.bin: the file has changed: its SHA-256 is \w+",
    ),
    "cut tokens": (
        "bin",
        lambda data: data[:-2],
        r"p_text_document\.bin, byte \d+: the file has \d+ bytes, but .* says \d+",
    ),
    "longer tokens": ("bin", lambda data: data + b"\0\0", r"p_text_document\.bin, byte \d+"),
    "changed index": ("idx", lambda data: data[:-1] + b"\x01", r"p_text_document\.idx: the file has changed"),
    "no manifest": ("manifest.json", None, r"manifest\.json: no such manifest"),
    "broken manifest": ("manifest.json", lambda data: data[:-9], r"manifest\.json cannot be read"),
    "foreign manifest": ("manifest.json", lambda data: b'{"version": 1}', r"not a manifest of token files"),
    "list": ("manifest.json", lambda data: b"[1]", r"not a manifest of token files"),
    "newer manifest": (
        "manifest.json",
        lambda data: data.replace(b'"version": 1', b'"version": 2'),
        "has version 2, but this program reads version 1",
    ),
    "other counts": (
        "manifest.json",
        lambda data: data.replace(b'"documents": 41', b'"documents": 42'),
        "says 42 documents, but the files have 41",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pair_is_not_verified(tmp_path: Path, inputs: list[str], damage: str) -> None:
    ending, change, message = DAMAGE[damage]
    (pair, _) = preprocess(inputs, str(tmp_path / "p"), RECIPE)
    path = Path(f"{pair.prefix}.{ending}")
    content = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(content))
    with pytest.raises(DataError, match=message) as caught:
        describe(pair.prefix, verify=True)
    assert caught.value.remedy


def test_shards_that_do_not_fit(tmp_path: Path, inputs: list[str]) -> None:
    with pytest.raises(DataError, match="no shards"):
        merge(str(tmp_path / "p"))
    prefix = shards(tmp_path, inputs, 3)
    name = f"{prefix}.shard-00002-of-00003_text_document"
    manifest = Path(f"{name}.manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(DataError, match="shard 2/3 of the key 'text' is missing") as caught:
        merge(prefix)
    assert "--shard" in caught.value.remedy
    manifest.write_bytes(content.replace(b'"append_eod": true', b'"append_eod": false'))
    with pytest.raises(
        DataError, match=r"shard-00002-of-00003.*settings .*False.*, but .*True.* in .*shard-00001"
    ):
        merge(prefix)
    manifest.write_bytes(content)
    tokens = Path(f"{name}.bin").read_bytes()
    Path(f"{name}.bin").write_bytes(tokens[:-1] + b"\x07")
    with pytest.raises(DataError, match=r"shard-00002-of-00003_text_document\.bin: the file does not match"):
        merge(prefix)
    Path(f"{name}.bin").write_bytes(tokens)
    index = Path(f"{name}.idx").read_bytes()
    marks = IndexedDataset(name).document_indices.copy()
    assert marks[1] + 1 <= marks[2]
    marks[1] += 1  # the documents have other ends, which nothing but the checksum shows
    Path(f"{name}.idx").write_bytes(index[: -marks.nbytes] + marks.tobytes())
    with pytest.raises(DataError, match=r"shard-00002-of-00003_text_document\.idx: the file does not match"):
        merge(prefix)
    Path(f"{name}.idx").write_bytes(index)
    shards(tmp_path, inputs, 2)
    with pytest.raises(DataError, match=r"were made with --shard I/N for N = 2 and 3"):
        merge(prefix)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("p_") or "partial" in path.name]


def test_another_tokenizer_is_told_by_its_checksum(tmp_path: Path, inputs: list[str]) -> None:
    models = [str(tmp_path / f"{size}.json") for size in (300, 310)]
    for size, model in zip((300, 310), models, strict=True):
        train_bpe(iter([Path(inputs[0]).read_text()]), size, model)
    (pair,) = preprocess(inputs, str(tmp_path / "p"), settings("HuggingFaceTokenizer", models[0]))
    right, wrong = (build_tokenizer("HuggingFaceTokenizer", model) for model in models)
    assert "verified" in describe(pair.prefix, tokenizer=right, verify=True)["manifest"]
    for verify in (False, True):
        with pytest.raises(
            DataError, match=r"p_text_document: the data were made with the tokenizer .*300.*, not with .*"
        ):
            describe(pair.prefix, tokenizer=wrong, verify=verify)


def test_a_name_with_odd_characters(tmp_path: Path, inputs: list[str]) -> None:
    odd = str(tmp_path / "p[1].shard-x")
    for number in (1, 2):
        preprocess(inputs, odd, RECIPE, part=InputRange(number, 2))
    assert set(find_shards(odd)) == {"text", "note"}


def test_empty_shards_join_and_an_empty_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n\n')
    recipe = settings("ByteTokenizer")
    for number in (1, 2):
        preprocess([str(path)], str(tmp_path / "p"), recipe, part=InputRange(number, 2))
    with pytest.raises(DataError, match=r"a\.jsonl: all 1 documents are empty"):
        merge(str(tmp_path / "p"))


def test_shards_that_cannot_be_removed_are_a_message(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder with the sticky bit, where the shards belong to somebody else."""
    unlink = Path.unlink

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if ".shard-" in path.name:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, *arguments, **options)

    prefix = shards(tmp_path, inputs, 2)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match=r"are merged, but .*\.shard-.* cannot be removed: Operation not"):
        merge(prefix, remove_shards=True)
    assert len(contents(tmp_path / "p")) == 6


def test_two_at_once_and_an_unfinished_run_are_kept_apart(tmp_path: Path, inputs: list[str]) -> None:
    prefix = shards(tmp_path, inputs, 2)

    def second(done: int, total: int) -> None:
        with pytest.raises(DataError, match=r"p\.journal: another process is writing these files"):
            merge(prefix)
        with pytest.raises(DataError, match=r"p\.journal: another process is writing these files"):
            preprocess(inputs, prefix, RECIPE)

    merge(prefix, progress=second)
    preprocess(inputs, str(tmp_path / "whole"), RECIPE)
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert not (tmp_path / "p.journal").exists()
    journal = Journal(f"{prefix}.journal", {}, [])
    journal.close(remove=False)
    left = (tmp_path / "p.journal").read_bytes()
    with pytest.raises(
        DataError, match=r"p\.journal belongs to an unfinished preprocessing run with this output"
    ):
        merge(prefix)
    assert (tmp_path / "p.journal").read_bytes() == left
