"""Text files as a bounded stream: JSON lines, plain text or Parquet, plain or compressed (.gz, .zst).

A JSON line, or a row of a Parquet file, is one document.  A plain-text file is one document, read in pieces
of at most ``PIECE_BYTES`` so that memory does not depend on its length; each piece becomes a sequence of that
document.  What a batch contains depends on where it starts, so reading may stop after any batch and continue
from where it ended.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_hyperrouter.data.text.inputs import (
    BOM,
    WHOLE,
    InputRange,
    Kind,
    is_compressed,
    kind_of,
    size_of,
)
from megatron_hyperrouter.data.text.parquet import read_rows
from megatron_hyperrouter.data.text.streams import ByteStream
from megatron_hyperrouter.errors import DataError

BATCH_BYTES = 1 << 18
PIECE_BYTES = 1 << 16
MOST_LINE_BYTES = 1 << 29  # a longer line is not JSON, and would fill the memory
_SKIP_BYTES = 1 << 20
# Best: a line end between two ASCII characters that are not spaces (nor is the second one a slash, which some
# patterns let follow a line end). Words end there too; next best is any place where they surely do.
_SAFE_LINE_END = re.compile(rb"[!-~]\n(?=[!-.0-~])")
# Before a space that a letter follows.  Every usual pattern of words starts a new word there, whatever comes
# before it, so that both sides encode apart as they do together.
SAFE_CUT = r"(?= [A-Za-z])"
_SAFE_CUT = re.compile(SAFE_CUT.encode())


class BadLine(DataError):
    """A line, row or text that cannot be used; the file around it may be good."""


class BadText(BadLine):
    """A text that cannot be left out like a line: plain text, or one that the tokenizer cannot encode."""


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """A position between two batches."""

    source: int = 0  # number of the input, from 0
    offset: int = 0  # bytes of the decompressed file before it, or rows of a Parquet file
    line: int = (
        1  # number of the JSON line that follows, from 1; 0: not known, for reading began inside the file
    )


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Consecutive lines of a JSON file, rows of a Parquet file, or one piece of a plain-text file, not yet
    decoded.
    """

    path: str
    kind: Kind
    pieces: tuple[bytes, ...]
    first_line: int  # number of the first line or row, from 1; 0: not known (JSON only)
    first_byte: int  # where the first piece starts in the decompressed file
    closes: bool  # a plain-text document ends with this piece; always true for other kinds
    position: int  # bytes of all inputs read so far, as stored on disk
    end: ReadPosition
    columns: tuple[list[object], ...] = field(default=())  # Parquet: values of each key

    def __str__(self) -> str:
        """Which part of which file, for messages."""
        if self.kind == "text" or not self.first_line:
            return f"{self.path}, from byte {self.first_byte} on"
        rows = self.kind == "parquet"
        last = self.first_line + len(self.columns[0] if rows else self.pieces) - 1
        return f"{self.path}, {'rows' if rows else 'lines'} {self.first_line} to {last}"


@dataclass(frozen=True, slots=True)
class _InputStretch:
    """One input, and which stretch of it to read."""

    number: int
    path: str
    before: int  # bytes of the inputs before it
    size: int
    low: int  # the part to read, in bytes from the start of this file; may be outside of it
    high: int

    def owns(self, byte: float) -> bool:
        """Whether what begins at ``byte`` of this file on disk belongs to the part that is read."""
        return self.low <= byte < self.high


def read_batches(
    paths: Sequence[str],
    keys: Sequence[str] = ("text",),
    *,
    part: InputRange = WHOLE,
    start: ReadPosition | None = None,
) -> Iterator[TextBatch]:
    """Every input in turn, in batches of about ``BATCH_BYTES``; DataError for a file that cannot be read or
    decompressed.

    ``keys``: columns of Parquet files.  ``part``: read only this part.  ``start``: continue from there, the
    ``end`` of an earlier batch.
    """
    start = start or ReadPosition()
    sizes = [size_of(path) for path in paths]
    low, high = part.stretch(sum(sizes))
    before = 0
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        source = _InputStretch(number, path, before, size, low - before, high - before)
        before += size
        if number < start.source or source.low >= size or source.high <= 0:
            continue
        place = start if number == start.source else ReadPosition(number)
        kind = kind_of(path)
        if kind == "parquet":
            yield from _parquet_batches(source, keys, place)
        elif kind == "json" and not is_compressed(path):
            yield from _json_batches(source, place)
        elif source.owns(0):  # can only be read from its start
            yield from (_json_batches if kind == "json" else _text_batches)(source, place)


def checksum_of(batch: TextBatch, before: int) -> int:
    """CRC-32 of what was read of a file up to the end of a batch; ``before``: up to its start."""
    return zlib.crc32(b"".join(batch.pieces), before)


def begins_with(path: str, offset: int, checksum: int) -> bool:
    """Whether a JSON file still begins with ``offset`` bytes of whole lines with this ``checksum_of``."""
    if kind_of(path) != "json":
        return not offset
    with ByteStream(path) as stream:
        left, found, last = offset, 0, b"\n"
        left -= _skip_bom(stream) if left else 0
        while left > 0 and (block := stream.read(min(left, _SKIP_BYTES))):
            left, found, last = left - len(block), zlib.crc32(block, found), block[-1:]
    return left == 0 and found == checksum and last == b"\n"


def documents(
    batch: TextBatch, keys: Sequence[str], bad: list[str] | None = None
) -> Iterator[tuple[list[str], ...]]:
    """The documents of a JSON or Parquet batch, or the one piece of a plain-text batch: for each key, the
    list of its sequences.

    A value is a string, or a list of strings (sequences of one document, as in Megatron-LM).  Blank lines are
    left out.  Plain text has the same text under every key.  BadLine names the file and the line, row or byte
    of what cannot be used; with ``bad``, such lines and rows are left out, and their messages are added to
    it.  BadText for plain text, with or without ``bad``.
    """
    where = _Where(batch)
    if batch.kind == "text":
        where.byte = batch.first_byte
        yield tuple([_utf8(batch.pieces[0], where)] for _ in keys)
        return
    values = _rows(batch, keys, where) if batch.kind == "parquet" else _lines(batch, keys, where)
    while True:
        try:
            document = next(values, None)
        except BadLine as error:
            if bad is None:
                raise
            bad.append(error.message)
            values = _rows(batch, keys, where) if batch.kind == "parquet" else _lines(batch, keys, where)
            continue
        if document is None:
            return
        yield document


def _rows(batch: TextBatch, keys: Sequence[str], where: _Where) -> Iterator[tuple[list[str], ...]]:
    """The documents of the rows after ``where``; ``where`` is updated."""
    for index in range(where.index + 1, len(batch.columns[0])):
        where.index = index
        values = (column[index] for column in batch.columns)
        yield tuple(_sequences(value, key, where) for key, value in zip(keys, values, strict=True))


def _lines(batch: TextBatch, keys: Sequence[str], where: _Where) -> Iterator[tuple[list[str], ...]]:
    """The documents of the lines after ``where``; ``where`` is updated."""
    for index in range(where.index + 1, len(batch.pieces)):
        where.index = index
        text = _utf8(batch.pieces[index], where)
        if not text.isspace():
            yield _parse(text, where, keys)


def texts(
    paths: Sequence[str],
    key: str = "text",
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Every text in turn; stops once ``max_bytes`` of UTF-8 have passed.

    ``progress(bytes, all bytes)`` of the inputs on disk, or of ``max_bytes`` where that is less.
    """
    passed, total = 0, sum(map(size_of, paths))
    for batch in read_batches(paths, (key,)):
        if progress:
            whole = max_bytes is None or max_bytes > total
            progress(*((batch.position, total) if whole else (passed, max_bytes or 0)))
        for (sequences,) in documents(batch, (key,)):
            for text in sequences:
                yield text
                passed += len(text.encode())
                if max_bytes is not None and passed >= max_bytes:
                    return


class _Stream(ByteStream):
    """The decompressed bytes of a file from ``offset`` on."""

    def __init__(self, path: str, offset: int) -> None:
        super().__init__(path)
        if not is_compressed(path):
            self._file.on_disk.seek(offset)
            return
        while offset > 0:
            skipped = len(self.read(min(offset, _SKIP_BYTES)))
            if not skipped:
                break
            offset -= skipped


def _json_batches(source: _InputStretch, place: ReadPosition) -> Iterator[TextBatch]:
    """Lines from ``place`` on, or from the first that begins in the source's stretch, to the last that begins
    in it.
    """
    offset, number = place.offset, place.line
    # of the file: the line that contains the byte before this one belongs to the previous part
    inside = source.low > offset
    if inside:
        offset, number = source.low - 1, 0
    high = None if is_compressed(source.path) or source.high >= source.size else source.high
    with _Stream(source.path, offset) as stream:
        mark = -1  # the first line begins at byte 0, even after a byte order mark
        if inside:
            offset += len(_line(stream, source.path, offset, number))
        elif not offset:
            offset = mark = _skip_bom(stream)
        first, size = offset, 0
        lines: list[bytes] = []
        while high is None or offset < high or offset == mark:
            line = _line(stream, source.path, offset, number + len(lines) if number else 0)
            if not line:
                break
            lines.append(line)
            size += len(line)
            offset += len(line)
            if size >= BATCH_BYTES:
                yield _json_batch(source, lines, number, first, stream)
                number, first, lines, size = number + len(lines) if number else 0, offset, [], 0
        if lines:
            yield _json_batch(source, lines, number, first, stream)


def _json_batch(
    source: _InputStretch, lines: list[bytes], number: int, first: int, stream: ByteStream
) -> TextBatch:
    end = ReadPosition(source.number, first + sum(map(len, lines)), number + len(lines) if number else 0)
    return TextBatch(
        source.path, "json", tuple(lines), number, first, True, source.before + stream.disk_position(), end
    )


def _line(stream: ByteStream, path: str, offset: int, number: int) -> bytes:
    line = stream.readline(MOST_LINE_BYTES + 1)
    if len(line) > MOST_LINE_BYTES:
        where = f"line {number}" if number else f"byte {offset}"
        message = f"{path}, {where}: the line has more than {MOST_LINE_BYTES} bytes"
        raise DataError(
            message,
            remedy="write one JSON object on each line; give a plain-text file a name that ends in .txt",
        )
    return line


def _text_batches(source: _InputStretch, place: ReadPosition) -> Iterator[TextBatch]:
    byte = place.offset
    with _Stream(source.path, byte) as stream:
        byte += _skip_bom(stream) if not byte else 0
        held, last = b"", False
        while not last:
            block = stream.read(PIECE_BYTES)
            held, last = held + block, not block
            # A cut looks two bytes ahead, and must see them wherever reading began.
            while len(held) >= PIECE_BYTES + 2 or (last and len(held) > PIECE_BYTES):
                cut = _cut(held)
                yield _text_batch(source, held[:cut], byte, False, stream)
                byte, held = byte + cut, held[cut:]
        if held:
            yield _text_batch(source, held, byte, True, stream)


def _text_batch(
    source: _InputStretch, piece: bytes, byte: int, closes: bool, stream: ByteStream
) -> TextBatch:
    end = ReadPosition(source.number, byte + len(piece))
    return TextBatch(
        source.path, "text", (piece,), 1, byte, closes, source.before + stream.disk_position(), end
    )


def _parquet_batches(source: _InputStretch, keys: Sequence[str], place: ReadPosition) -> Iterator[TextBatch]:
    for rows in read_rows(
        source.path,
        keys,
        BATCH_BYTES,
        lambda fraction: source.owns(int(fraction * source.size)),
        place.offset,
    ):
        end = ReadPosition(source.number, rows.first + len(rows))
        position = source.before + int(rows.done * source.size)
        yield TextBatch(source.path, "parquet", (), rows.first + 1, 0, True, position, end, rows.columns)


def _skip_bom(stream: ByteStream) -> int:
    """Skip a byte-order mark; how many bytes that were."""
    return len(stream.read(len(BOM))) if stream.peek(len(BOM)).startswith(BOM) else 0


def _cut(data: bytes) -> int:
    """Where to split ``data`` (longer than PIECE_BYTES): at the last line end or space that certainly ends
    a word, else at the last line end, else between two characters.
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


class _Where:
    """The place of one document in its file, in words only when an error needs them."""

    def __init__(self, batch: TextBatch) -> None:
        self._batch = batch
        self.index = -1
        self._byte: int | None = None

    @property
    def byte(self) -> int:
        """Where the line begins in the decompressed file."""
        before = self._batch.pieces[: max(self.index, 0)]
        return self._batch.first_byte + sum(map(len, before)) if self._byte is None else self._byte

    @byte.setter
    def byte(self, byte: int) -> None:
        self._byte = byte

    def is_text(self) -> bool:
        """Whether the document is a plain-text file."""
        return self._batch.kind == "text"

    def __str__(self) -> str:
        batch = self._batch
        if self.is_text():
            return batch.path
        first = batch.first_line or _lines_before(batch.path, batch.first_byte) + 1
        return f"{batch.path}, {'row' if batch.kind == 'parquet' else 'line'} {first + self.index}"


def _lines_before(path: str, byte: int) -> int:
    """Line ends in the first ``byte`` bytes of a file."""
    count = 0
    with open(path, "rb") as stream:
        while byte > 0 and (block := stream.read(min(byte, _SKIP_BYTES))):
            count += block.count(b"\n")
            byte -= len(block)
    return count


def _utf8(piece: bytes, where: _Where) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        message = f"{where}, byte {where.byte + error.start}: the text is not UTF-8 ({error.reason})"
        kind = BadText if where.is_text() else BadLine
        raise kind(message, remedy="convert the file, for example: iconv -f LATIN1 -t UTF-8") from error


def _parse(line: str, where: _Where, keys: Sequence[str]) -> tuple[list[str], ...]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(
            f"{where}: invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            remedy="write one complete JSON object on each line",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise BadLine(
            f"{where}: unusable JSON: {error}", remedy="write one JSON object with plain text on each line"
        ) from error
    if not isinstance(record, dict):
        raise BadLine(
            f"{where}: the line must be a JSON object, not a {type(record).__name__}",
            remedy='write {"text": "..."} on each line',
        )
    for key in keys:
        if key not in record:
            present = ", ".join(map(repr, record)) or "none"
            message = f"{where}: there is no key {key!r} (keys present: {present})"
            raise BadLine(message, remedy="give the key of the text with --json-keys KEY")
    return tuple(_sequences(record[key], key, where) for key in keys)


_JSON_KINDS: Mapping[type, str] = MappingProxyType(
    {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
)


def _sequences(value: object, key: str, where: _Where) -> list[str]:
    sequences: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, bytes):  # a binary column of a Parquet file
            where.byte = 0
            text = _utf8(text, where)
        if not isinstance(text, str):
            kind = _JSON_KINDS.get(type(text), f"a value of type {type(text).__name__}")
            raise BadLine(
                f"{where}: the value of {key!r} must be a string, not {kind}",
                remedy="give a key that has text with --json-keys KEY",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"\\u{ord(text[error.start]):04x}"
            message = f"{where}: the value of {key!r} has half of a surrogate pair ({lone})"
            raise BadLine(message, remedy="remove the surrogate, or add its other half") from error
        sequences.append(text)
    return sequences
