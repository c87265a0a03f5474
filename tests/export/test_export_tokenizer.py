"""A run's data still fit after its model has left as a Hugging Face folder and come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hyperrouter.data.store.manifest import same_tokenizer
from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer, build_tokenizer
from megatron_hyperrouter.data.tokenize.transformers_files import write_tokenizer
from megatron_hyperrouter.importing.settings import tokenizer_settings

TEXT = "def f(x):\n    return x + x\n" * 50


@pytest.fixture
def file(tmp_path: Path) -> Path:
    train_bpe(iter([TEXT]), 300, str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def sent_and_taken_back(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir()
    assert write_tokenizer(folder, tokenizer, seq_length=8)
    settings = tokenizer_settings(folder / "tokenizer.json", rows=384)
    return build_tokenizer(settings["tokenizer_type"], settings.get("tokenizer_model"))


@pytest.mark.parametrize("indent", [None, 1, 2])  # the library writes one form only
def test_the_file_of_the_run_leaves_as_it_is(file: Path, tmp_path: Path, indent: int | None) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), indent=indent), encoding="utf-8")
    before = build_tokenizer("HuggingFaceTokenizer", str(file))
    after = sent_and_taken_back(before, tmp_path / "out")
    assert same_tokenizer(before.identity(), after.identity())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()


def test_a_file_that_truncates_leaves_without_that(file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(file))
    library.enable_truncation(3)
    library.save(str(file))
    before = build_tokenizer("HuggingFaceTokenizer", str(file))
    sent_and_taken_back(before, tmp_path / "out")
    theirs = Library.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == before.encode(TEXT) and len(theirs.encode(TEXT).ids) > 3


def test_bytes_stay_bytes(file: Path, tmp_path: Path) -> None:
    before = build_tokenizer("ByteTokenizer")
    after = sent_and_taken_back(before, tmp_path / "out")
    assert after.identity() == before.identity()
