"""Lines that cannot be used: the run stops and keeps what it has saved, or leaves them
out and counts them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from encode_settings import settings

from megatron_hyperrouter.data.store.manifest import read_manifest
from megatron_hyperrouter.data.text import corpus
from megatron_hyperrouter.data.tokenize.huggingface import encoding
from megatron_hyperrouter.data.tokenize.preprocess import preprocess
from megatron_hyperrouter.data.tokenize.tokenizer import ByteTokenizer
from megatron_hyperrouter.errors import DataError

GOOD = [json.dumps({"text": f"document {n} " + "lorem ipsum " * 40}) for n in range(60)]
BAD = ['{"text": null}', '{"text": "cut', '{"text": "\\ud800"}', "[1]", '{"other": "x"}']


def lines(path: Path, *, bad: bool) -> str:
    mixed = [
        each
        for n, good in enumerate(GOOD)
        for each in ([good, BAD[n % 5]] if bad and n % 12 == 7 else [good])
    ]
    content = "".join(line + "\n" for line in mixed).encode()
    path.write_bytes(content.replace(b"document 31", b"document \xff") if bad else content)
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_lines_are_counted_and_the_rest_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 4000)
    said: list[str] = []
    skip = settings("ByteTokenizer", append_eod=True, on_bad_line="skip")
    bad = lines(tmp_path / "bad.jsonl", bad=True)
    (pair,) = preprocess([bad], str(tmp_path / "p"), skip, report=said.append, workers=workers)
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(line + "\n" for n, line in enumerate(GOOD) if n != 31))
    (whole,) = preprocess([str(kept)], str(tmp_path / "q"), settings("ByteTokenizer", append_eod=True))
    assert Path(f"{pair.prefix}.bin").read_bytes() == Path(f"{whole.prefix}.bin").read_bytes()
    assert Path(f"{pair.prefix}.idx").read_bytes() == Path(f"{whole.prefix}.idx").read_bytes()
    assert said[-1].startswith(f"skipped 6 bad lines; the first: {bad}, line 9: ")
    assert read_manifest(pair.prefix).left_out == 6
    words = sum(len(json.loads(line)["text"].split()) for n, line in enumerate(GOOD) if n != 31)
    assert read_manifest(pair.prefix).words == words


@pytest.mark.parametrize("seconds", [0, 1000])  # the bad line itself is a reason to save
def test_a_bad_line_keeps_what_was_done_and_skip_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 4000)
    bad, prefix = lines(tmp_path / "bad.jsonl", bad=True), str(tmp_path / "p")
    with pytest.raises(
        DataError, match=r"(?s)line 9: .*--on-bad-line skip, which continues from the saved progress"
    ):
        preprocess([bad], prefix, settings("ByteTokenizer"), save_seconds=seconds)
    done: list[int] = []
    skip = settings("ByteTokenizer", on_bad_line="skip")
    (pair,) = preprocess([bad], prefix, skip, progress=lambda at, _, count: done.append(count))
    assert done[0] == 8 and pair.documents == 59
    assert (
        sorted(path.name for path in tmp_path.iterdir() if ".partial" in path.name or "journal" in path.name)
        == []
    )


def pack(name: str, text: str) -> bytes:
    data = text.encode()
    return (
        zstandard.compress(data)
        if name.endswith(".zst")
        else gzip.compress(data)
        if name.endswith(".gz")
        else data
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_once_the_line_is_mended_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bom: str
) -> None:
    """With the bytes of a run over the mended files; another file, not yet read, may change as well."""
    monkeypatch.setattr(corpus, "BATCH_BYTES", 4000)
    recipe, inputs = (
        settings("ByteTokenizer", append_eod=True),
        [str(tmp_path / name), str(tmp_path / "b.jsonl")],
    )
    Path(inputs[1]).write_text(GOOD[0] + "\n")
    mended = bom + "".join(line + "\n" for line in GOOD)
    for cut in (40, 50):  # mended, and then another bad line
        wrong = mended.replace(GOOD[cut], '{"text": nul}')
        Path(inputs[0]).write_bytes(pack(name, wrong))
        with pytest.raises(DataError, match=f"line {cut + 1}: invalid JSON"):
            preprocess(inputs, str(tmp_path / "p"), recipe, save_seconds=0)
    Path(inputs[0]).write_bytes(pack(name, mended))
    Path(inputs[1]).write_text(GOOD[0] + "\n" + GOOD[1] + "\n")
    done: list[int] = []
    said: list[str] = []
    (pair,) = preprocess(
        inputs,
        str(tmp_path / "p"),
        recipe,
        progress=lambda at, _, count: done.append(count),
        report=said.append,
    )
    assert (
        done[0] >= 40
        and f"saved progress: {inputs[0]}, {inputs[1]} changed after the unfinished run" in said[0]
    )
    (whole,) = preprocess(inputs, str(tmp_path / "q"), recipe)
    for ending in ("bin", "idx"):
        assert Path(f"{pair.prefix}.{ending}").read_bytes() == Path(f"{whole.prefix}.{ending}").read_bytes()
    assert read_manifest(pair.prefix).inputs == read_manifest(whole.prefix).inputs


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("document 3 ", "document 5 "),  # in what was read, of the same length
        lambda text: text.replace("lorem", "Lorem", 1),
        lambda text: "\n" + text,
        lambda text: text[:3000],
        lambda text: "",
    ],
)
def test_a_change_of_what_was_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 4000)
    path, text = tmp_path / "a.jsonl", "".join(line + "\n" for line in GOOD)
    path.write_text(text + BAD[0] + "\n")
    with pytest.raises(DataError, match="line 61"):
        preprocess([str(path)], str(tmp_path / "p"), settings("ByteTokenizer"), save_seconds=0)
    before = (tmp_path / "p.journal").read_bytes()
    path.write_text(change(text))
    with pytest.raises(DataError, match=r"the input has changed since the unfinished run"):
        preprocess([str(path)], str(tmp_path / "p"), settings("ByteTokenizer"))
    assert (tmp_path / "p.journal").read_bytes() == before


def test_nothing_is_left_where_nothing_was_saved(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(BAD[0] + "\n")
    with pytest.raises(DataError, match=r"(?s)line 1: .*or skip such lines with --on-bad-line skip$"):
        preprocess(
            [str(tmp_path / "a.jsonl")], str(tmp_path / "p"), settings("ByteTokenizer"), save_seconds=0
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("workers", [1, 2])
def test_plain_text_has_no_line_to_skip(tmp_path: Path, policy: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD[0] + "\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    inputs, prefix = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")], str(tmp_path / "p")
    recipe = settings("ByteTokenizer", on_bad_line=policy)
    with pytest.raises(DataError, match=r"b\.txt, byte 3: the text is not UTF-8") as caught:
        preprocess(inputs, prefix, recipe, save_seconds=0, workers=workers)
    assert "--on-bad-line" not in caught.value.remedy
    (tmp_path / "b.txt").write_bytes(b"cafe au lait")
    (pair,) = preprocess(inputs, prefix, recipe)
    assert pair.documents == 2


def test_a_text_that_the_tokenizer_refuses_is_found_by_its_lines_and_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_batch(tokenizer: ByteTokenizer, texts: list[str]) -> list[Any]:
        with encoding("model", texts[-1]):
            return [np.array([int(text)], np.int32) for text in texts]

    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode_batch)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 30)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in "1 2 3 4 x".split()))
    with pytest.raises(DataError, match=r"a\.jsonl, lines 4 to 5: the tokenizer model cannot encode 'x'"):
        preprocess([str(path)], str(tmp_path / "p"), settings("ByteTokenizer"), save_seconds=0)
    path.write_text(path.read_text().replace('"x"', '"5"'))
    done: list[int] = []
    preprocess(
        [str(path)],
        str(tmp_path / "p"),
        settings("ByteTokenizer"),
        progress=lambda at, _, count: done.append(count),
    )
    assert done[0] == 3 and done[-1] == 5


def test_files_that_will_be_replaced_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD[0] + "\n")
    said: list[str] = []
    for _ in range(2):
        preprocess(
            [str(tmp_path / "a.jsonl")], str(tmp_path / "p"), settings("ByteTokenizer"), report=said.append
        )
    assert said == [
        f"{tmp_path}/p_text_document: the existing files will be replaced when the new ones are complete"
    ]


def test_the_same_input_twice_is_reported(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", bad=False)
    (tmp_path / "link.jsonl").symlink_to(first)
    (tmp_path / "copy.jsonl").write_bytes(Path(first).read_bytes())
    (tmp_path / "other.jsonl").write_bytes(Path(first).read_bytes().replace(b"lorem", b"ipsum", 1))
    said: list[str] = []
    names = [str(tmp_path / f"{name}.jsonl") for name in ("a", "link", "other", "copy", "a")]
    preprocess(names, str(tmp_path / "p"), settings("ByteTokenizer"), report=said.append)
    assert said == [
        f"{names[number]} has the same text as {first}, so its documents are written twice"
        for number in (1, 3, 4)
    ]


@pytest.mark.parametrize("log", [27, 28, 31])
def test_long_windows_of_zst(tmp_path: Path, log: int) -> None:
    plain = lines(tmp_path / "a.jsonl", bad=False)
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True, hash_log=6)
    frame = zstandard.ZstdCompressor(compression_params=how).compressobj()
    (tmp_path / "b.jsonl.zst").write_bytes(frame.compress(Path(plain).read_bytes()) + frame.flush())
    pairs = [
        preprocess([str(tmp_path / name)], str(tmp_path / name[0]), settings("ByteTokenizer"))[0]
        for name in ("a.jsonl", "b.jsonl.zst")
    ]
    assert Path(f"{pairs[0].prefix}.bin").read_bytes() == Path(f"{pairs[1].prefix}.bin").read_bytes()
