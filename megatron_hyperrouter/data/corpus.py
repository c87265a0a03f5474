"""Text files as a bounded stream: JSON lines or plain text, plain or compressed (.gz, .zst).

A JSON line is one document.  A plain-text file is one document, read in pieces of at most ``PIECE_BYTES`` so that memory does not
depend on its length; each piece becomes a sequence of that document.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_hyperrouter.data.files import SUFFIXES, ByteStream
from megatron_hyperrouter.data.tokenizer import SAFE_CUT
from megatron_hyperrouter.errors import DataError

Kind = Literal["json", "text"]
BATCH_BYTES = 1 << 18
PIECE_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
# Best: a line end between two ASCII characters that are no spaces (the second no slash, which some patterns let follow a line end).
# Words end there too; next best is any place where they surely do.
_SAFE_LINE_END = re.compile(rb"[!-~]\n(?=[!-.0-~])")
_SAFE_CUT = re.compile(SAFE_CUT.encode())


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive lines of a JSON file, or one piece of a plain-text file, not yet decoded."""

    path: str
    kind: Kind
    pieces: tuple[bytes, ...]
    first_line: int  # line number of the first piece, from 1 (JSON only)
    first_byte: int  # where the first piece starts in the decompressed file
    closes: bool  # a plain-text document ends with this piece; always true for JSON
    position: int  # bytes of all inputs read so far, as they lie on disk


def total_bytes(paths: Sequence[str]) -> int:
    """Size of all inputs on disk; DataError lists every one that is no readable file."""
    bad = [path for path in paths if not (os.path.isfile(path) and os.access(path, os.R_OK))]
    if bad:
        raise DataError("no such readable input file: " + ", ".join(bad), remedy="give existing files to --input")
    return sum(os.path.getsize(path) for path in paths)


def kind_of(path: str) -> Kind:
    """JSON lines or plain text, told by the name; a name that tells nothing is JSON where the text starts with ``{``."""
    name = Path(path)
    suffix = (name.with_suffix("") if name.suffix in SUFFIXES else name).suffix.lower()
    if suffix in _JSON_SUFFIXES:
        return "json"
    if suffix == ".txt":
        return "text"
    with ByteStream(path) as stream:
        head = stream.read(1 << 12)
    return "json" if head.removeprefix(_BOM).lstrip().startswith(b"{") else "text"


def read_batches(paths: Sequence[str]) -> Iterator[Batch]:
    """Every input in turn, in batches of about ``BATCH_BYTES``; DataError for a file that cannot be read or decompressed."""
    before = 0
    for path in paths:
        kind = kind_of(path)
        with ByteStream(path) as stream:
            yield from (_json_batches if kind == "json" else _text_batches)(stream, path, before)
            before += stream.disk_position()


def documents(batch: Batch, keys: Sequence[str]) -> Iterator[tuple[list[str], ...]]:
    """The documents of a JSON batch, or the one piece of a plain-text batch: for each key, the list of its sequences.

    A value is a string, or a list of strings (sequences of one document, as in Megatron-LM).  Blank lines are left out.  Plain text
    has the same text under every key.  DataError names the file and the line or byte.
    """
    byte = batch.first_byte
    for number, piece in enumerate(batch.pieces, start=batch.first_line):
        where = f"{batch.path}, line {number}" if batch.kind == "json" else batch.path
        text = _utf8(piece, where, byte)
        if batch.kind == "text":
            yield tuple([text] for _ in keys)
        elif not text.isspace():
            yield _parse(text, where, keys)
        byte += len(piece)


def texts(paths: Sequence[str], key: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """Every text in turn; stops once ``max_bytes`` of UTF-8 have passed."""
    passed = 0
    for batch in read_batches(paths):
        for (sequences,) in documents(batch, (key,)):
            for text in sequences:
                yield text
                passed += len(text.encode())
                if max_bytes is not None and passed >= max_bytes:
                    return


def _json_batches(stream: ByteStream, path: str, before: int) -> Iterator[Batch]:
    first_line, first_byte = 1, _skip_bom(stream)
    lines: list[bytes] = []
    size = 0
    for line in stream:
        lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Batch(path, "json", tuple(lines), first_line, first_byte, True, before + stream.disk_position())
            first_line, first_byte, lines, size = first_line + len(lines), first_byte + size, [], 0
    if lines:
        yield Batch(path, "json", tuple(lines), first_line, first_byte, True, before + stream.disk_position())


def _text_batches(stream: ByteStream, path: str, before: int) -> Iterator[Batch]:
    byte = _skip_bom(stream)
    held = b""
    while block := stream.read(PIECE_BYTES):
        held += block
        while len(held) > PIECE_BYTES:
            cut = _cut(held)
            yield Batch(path, "text", (held[:cut],), 1, byte, False, before + stream.disk_position())
            byte, held = byte + cut, held[cut:]
    if held:
        yield Batch(path, "text", (held,), 1, byte, True, before + stream.disk_position())


def _skip_bom(stream: ByteStream) -> int:
    """Skip a byte-order mark; how many bytes that were."""
    return len(stream.read(len(_BOM))) if stream.peek(len(_BOM)).startswith(_BOM) else 0


def _cut(data: bytes) -> int:
    """Where to cut ``data`` (longer than PIECE_BYTES): the last line end or space where a word surely ends, else the last line end,
    else between two characters.
    """
    window = data[: PIECE_BYTES + 2]  # two bytes more than the piece, to see what follows the cut
    for places in (_SAFE_LINE_END.finditer(window), _SAFE_CUT.finditer(window)):
        last = max((match.end() for match in places if match.end() <= PIECE_BYTES), default=0)
        if last:
            return last
    cut = window.rfind(b"\n", 0, PIECE_BYTES) + 1 or PIECE_BYTES
    while cut > PIECE_BYTES - 3 and data[cut] & 0xC0 == 0x80:  # a byte inside a UTF-8 character
        cut -= 1
    return cut


def _utf8(piece: bytes, where: str, byte: int) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        message = f"{where}, byte {byte + error.start}: not UTF-8 ({error.reason})"
        raise DataError(message, remedy="convert the file, for example: iconv -f LATIN1 -t UTF-8") from error


def _parse(line: str, where: str, keys: Sequence[str]) -> tuple[list[str], ...]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON at column {error.colno}: {error.msg}", remedy="write one whole JSON object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise DataError(f"{where}: unusable JSON: {error}", remedy="write one JSON object of plain text a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object", remedy='write {"text": "..."} on each line')
    return tuple(_sequences(record, key, where) for key in keys)


def _sequences(record: dict[str, object], key: str, where: str) -> list[str]:
    if key not in record:
        present = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no key {key!r}; keys present: {present}", remedy="name the key that holds the text: --json-keys KEY")
    value = record[key]
    sequences: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(
                f"{where}: the value of {key!r} is a {kind}, not a string", remedy="name a key that holds text: --json-keys KEY"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"\\u{ord(text[error.start]):04x}"
            message = f"{where}: the value of {key!r} has half a surrogate pair ({lone}), which is no character"
            raise DataError(message, remedy="remove it or pair it") from error
        sequences.append(text)
    return sequences
