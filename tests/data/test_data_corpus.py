"""The corpus reader: every byte once, bounded pieces, and messages that name file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.data.text import corpus
from megatron_hyperrouter.data.text.corpus import documents, read_batches, texts
from megatron_hyperrouter.data.text.inputs import InputRange, kind_of, total_bytes
from megatron_hyperrouter.errors import DataError, HostError


def frames(data: bytes) -> bytes:
    """Several zstd frames end to end, as parallel compressors write them."""
    third = len(data) // 3 + 1
    return b"".join(zstandard.compress(data[start : start + third]) for start in range(0, len(data), third))


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".frames.zst": frames}


def written(folder: Path, name: str, data: bytes | str) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def found(path: str, *keys: str) -> list[tuple[list[str], ...]]:
    return [document for batch in read_batches([path]) for document in documents(batch, keys or ("text",))]


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jsonl", b"x", "json"),
        ("a.JSON", b"x", "json"),
        ("a.ndjson", b"x", "json"),
        ("a.txt", b'{"text": "x"}', "text"),
        ("a.md", b"# title", "text"),
        ("a", b'\xef\xbb\xbf \n{"text": "x"}', "json"),
        ("a", b"text", "text"),
        ("a.jsonl.gz", gzip.compress(b"x", mtime=0), "json"),
        ("a.txt.zst", zstandard.compress(b"{"), "text"),
        ("a.gz", gzip.compress(b'{"text": "x"}', mtime=0), "json"),
        ("a.v2.data.zst", zstandard.compress(b"text"), "text"),
    ],
)
def test_kind_by_name_else_by_first_character(tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    assert kind_of(written(tmp_path, name, data)) == kind


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("batch_bytes", [1, 200, 1 << 18])
def test_json_lines_arrive_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, batch_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    stories = [f"story {number} — żółw " + "x" * (number * 7 % 50) for number in range(100)]
    data = "\n\n".join(
        json.dumps({"text": story, "n": 1}, ensure_ascii=number % 2 == 0)
        for number, story in enumerate(stories)
    ).encode()
    path = written(tmp_path, "a.jsonl" + ending, PACK[ending](data))
    batches = list(read_batches([path]))
    assert b"".join(piece for batch in batches for piece in batch.pieces) == data
    for batch in batches:
        assert data[batch.first_byte :].startswith(batch.pieces[0])
        assert data[: batch.first_byte].count(b"\n") == batch.first_line - 1
    assert batches[-1].position == total_bytes([path])
    assert found(path) == [([story],) for story in stories]


@given(text=st.text(alphabet=st.sampled_from("ab\n .é東🙂"), max_size=200), size=st.integers(4, 40))
def test_plain_text_pieces_are_bounded_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    path = written(tmp_path_factory.mktemp("text"), "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_BYTES", size)
        batches = list(read_batches([path]))
        pieces = [piece for (sequences,) in found(path) for piece in sequences]
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces)
    assert [batch.closes for batch in batches] == [False] * (len(batches) - 1) + [True] * bool(batches)
    assert [batch.first_byte for batch in batches] == [
        sum(len(p.encode()) for p in pieces[:n]) for n in range(len(pieces))
    ]


@pytest.mark.parametrize(
    ("size", "text", "first"),
    [
        (11, "aa bb\ncc dd ee", "aa bb\n"),  # a line end between letters
        (11, "aa b\ncc\n\ndd ee", "aa b\n"),  # the same, though another line end lies further on
        (10, "aa bb\n   cc dd", "aa bb\n  "),  # before a space and a letter
        (9, "aaaa bbbb cccc", "aaaa bbbb"),
        (9, "12\n34\n\n56\n\n78", "12\n"),
        (9, "é\n\n\n56\n\n78", "é\n\n\n56\n\n"),  # any line end
        (11, "éééééééé", "ééééé"),  # between characters
        (11, "12345678901\nabc", "12345678901"),  # no room for the line end
    ],
)
def test_plain_text_is_cut_at_the_best_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, text: str, first: str
) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", size)
    pieces = [piece for (sequences,) in found(written(tmp_path, "a.txt", text)) for piece in sequences]
    assert pieces[0] == first
    assert "".join(pieces) == text


def test_byte_order_marks_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n \r\n\n{"text": "b\\n"}')
    assert found(path) == [(["a"],), (["b\n"],)]
    assert found(written(tmp_path, "a.txt", b"\xef\xbb\xbfa\r\nb\n")) == [(["a\r\nb\n"],)]


def test_several_keys_and_sequences(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"title": "t", "text": ["one", "two"]}\n{"text": [], "title": ""}\n')
    assert found(path, "text", "title") == [(["one", "two"], ["t"]), ([], [""])]


BAD_LINES = {
    "broken": ('{"text": "x"', r"a\.jsonl, line 3: invalid JSON: .* at column \d+"),
    "not an object": ("[1, 2]", r"a\.jsonl, line 3: the line must be a JSON object, not a list"),
    "missing key": (
        '{"body": "x", "n": 1}',
        r"a\.jsonl, line 3: there is no key 'text' \(keys present: 'body', 'n'\)",
    ),
    "number": ('{"text": 5}', r"a\.jsonl, line 3: the value of 'text' must be a string, not a number"),
    "null": ('{"text": null}', r"a\.jsonl, line 3: the value of 'text' must be a string, not null"),
    "list of numbers": (
        '{"text": ["a", 5]}',
        r"a\.jsonl, line 3: the value of 'text' must be a string, not a number",
    ),
    "half a pair": ('{"text": "\\ud83d"}', r"a\.jsonl, line 3: .*\\ud83d"),
    "endless nesting": ("[" * 100000, r"a\.jsonl, line 3: "),
    "endless number": ('{"n": ' + "9" * 5000 + ', "text": "x"}', r"a\.jsonl, line 3: unusable JSON"),
    "not UTF-8": (b'{"text": "caf\xe9"}', rf"a\.jsonl, line 3, byte {30 + 13}: the text is not UTF-8"),
}


@pytest.mark.parametrize("batch_bytes", [1, 1 << 18])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, batch_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    line, message = BAD_LINES[bad]
    start = b'{"text": "first"}\n\n'
    path = written(
        tmp_path,
        "a.jsonl",
        start + b" " * (30 - len(start)) + (line if isinstance(line, bytes) else line.encode()) + b"\n",
    )
    with pytest.raises(DataError, match=message) as caught:
        found(path)
    assert caught.value.remedy


def test_plain_text_that_is_not_utf8_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", 8)
    data = b"one two three\nfour \xff five"
    with pytest.raises(DataError, match=rf"a\.txt, byte {data.index(0xFF)}: the text is not UTF-8"):
        found(written(tmp_path, "a.txt", data))


@pytest.mark.parametrize("ending", [".gz", ".zst", ".frames.zst"])
def test_truncated_and_damaged_compression(tmp_path: Path, ending: str) -> None:
    data = b"".join(json.dumps({"text": str(number) * 9}).encode() + b"\n" for number in range(2000))
    whole = PACK[ending](data)
    cut = written(tmp_path, "cut.jsonl" + ending, whole[:-9])
    with pytest.raises(DataError, match=rf"cut\.jsonl{ending} cannot be read beyond byte \d+: "):
        list(read_batches([cut]))
    flipped = bytearray(whole)
    flipped[:3] = b"\x00\x00\x00"
    with pytest.raises(DataError, match="cannot be read beyond"):
        list(read_batches([written(tmp_path, "flipped.jsonl" + ending, bytes(flipped))]))


def test_missing_inputs_are_all_named(tmp_path: Path) -> None:
    here = written(tmp_path, "here.txt", "x")
    with pytest.raises(DataError, match=r"one\.txt, .*two\.txt") as caught:
        total_bytes([str(tmp_path / "one.txt"), here, str(tmp_path / "two.txt")])
    assert "here.txt" not in str(caught.value)
    with pytest.raises(DataError, match="no readable input file"):
        total_bytes([str(tmp_path)])


def test_missing_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.txt.zst", zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(HostError, match="zstandard"):
        list(read_batches([path]))


def test_texts_stop_at_the_limit(tmp_path: Path) -> None:
    one = written(tmp_path, "a.jsonl", '{"text": "żż"}\n{"text": "bbb"}\n{"text": "c"}\n')
    two = written(tmp_path, "b.txt", "plain")
    assert list(texts([one, two])) == ["żż", "bbb", "c", "plain"]
    assert list(texts([one, two], max_bytes=4)) == ["żż"]
    assert list(texts([one, two], max_bytes=5)) == ["żż", "bbb"]


LINES = st.lists(st.sampled_from(['{"text": "a"}', '{"text": "longer żółw"}', "", " "]), max_size=12)


@given(
    files=st.lists(LINES, min_size=1, max_size=3),
    of=st.integers(1, 9),
    mark=st.booleans(),
    end=st.sampled_from(["", "\n"]),
)
def test_parts_hold_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], of: int, mark: bool, end: str
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    start = "\ufeff" if mark else ""
    paths = [
        written(folder, f"{number}.jsonl", start + "\n".join(lines) + end)
        for number, lines in enumerate(files)
    ]
    paths.append(written(folder, "z.jsonl.gz", gzip.compress(b'{"text": "packed"}\n')))
    paths.append(written(folder, "z.txt", "plain text"))
    whole = [document for batch in read_batches(paths) for document in documents(batch, ("text",))]
    parts = [read_batches(paths, part=InputRange(number, of)) for number in range(1, of + 1)]
    assert [document for part in parts for batch in part for document in documents(batch, ("text",))] == whole


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_reading_goes_on_from_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, kind: str
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 90)
    monkeypatch.setattr(corpus, "PIECE_BYTES", 31)
    stories = [f"story {number} — żółw, and more of it. " * (1 + number % 3) for number in range(40)]
    lines = [json.dumps({"text": story}) if kind == "jsonl" else story for story in stories]
    first = written(tmp_path, f"a.{kind}{ending}", PACK[ending](("\ufeff" + "\n".join(lines)).encode()))
    paths = [first, written(tmp_path, "b.jsonl", '{"text": "after"}\n')]
    batches = list(read_batches(paths))
    assert len(batches) > 20
    for number, batch in enumerate(batches, start=1):
        rest = list(read_batches(paths, start=batch.end))
        assert [(b.path, b.pieces, b.first_line, b.first_byte, b.closes, b.end) for b in rest] == [
            (b.path, b.pieces, b.first_line, b.first_byte, b.closes, b.end) for b in batches[number:]
        ]


def test_a_bad_line_is_named_in_every_part(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "good"}\n' * 50 + "broken\n" + '{"text": "good"}\n' * 50)
    messages = []
    for number in range(1, 8):
        try:
            [list(documents(batch, ("text",))) for batch in read_batches([path], part=InputRange(number, 7))]
        except DataError as error:
            messages.append(error.message)
    assert len(messages) == 1
    assert "a.jsonl, line 51: invalid JSON" in messages[0]


def test_a_line_without_end_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MOST_LINE_BYTES", 100)
    path = written(tmp_path, "a.jsonl", '{"text": "good"}\n' + "x" * 101 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the line has more than 100 bytes") as caught:
        list(read_batches([path]))
    assert "one JSON object on each line" in caught.value.remedy
    exact = written(tmp_path, "b.jsonl", json.dumps({"text": "x" * 87}) + "\n")
    assert Path(exact).stat().st_size == 100
    assert found(exact) == [(["x" * 87],)]
