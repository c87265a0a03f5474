"""Tokenizers: lossless, equal to the library's own encoding of the whole text, with exact byte counts."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from megatron_hyperrouter.data.tokenize import bpe, huggingface
from megatron_hyperrouter.data.tokenize.tokenizer import HuggingFaceTokenizer, build_tokenizer
from megatron_hyperrouter.errors import ConfigError, DataError, HostError

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
TEXT = inspect.getsource(json.decoder) + "\n" + "Zażółć gęślą jaźń — 東京 🙂\n\n\tnaïve\r\n" * 3
# Any characters at all, and the ones that word patterns care about, close together.
ANY_TEXT = st.text() | st.lists(
    st.sampled_from(["a", "B", "7", " ", "\n", "\t", "/", "'s", "é", "\u00a0", "東", "🙂", ").", "\r\n"])
).map("".join)


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    bpe.train_bpe(iter([TEXT]), 400, path)
    return path


@pytest.fixture(scope="module")
def ours(bpe_file: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(bpe_file)


def saved(backend: Backend, folder: Path) -> HuggingFaceTokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(str(folder))


@given(ANY_TEXT)
def test_bytes_are_ids(text: str) -> None:
    ours = build_tokenizer("ByteTokenizer")
    assert ours.encode(text) == list(text.encode())
    assert ours.decode(ours.encode(text)) == text


def test_byte_tokenizer_ends_documents_with_256() -> None:
    ours = build_tokenizer("ByteTokenizer")
    assert (ours.vocab_size, ours.eod) == (257, 256)
    assert ours.decode([*b"one", 256, *b"two\xff"]) == "one<|endoftext|>two\ufffd"
    assert ours.token_bytes_V().tolist() == [1] * 256 + [0]


@given(ANY_TEXT)
def test_bpe_is_lossless_and_its_bytes_add_up(ours: HuggingFaceTokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert int(ours.token_bytes_V()[ids].sum()) == len(text.encode())


def test_bytes_of_special_and_added_tokens(bpe_file: str, tmp_path: Path) -> None:
    backend = Backend.from_file(bpe_file)
    backend.add_tokens([AddedToken("<zażółć>", special=False)])
    backend.add_special_tokens([AddedToken("<mask>", special=True)])
    ours = saved(backend, tmp_path)
    text = "a<zażółć>b<mask><|endoftext|>"
    assert ours.decode(ours.encode(text)) == text
    assert int(ours.token_bytes_V()[ours.encode(text)].sum()) == len("a<zażółć>b".encode())
    assert ours.vocab_size == backend.get_vocab_size() == len(ours.token_bytes_V())


def test_no_bytes_where_tokens_are_not_bytes(bpe_file: str, tmp_path: Path) -> None:
    words = Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert saved(words, tmp_path).token_bytes_V() is None
    marked = Backend(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    marked.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert saved(marked, tmp_path).token_bytes_V() is None
    split = Backend.from_file(bpe_file)
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = saved(split, tmp_path)
    assert int(ours.token_bytes_V()[ours.encode(TEXT)].sum()) == len(TEXT.encode())


@given(texts=st.lists(ANY_TEXT, max_size=4), size=st.integers(1, 12))
def test_long_texts_encode_in_pieces_as_in_whole(bpe_file: str, texts: list[str], size: int) -> None:
    whole = Backend.from_file(bpe_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "_PIECE", size)
        patch.setattr(huggingface, "_GROUP", 2)
        found = HuggingFaceTokenizer(bpe_file).encode_batch(texts)
    assert [ids.tolist() for ids in found] == [whole.encode(text).ids for text in texts]


def test_real_source_is_cut_and_encodes_as_in_whole(bpe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Backend.from_file(bpe_file).encode(TEXT).ids
    monkeypatch.setattr(huggingface, "_PIECE", 200)
    assert len(list(huggingface._pieces(TEXT))) > 10
    assert "".join(huggingface._pieces(TEXT)) == TEXT
    assert HuggingFaceTokenizer(bpe_file).encode(TEXT) == whole


def with_other_words(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def with_prefix_space(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_normalizer(backend: Backend) -> None:
    backend.normalizer = normalizers.Strip()


def with_greedy_token(backend: Backend) -> None:
    backend.add_tokens([AddedToken("def", lstrip=True)])


@pytest.mark.parametrize("change", [with_other_words, with_prefix_space, with_normalizer, with_greedy_token])
def test_other_tokenizers_see_the_whole_text(
    bpe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change
) -> None:
    backend = Backend.from_file(bpe_file)
    change(backend)
    expected = backend.encode(TEXT).ids
    monkeypatch.setattr(huggingface, "_PIECE", 200)
    assert saved(backend, tmp_path).encode(TEXT) == expected


def test_truncation_padding_and_templates_of_the_file_are_left_out(bpe_file: str, tmp_path: Path) -> None:
    backend = Backend.from_file(bpe_file)
    plain = backend.encode(TEXT).ids
    backend.enable_truncation(16)
    backend.enable_padding(length=4096)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)]
    )
    assert backend.encode(TEXT).ids != plain
    assert saved(backend, tmp_path).encode(TEXT) == plain


def test_batches_equal_single_texts(ours: HuggingFaceTokenizer) -> None:
    texts = ["", "one", TEXT, "two words"]
    found = ours.encode_batch(texts)
    assert all(ids.dtype == np.int32 for ids in found)
    assert [ids.tolist() for ids in found] == [ours.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (("[SEP]", "</s>"), "</s>"),
        (("[SEP]",), "[SEP]"),
        (("</s>", "<|endoftext|>"), "<|endoftext|>"),
        (("<pad>", "<eos>", "<bos>"), "<eos>"),  # Gemma
        ((DEEPSEEK.replace("end", "begin"), DEEPSEEK), DEEPSEEK),
        (("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), "<|end_of_text|>"),  # Llama 3
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>"),  # Qwen
    ],
)
def test_end_of_document_token(tmp_path: Path, present: tuple[str, ...], expected: str) -> None:
    vocab = {name: place for place, name in enumerate(("a", *present))}
    assert saved(Backend(models.WordLevel(vocab, unk_token="a")), tmp_path).eod == vocab[expected]


def test_no_end_of_document_token(tmp_path: Path) -> None:
    ours = saved(Backend(models.WordLevel({"a": 0}, unk_token="a")), tmp_path)
    assert ours.encode("a") == [0]  # usable as long as nobody asks
    with pytest.raises(DataError, match=r"(?s)no known end-of-document token.*endoftext.*--eod-token"):
        _ = ours.eod


def test_vocabulary_with_a_gap_covers_its_highest_id(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "b": 7}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ours = saved(backend, tmp_path)
    assert ours.vocab_size == 8
    assert ours.encode("ab") == [0, 7]
    assert ours.token_bytes_V().tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: there is no such tokenizer file"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "nowhere.json"))
    with pytest.raises(
        DataError, match=r"the folder has neither tokenizer\.json nor vocab\.json with merges\.txt"
    ):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"foreign\.json: this is not a tokenizer"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "foreign.json"))
    Backend(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(DataError, match=r"empty\.json: the tokenizer has no tokens"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "empty.json"))


def test_settings_that_name_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match="--tokenizer-model"):
        build_tokenizer("HuggingFaceTokenizer")
    with pytest.raises(ConfigError, match=r"(?s)SentencePiece.*ByteTokenizer"):
        build_tokenizer("SentencePiece")
    with pytest.raises(ConfigError, match="--vocab-size"):
        build_tokenizer("NullTokenizer")


def test_null_tokenizer_has_ids_alone() -> None:
    ours = build_tokenizer("NullTokenizer", vocab_size=1000)
    # Megatron-LM's count leaves the end of a document out
    assert (ours.vocab_size, ours.eod, ours.token_bytes_V()) == (
        1001,
        1000,
        None,
    )
    with pytest.raises(ConfigError, match="encode"):
        ours.encode("text")
    with pytest.raises(ConfigError, match="decode"):
        ours.decode([1])


def test_missing_library_says_what_to_install(bpe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(HostError, match="tokenizers"):
        build_tokenizer("HuggingFaceTokenizer", bpe_file)
