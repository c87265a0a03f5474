"""Encoding back ends: the same ids as the library ``tokenizers``, refused where they differ, and bounded
memory.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from megatron_hyperrouter.data.tokenize import backends, bpe
from megatron_hyperrouter.data.tokenize.backends import (
    PROBES,
    GigatokenTokenizer,
    build_encoder,
    choose_encoder,
)
from megatron_hyperrouter.data.tokenize.tokenizer import HuggingFaceTokenizer, TokenizerOptions
from megatron_hyperrouter.errors import ConfigError, DataError, HostError

pytest.importorskip("gigatoken")
FIRST = [("a.jsonl, document 1", "def f(x):\n    return x"), ("a.jsonl, document 2", "żółw 東京")]


def chosen(*arguments: object) -> str:
    tokenizer, name = choose_encoder(TokenizerOptions(*arguments[:2]), *arguments[2:])
    assert isinstance(tokenizer, GigatokenTokenizer) == (name == "gigatoken")
    return name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    bpe.train_bpe(
        iter([inspect.getsource(json.decoder), inspect.getsource(inspect), *(probe * 3 for probe in PROBES)]),
        900,
        path,
    )
    return path


@pytest.fixture(scope="module")
def library(model: str) -> Library:
    return Library.from_file(model)


@pytest.fixture(scope="module")
def fast(model: str) -> GigatokenTokenizer:
    return GigatokenTokenizer(model)


PIECES = st.sampled_from(
    [
        "'s",
        "'LL",
        "<|endoftext|>",
        "<|endo",
        "\r\n",
        "\n\n",
        "  ",
        "\u00a0",
        "123",
        " word",
        "\u0301",
        "\u017f",
        "🙂",
        "東",
    ]
)


@given(
    text=st.one_of(
        st.text(max_size=60), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=20).map("".join)
    )
)
def test_ids_are_those_of_tokenizers(fast: GigatokenTokenizer, library: Library, text: str) -> None:
    (found,) = fast.encode_batch([text])
    assert found.dtype == np.int32
    assert found.tolist() == library.encode(text, add_special_tokens=False).ids


def test_probes_and_long_texts(fast: GigatokenTokenizer, library: Library) -> None:
    texts = [*PROBES, inspect.getsource(inspect) * 3]
    for found, text in zip(fast.encode_batch(texts), texts, strict=True):
        assert found.tolist() == library.encode(text, add_special_tokens=False).ids


def test_auto_takes_the_fastest_that_knows_the_tokenizer(model: str, tmp_path: Path) -> None:
    told: list[str] = []
    assert chosen("HuggingFaceTokenizer", model, "auto", FIRST, told.append) == "gigatoken"
    assert chosen("HuggingFaceTokenizer", model, "tokenizers", FIRST, told.append) == "tokenizers"
    assert chosen("ByteTokenizer", None, "auto", FIRST, told.append) == "tokenizers"
    assert not told
    words = Library(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    assert chosen("HuggingFaceTokenizer", str(tmp_path), "auto", FIRST, told.append) == "tokenizers"
    assert "does not support the tokenizer" in told[0] and "WordLevel" in told[0]
    with pytest.raises(
        ConfigError, match=r"--tokenizer-backend = gigatoken: does not support the tokenizer .*WordLevel"
    ):
        chosen("HuggingFaceTokenizer", str(tmp_path), "gigatoken", FIRST)


def test_the_named_back_end_encodes(model: str) -> None:
    assert (
        type(build_encoder(TokenizerOptions("HuggingFaceTokenizer", model), "gigatoken"))
        is GigatokenTokenizer
    )
    assert (
        type(build_encoder(TokenizerOptions("HuggingFaceTokenizer", model), "tokenizers"))
        is HuggingFaceTokenizer
    )


def test_a_back_end_that_differs_is_refused_by_document_and_id(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = GigatokenTokenizer.encode_batch

    def wrong(self: GigatokenTokenizer, texts: list[str]) -> list[np.ndarray]:
        found = [ids.copy() for ids in true(self, texts)]
        for text, ids in zip(texts, found, strict=True):
            if "żółw" in text:
                ids[1] = 7
        return found

    expected = HuggingFaceTokenizer(model).encode("żółw 東京")
    assert expected[1] != 7
    monkeypatch.setattr(GigatokenTokenizer, "encode_batch", wrong)
    monkeypatch.setattr(backends, "PROBES", PROBES[:2])
    with pytest.raises(
        DataError,
        match=(
            r"differ at token 2 of a\.jsonl, document 2: gigatoken gives id 7, and tokenizers gives id "
            rf"{expected[1]}\n"
        ),
    ) as caught:
        chosen("HuggingFaceTokenizer", model, "gigatoken", FIRST)
    assert "--tokenizer-backend tokenizers" in caught.value.remedy
    told: list[str] = []
    assert chosen("HuggingFaceTokenizer", model, "auto", FIRST, told.append) == "tokenizers"
    assert "token 2 of a.jsonl, document 2" in told[0]


def test_a_text_that_ends_early_or_late_differs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = GigatokenTokenizer.encode_batch
    monkeypatch.setattr(
        GigatokenTokenizer, "encode_batch", lambda self, texts: [ids[:-1] for ids in true(self, texts)]
    )
    with pytest.raises(
        DataError, match=r"token 1 of the text ' ': gigatoken gives no id, and tokenizers gives id \d+"
    ):
        chosen("HuggingFaceTokenizer", model, "gigatoken", FIRST)


def test_hard_texts_are_compared_even_where_the_corpus_is_plain(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that drops one accent is found by the probes, not by a corpus in ASCII."""
    true = GigatokenTokenizer.encode_batch
    monkeypatch.setattr(
        GigatokenTokenizer,
        "encode_batch",
        lambda self, texts: true(self, [t.replace("\u0301", "") for t in texts]),
    )
    with pytest.raises(DataError, match="the text 'caf"):
        chosen("HuggingFaceTokenizer", model, "gigatoken", [("plain", "plain")])


def test_not_installed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    told: list[str] = []
    assert chosen("HuggingFaceTokenizer", model, "auto", FIRST, told.append) == "tokenizers"
    assert not told
    with pytest.raises(HostError, match="needs the gigatoken library") as caught:
        chosen("HuggingFaceTokenizer", model, "gigatoken", FIRST)
    assert caught.value.remedy == "run: pip install gigatoken"


def test_settings(model: str) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-backend = quick: is not a backend"):
        chosen("HuggingFaceTokenizer", model, "quick", FIRST)
    with pytest.raises(
        ConfigError, match="--tokenizer-backend = gigatoken: applies only to HuggingFaceTokenizer"
    ):
        chosen("ByteTokenizer", None, "gigatoken", FIRST)


@pytest.mark.parametrize("blind", [False, True])
def test_a_full_cache_is_emptied(
    model: str, library: Library, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    monkeypatch.setattr(backends, "_LOOK_EVERY", 100)
    monkeypatch.setattr(backends, "_BLIND_LIMIT", 300)
    if blind:
        monkeypatch.setattr(backends, "_resident_bytes", lambda: None)
    else:
        sizes = iter(range(0, 1 << 40, backends._CACHE_LIMIT // 2 + 1))
        monkeypatch.setattr(backends, "_resident_bytes", lambda: next(sizes))
    loads = []
    true = GigatokenTokenizer._load_fast
    monkeypatch.setattr(GigatokenTokenizer, "_load_fast", lambda self: loads.append(1) or true(self))
    tokenizer = GigatokenTokenizer(model)
    for number in range(20):
        text = f"{number} is a number, and this is a text of more than 50 characters"
        assert tokenizer.encode(text) == library.encode(text).ids
    assert 3 <= len(loads) <= 8


def test_a_file_that_is_not_needed_is_told():
    said: list[str] = []
    choose_encoder(TokenizerOptions("ByteTokenizer", "tokenizer.json"), "auto", [], said.append)
    assert said == ["--tokenizer-model is ignored: ByteTokenizer needs no file"]
