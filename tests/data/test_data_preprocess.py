"""Preprocessing against a plain loop with megatron-core's own builder; workers, memory, and nothing left
after an error.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import zstandard
from encode_settings import settings
from tokenizers import Tokenizer as Backend

from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.text import corpus
from megatron_hyperrouter.data.tokenize import bpe, preprocess
from megatron_hyperrouter.errors import ConfigError, DataError, HyperRouterError

SOURCES = [inspect.getsource(module) for module in (json.decoder, json.encoder, gzip, inspect)]
RECORDS = [
    {"text": SOURCES[0], "note": "żółw"},
    {"text": "", "note": "empty text"},
    {"text": ["one sequence", "", "another\n"], "note": ""},
    {"text": [], "note": ["", ""]},
    {"text": "東京 🙂", "note": "x" * 3000},
    *({"text": source, "note": str(len(source))} for source in SOURCES),
    {"text": "last", "note": "last"},
]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    bpe.train_bpe(iter(SOURCES), 600, path)
    return path


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def both(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def by_megatron(
    prefix: str, documents: list[list[list[int]]], eod: int | None, dtype: type
) -> tuple[bytes, bytes]:
    """What Megatron-LM's tool writes: its rules in a loop over (document, sequence, ids), and megatron-core's
    builder.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for sequences in documents:
        ids: list[int] = []
        lengths: list[int] = []
        for sequence in sequences:
            if sequence:
                ids.extend(sequence)
                lengths.append(len(sequence))
        if ids and eod is not None:
            ids.append(eod)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(prefix + ".idx")
    return both(prefix)


def sequences_of(record: dict, key: str) -> list[str]:
    return record[key] if isinstance(record[key], list) else [record[key]]


@pytest.mark.parametrize("batch_bytes", [1, 4000, 1 << 18])
@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_are_those_of_megatron(
    records_file: str,
    bpe_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    append_eod: bool,
    batch_bytes: int,
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    backend = Backend.from_file(bpe_file)
    eod = backend.token_to_id("<|endoftext|>") if append_eod else None
    recipe = settings("HuggingFaceTokenizer", bpe_file, ("text", "note"), append_eod)
    written = preprocess.preprocess([records_file], str(tmp_path / "p"), recipe)
    for key, pair in zip(recipe.keys, written, strict=True):
        documents = [[backend.encode(text).ids for text in sequences_of(record, key)] for record in RECORDS]
        assert both(tmp_path / f"p_{key}_document") == by_megatron(
            str(tmp_path / "oracle"), documents, eod, np.uint16
        )
        assert pair.documents == len(RECORDS)
        assert pair.tokens == sum(
            len(ids) for sequences in documents for ids in sequences
        ) + append_eod * sum(any(s) for s in documents)


def test_byte_tokenizer_equals_megatron(records_file: str, tmp_path: Path) -> None:
    preprocess.preprocess([records_file], str(tmp_path / "p"), settings("ByteTokenizer", append_eod=True))
    documents = [[list(text.encode()) for text in sequences_of(record, "text")] for record in RECORDS]
    assert both(tmp_path / "p_text_document") == by_megatron(
        str(tmp_path / "oracle"), documents, 256, np.uint16
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_token_type_follows_the_vocabulary(
    records_file: str, tmp_path: Path, vocab_size: int, dtype: type
) -> None:
    from tokenizers import models, pre_tokenizers

    backend = Backend(
        models.WordLevel(
            {"[UNK]": 0, "last": vocab_size - 1, **{f"w{n}": n for n in range(1, vocab_size - 1)}},
            unk_token="[UNK]",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    preprocess.preprocess(
        [records_file], str(tmp_path / "p"), settings("HuggingFaceTokenizer", str(tmp_path))
    )
    documents = [[backend.encode(text).ids for text in sequences_of(record, "text")] for record in RECORDS]
    assert max(token for sequences in documents for ids in sequences for token in ids) == vocab_size - 1
    assert both(tmp_path / "p_text_document") == by_megatron(str(tmp_path / "oracle"), documents, None, dtype)


@pytest.mark.processes
def test_workers_change_no_byte(
    records_file: str, bpe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 2000)  # many batches, of very different cost
    big = tmp_path / "big.jsonl"
    big.write_text(
        "".join(json.dumps({"text": source[: 7 * n]}) + "\n" for n, source in enumerate(SOURCES * 60))
    )
    recipe = settings("HuggingFaceTokenizer", bpe_file, append_eod=True)
    results = []
    for workers in (1, 2, 3):
        preprocess.preprocess(
            [records_file, str(big)], str(tmp_path / f"w{workers}"), recipe, workers=workers
        )
        results.append(both(tmp_path / f"w{workers}_text_document"))
    assert results[0] == results[1] == results[2]
    assert len(IndexedDataset(tmp_path / "w2_text_document")) > 200


def test_inputs_join_in_the_order_given_whatever_their_compression(records_file: str, tmp_path: Path) -> None:
    data = Path(records_file).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "between"}\n'))
    (tmp_path / "all.jsonl").write_bytes(data + b'{"text": "between"}\n' + data)
    recipe = settings("ByteTokenizer", append_eod=True)
    places: list[tuple[int, int]] = []
    parts = [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl.zst"), records_file]
    preprocess.preprocess(
        parts, str(tmp_path / "parts"), recipe, progress=lambda done, total, _: places.append((done, total))
    )
    preprocess.preprocess([str(tmp_path / "all.jsonl")], str(tmp_path / "all"), recipe)
    assert both(tmp_path / "parts_text_document") == both(tmp_path / "all_text_document")
    size = sum(os.path.getsize(part) for part in parts)
    assert places == sorted(places)
    assert places[-1] == (size, size)


@pytest.mark.parametrize("piece_bytes", [400, 1 << 16])
def test_plain_text_is_one_document_a_file(
    bpe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    texts = [SOURCES[0], "short\n", "", SOURCES[1]]
    paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    recipe = settings("HuggingFaceTokenizer", bpe_file, append_eod=True)
    (pair,) = preprocess.preprocess(list(map(str, paths)), str(tmp_path / "p"), recipe)
    data = IndexedDataset(pair.prefix)
    assert pair.documents == 3  # an empty file is no document
    ends = np.concatenate([[0], np.cumsum(data.sizes)])[data.document_indices]
    backend = Backend.from_file(bpe_file)
    for begin, end, text in zip(ends, ends[1:], filter(None, texts), strict=False):
        # Pieces are cut where words end, so that the ids are those of the whole text.
        assert data.tokens[begin:end].tolist() == [
            *backend.encode(text).ids,
            backend.token_to_id("<|endoftext|>"),
        ]
    assert (len(data) > 30) == (piece_bytes == 400)


BAD = {
    "no documents": (b"\n \n", r"bad\.jsonl: the input has no documents"),
    "empty file": (b"", r"bad\.jsonl: the input has no documents"),
    "only empty texts": (
        b'{"text": ""}\n{"text": []}\n',
        r"bad\.jsonl: all 2 documents are empty under the key 'text'",
    ),
    "broken line": (b'{"text": "a"}\n{"text": "b"\n', r"bad\.jsonl, line 2: invalid JSON"),
    "missing key": (
        b'{"text": "a"}\n{"body": "b"}\n',
        r"bad\.jsonl, line 2: there is no key 'text' \(keys present: 'body'\)",
    ),
    "not UTF-8": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"bad\.jsonl, line 2, byte 24: the text is not UTF-8",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_leaves_what_was_there(tmp_path: Path, bad: str) -> None:
    data, message = BAD[bad]
    (tmp_path / "bad.jsonl").write_bytes(data)
    for ending in ("bin", "idx"):
        (tmp_path / f"p_text_document.{ending}").write_text("from before")
    with pytest.raises(DataError, match=message) as caught:
        preprocess.preprocess([str(tmp_path / "bad.jsonl")], str(tmp_path / "p"), settings("ByteTokenizer"))
    assert caught.value.remedy
    assert {path.name for path in tmp_path.iterdir()} == {
        "bad.jsonl",
        "p_text_document.bin",
        "p_text_document.idx",
    }
    assert both(tmp_path / "p_text_document") == (b"from before", b"from before")


@pytest.mark.processes
def test_an_error_in_a_worker_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n' * 50 + b'{"text": 1}\n' + b'{"text": "a"}\n' * 50)
    with pytest.raises(
        DataError, match=r"bad\.jsonl, line 51: the value of 'text' must be a string, not a number"
    ) as caught:
        preprocess.preprocess(
            [str(tmp_path / "bad.jsonl")], str(tmp_path / "p"), settings("ByteTokenizer"), workers=2
        )
    assert "--json-keys" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.processes
def test_a_killed_worker_is_an_error_not_a_hang(
    records_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    monkeypatch.setattr(corpus, "BATCH_BYTES", 1)

    killed: list[int] = []

    def kill_one(done: int, total: int, documents: int) -> None:
        if not killed and done:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(HyperRouterError, match="a worker process was killed or ran out of memory"):
        preprocess.preprocess(
            [records_file] * 20, str(tmp_path / "p"), settings("ByteTokenizer"), workers=2, progress=kill_one
        )
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_be(records_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--workers = 0(.|\n)*--json-keys = text text"):
        preprocess.preprocess(
            [records_file], str(tmp_path / "p"), settings("ByteTokenizer", None, ("text", "text")), workers=0
        )
    with pytest.raises(DataError, match="no readable input file"):
        preprocess.preprocess([str(tmp_path / "gone.jsonl")], str(tmp_path / "p"), settings("ByteTokenizer"))
    assert not list(tmp_path.iterdir())


def test_an_id_beyond_the_vocabulary_is_never_written(
    records_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_hyperrouter.data.tokenize.tokenizer import ByteTokenizer

    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
    with pytest.raises(
        DataError, match=r"the tokenizer gave id \d+, which is outside its vocabulary of 100 ids"
    ):
        preprocess.preprocess([records_file], str(tmp_path / "p"), settings("ByteTokenizer"))
    assert not list(tmp_path.iterdir())
