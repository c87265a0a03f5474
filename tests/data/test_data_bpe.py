"""BPE training is deterministic, complete and lossless, and reports the true size."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.tokenizer import HuggingFaceTokenizer
from megatron_hyperrouter.errors import ConfigError, DataError

TEXTS = [
    Path(json.__file__).with_name(name).read_text()
    for name in ("decoder.py", "encoder.py", "scanner.py", "tool.py")
]


def test_same_texts_same_file(tmp_path: Path) -> None:
    sizes = [train_bpe(iter(TEXTS), 500, str(tmp_path / name)) for name in "ab"]
    assert sizes == [500, 500]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    train_bpe(iter(TEXTS[:1]), 500, str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


def test_vocabulary_has_every_byte_and_ends_documents(tmp_path: Path) -> None:
    train_bpe(iter(["ab" * 50]), 258, str(tmp_path / "t.json"))
    ours = HuggingFaceTokenizer(str(tmp_path / "t.json"))
    assert ours.vocab_size == 258
    assert ours.eod == 0
    assert sorted(ours.token_bytes_V().tolist()) == [0] + [1] * 256 + [2]
    strange = "".join(map(chr, range(0x250))) + "東🙂"  # nothing of which was in the text
    assert ours.decode(ours.encode(strange)) == strange
    assert len(ours.encode("ab" * 50)) == 50


def test_a_signal_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as in the command

    class Asked(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Asked

    def many() -> Iterator[str]:
        for number in range(300_000):
            if number == 1000:
                os.kill(os.getpid(), signal.SIGUSR1)
            taken.append(number)
            yield f"word {number} " * 9

    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Asked):
            train_bpe(many(), 300, str(tmp_path / "t.json"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(taken) < 200_000 and not list(tmp_path.iterdir())


def test_bytes_alone_need_257(tmp_path: Path) -> None:
    assert train_bpe(iter(["ab" * 50]), 257, str(tmp_path / "t.json")) == 257
    with pytest.raises(ConfigError, match=r"--vocab-size = 256: must be at least 257"):
        train_bpe(iter(TEXTS), 256, str(tmp_path / "u.json"))
    assert not (tmp_path / "u.json").exists()


def test_little_text_gives_fewer_tokens(tmp_path: Path) -> None:
    assert train_bpe(iter(["ab"]), 1000, str(tmp_path / "t.json")) == 258


def test_no_text_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("from before")
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_bpe(iter(texts), 300, str(tmp_path / "t.json"))
    assert (tmp_path / "t.json").read_text() == "from before"


def test_bad_text_far_into_the_corpus_is_told_as_it_is(tmp_path: Path) -> None:
    def texts():
        yield from TEXTS
        raise DataError("corpus.jsonl, line 5: broken")

    with pytest.raises(DataError, match="line 5"):
        train_bpe(texts(), 300, str(tmp_path / "t.json"))
    assert not list(tmp_path.iterdir())
