"""Where tokenizers come from and what ends a document: each file and name against the
library that made it.
"""

from __future__ import annotations

import base64
import inspect
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers.text.libraries import NullTokenizer as MegatronNull
from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer as MegatronSentencePiece
from megatron.core.tokenizers.text.libraries import TikTokenTokenizer as MegatronTikToken
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.implementations import ByteLevelBPETokenizer

from megatron_hyperrouter.data.text.corpus import BadText
from megatron_hyperrouter.data.tokenize import other_libraries
from megatron_hyperrouter.data.tokenize.tokenizer import (
    Tokenizer,
    TokenizerOptions,
    build_tokenizer,
    tokenizer_from,
)
from megatron_hyperrouter.errors import ConfigError, DataError, HostError

TEXT = inspect.getsource(json.decoder) + "Zażółć gęślą jaźń — 東京 🙂\n\n\tnaïve\r\n</s> 12345  \n"
SOURCES = [
    inspect.getsource(module) for module in (json.decoder, json.encoder, json.scanner, inspect, base64)
]


def byte_level(specials: list[str], words: int = 300) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def of_file(path: Path | str, kind: str = "HuggingFaceTokenizer", **more: object) -> Tokenizer:
    return tokenizer_from(TokenizerOptions(kind, str(path), **more))


class TestEndOfDocument:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        byte_level(["<|endoftext|>", "</s>", "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    @pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
    def test_settings_of_the_tokenizer_name_it(self, folder: Path, token: object) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token, "bos_token": None}))
        wanted = Backend.from_file(str(folder / "tokenizer.json")).token_to_id("<|im_end|>")
        assert of_file(folder).eod == of_file(folder / "tokenizer.json").eod == wanted

    def test_map_of_special_tokens_names_it(self, folder: Path) -> None:
        (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
        assert of_file(folder).eod == 1

    def test_a_name_that_the_vocabulary_lacks_is_refused(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<other>"}')
        with pytest.raises(DataError, match="eos_token of the tokenizer, <other>, is not in its vocabulary"):
            _ = of_file(folder).eod
        assert of_file(folder, eod_token="</s>").eod == 1

    def test_the_flag_comes_first(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        assert of_file(folder, eod_token="</s>").eod == 1
        with pytest.raises(
            DataError, match=r"(?s)--eod-token <none> is not in the vocabulary.*<\|endoftext\|>"
        ):
            _ = of_file(folder, eod_token="<none>").eod

    @pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
    def test_damaged_settings(self, folder: Path, content: str) -> None:
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json"):
            _ = of_file(folder).eod

    def test_null_tokenizer_counts_as_megatron(self) -> None:
        theirs, ours = MegatronNull(1000), build_tokenizer("NullTokenizer", vocab_size=1000)
        assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)


class TestVocabAndMerges:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("pair")
        byte_level(["<|endoftext|>"], 400).model.save(str(folder))
        return folder

    def theirs(self, folder: Path) -> ByteLevelBPETokenizer:
        return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    @given(text=st.text() | st.sampled_from(SOURCES))
    def test_ids_of_the_library(self, folder: Path, text: str) -> None:
        assert of_file(folder).encode(text) == self.theirs(folder).encode(text).ids

    def test_every_way_to_name_them(self, folder: Path) -> None:
        expected = self.theirs(folder).encode(TEXT).ids
        pair = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
        named = tokenizer_from(TokenizerOptions("GPT2BPETokenizer", **pair))
        for ours in (named, of_file(folder, "GPT2BPETokenizer"), of_file(folder / "vocab.json")):
            assert ours.encode(TEXT) == expected
            assert ours.decode(expected) == TEXT
            assert ours.eod == 0
            assert ours.encode("a<|endoftext|>")[-1] == 0
            assert int(ours.token_bytes_V()[expected].sum()) == len(TEXT.encode())
        assert named.identity() == of_file(folder).identity() | {"type": "GPT2BPETokenizer"}

    def test_one_of_the_two_is_missing(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="must be given with GPT2BPETokenizer"):
            tokenizer_from(TokenizerOptions("GPT2BPETokenizer", vocab_file=str(folder / "vocab.json")))
        (tmp_path / "vocab.json").write_text("{}")
        with pytest.raises(
            DataError, match=r"the folder has neither tokenizer\.json nor vocab\.json with merges\.txt"
        ):
            of_file(tmp_path)

    def test_other_classes_cut_words_in_another_way(self, folder: Path, tmp_path: Path) -> None:
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        with pytest.raises(DataError, match="only for GPT-2, not for the class CLIPTokenizer"):
            of_file(tmp_path)


class TestHub:
    """The library's own cache stands in for the hub, which a test cannot reach."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        import huggingface_hub.constants

        model = tmp_path / "models--some--model"
        snapshot = model / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("0" * 40)
        byte_level(["<|endoftext|>", "</s>"]).save(str(snapshot / "tokenizer.json"))
        (snapshot / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        return snapshot

    def test_name_of_a_model(self, cache: Path) -> None:
        ours, theirs = of_file("some/model"), Backend.from_file(str(cache / "tokenizer.json"))
        assert ours.encode(TEXT) == theirs.encode(TEXT).ids
        assert ours.eod == theirs.token_to_id("</s>")
        assert ours.identity() == of_file(cache).identity()

    def test_the_library_finds_the_same_file(self, cache: Path) -> None:
        assert of_file("some/model").encode(TEXT) == Backend.from_pretrained("some/model").encode(TEXT).ids

    def test_unknown_model(self, cache: Path) -> None:
        with pytest.raises(
            DataError, match="no/model: this is not a file, and the Hugging Face hub does not have it"
        ):
            of_file("no/model")


class TestSentencePiece:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()),
            model_prefix=str(prefix),
            model_type="bpe",
            vocab_size=500,
            byte_fallback=True,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
        return f"{prefix}.model"

    @pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "Llama2Tokenizer"])
    def test_ids_of_the_library(self, model: str, kind: str) -> None:
        ours, theirs = of_file(model, kind), sentencepiece.SentencePieceProcessor(model_file=model)
        megatron = MegatronSentencePiece(model)
        assert ours.encode(TEXT) == theirs.encode(TEXT) == megatron.text_to_ids(TEXT)
        assert ours.decode(ours.encode(TEXT)) == theirs.decode(theirs.encode(TEXT))
        assert (
            (ours.vocab_size, ours.eod)
            == (len(theirs), theirs.eos_id())
            == (megatron.vocab_size, megatron.eos_id)
        )
        assert of_file(model, kind, eod_token="<unk>").eod == theirs.unk_id()
        with pytest.raises(DataError, match="--eod-token <none>"):
            _ = of_file(model, kind, eod_token="<none>").eod

    def test_bytes_add_up_to_the_text_and_the_space_before_it(self, model: str) -> None:
        ours, text = of_file(model, "Llama2Tokenizer"), "Zażółć gęślą 東京 🙂 naïve"
        assert int(ours.token_bytes_V()[ours.encode(text)].sum()) == len(text.encode()) + 1

    def test_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.model").write_bytes(b"not a model")
        for name in ("a.model", "b.model"):
            with pytest.raises(DataError, match=name):
                of_file(tmp_path / name, "Llama2Tokenizer")

    def test_missing_library(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(HostError, match="pip install sentencepiece"):
            of_file(model, "Llama2Tokenizer")


class TestTikToken:
    @pytest.fixture(scope="class")
    @classmethod
    def ranks(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        pairs = [TEXT[i : i + 2].encode() for i in range(0, 900, 3)]
        strings = [bytes([each]) for each in range(256)] + [
            each for each in dict.fromkeys(pairs) if len(each) == 2
        ]
        entries = [
            {"rank": rank, "token_bytes": base64.b64encode(each).decode(), "token_str": None}
            for rank, each in enumerate(strings)
        ]
        path = tmp_path_factory.mktemp("ranks") / "vocab.json"
        path.write_text(json.dumps(entries))
        return str(path)

    @pytest.mark.parametrize("pattern", ["v1", "v2"])
    def test_ids_of_megatron(self, ranks: str, pattern: str) -> None:
        size = 1000 + len(json.loads(Path(ranks).read_text()))
        theirs = MegatronTikToken(ranks, vocab_size=size, pattern=pattern)
        ours = of_file(ranks, "TikTokenizer", tiktoken_pattern=pattern)
        assert ours.encode(TEXT) == theirs.text_to_ids(TEXT)
        assert ours.decode(ours.encode(TEXT)) == TEXT
        assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (size, 2)
        plain = TEXT.replace("</s>", "")
        assert int(ours.token_bytes_V()[ours.encode(plain)].sum()) == len(plain.encode())

    def test_fewer_ids_and_other_special_tokens(self, ranks: str) -> None:
        names = ("<unk>", "</s>", "<end>", "<s>", "<mask>", "<pad>", "<cls>", "<sep>")
        theirs = MegatronTikToken(ranks, special_tokens=list(names), num_special_tokens=10, vocab_size=300)
        ours = of_file(
            ranks,
            "TikTokenizer",
            vocab_size=300,
            tiktoken_num_special_tokens=10,
            tokenizer_special_tokens=names,
        )
        assert ours.encode(TEXT) == theirs.text_to_ids(TEXT)
        assert (ours.vocab_size, ours.eod) == (300, theirs.eod)
        more = {"tiktoken_num_special_tokens": 10, "tokenizer_special_tokens": names}
        assert of_file(ranks, "TikTokenizer", eod_token="<end>", **more).eod == 2
        with pytest.raises(DataError, match="--eod-token <none>"):
            _ = of_file(ranks, "TikTokenizer", eod_token="<none>").eod

    def test_patterns_are_those_of_the_library_megatron_ships(self) -> None:
        from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as theirs

        assert other_libraries.PATTERNS["v1"] == theirs._PATTERN_TIKTOKEN_V1
        assert other_libraries.PATTERNS["v2"] == theirs._PATTERN_TIKTOKEN_V2

    @pytest.mark.parametrize(
        "content", ["{}", "[1]", '[{"rank": 1, "token_bytes": "AA=="}]', "[]", "[" * 10**5]
    )
    def test_foreign_file(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=r"a\.json: this is not a rank file for TikTokenizer"):
            of_file(tmp_path / "a.json", "TikTokenizer")

    def test_too_many_ids_are_asked_for(self, ranks: str) -> None:
        with pytest.raises(DataError, match="--vocab-size 100000 needs 99000"):
            of_file(ranks, "TikTokenizer", vocab_size=100_000)
        with pytest.raises(DataError, match="--vocab-size 0 needs"):
            of_file(ranks, "TikTokenizer", vocab_size=0)

    def test_a_text_that_the_library_refuses_is_a_message(self, ranks: str) -> None:
        with pytest.raises(BadText, match=r"the tokenizer .*vocab\.json cannot encode ' +' ...: "):
            of_file(ranks, "TikTokenizer").encode(" " * 1_000_000 + "a")

    def test_wrong_special_tokens(self, ranks: str) -> None:
        with pytest.raises(ConfigError, match=r"--tokenizer-special-tokens.*must contain </s>"):
            of_file(ranks, "TikTokenizer", tokenizer_special_tokens=("<a>",))

    def test_missing_library(self, ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert tiktoken.__version__
        monkeypatch.setitem(sys.modules, "tiktoken", None)
        with pytest.raises(HostError, match="pip install tiktoken"):
            of_file(ranks, "TikTokenizer")


class TestBounds:
    def test_huge_ids_are_refused(self, tmp_path: Path) -> None:
        Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        text = (tmp_path / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(text.replace('"b": 1', '"b": 2147483646'))
        with pytest.raises(
            DataError, match="token 'b' has id 2147483646, but ids must be less than 16777216"
        ):
            of_file(tmp_path)

    def test_text_that_explodes_is_refused(self, tmp_path: Path) -> None:
        backend = byte_level(["</s>"])
        backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "b" * 200_000)])
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(DataError, match="its normalizer inserts a string of 200000 characters"):
            of_file(tmp_path)

    def test_a_pattern_that_panics_is_a_message(self, tmp_path: Path) -> None:
        from tokenizers import Regex

        backend = byte_level(["</s>"])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(BadText, match=r"the tokenizer .* cannot encode"):
            of_file(tmp_path).encode("a" * 60 + "!")

    def test_added_tokens_count(self, tmp_path: Path) -> None:
        backend = byte_level(["</s>"])
        backend.add_special_tokens([AddedToken("<eos>")])
        backend.save(str(tmp_path / "tokenizer.json"))
        assert of_file(tmp_path, eod_token="<eos>").eod == backend.get_vocab_size() - 1
