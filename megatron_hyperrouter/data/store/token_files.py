"""Token files in Megatron's format: ``PREFIX.bin`` contains the tokens, ``PREFIX.idx`` says where each
document lies.

``.idx``, little-endian, without padding (format of megatron-core's ``indexed_dataset.py``):

    bytes 0-8    b"MMIDIDX\0\0"
    bytes 9-16   uint64  version, 1
    byte  17     uint8   code of the token type
    bytes 18-25  uint64  number of sequences N
    bytes 26-33  uint64  number of document marks M
    then         int32[N] tokens in each sequence, int64[N] byte in .bin where each begins, int64[M] document
    marks:
                 document d contains the sequences from mark d to mark d + 1 (M = documents + 1)

Multimodal writers append int8[N] modes, which a text model has no use for; they are accepted and left
alone. Most corpora hold one sequence a document; sample indices count in sequences, as megatron-core's do.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.data.store.mapped import Mapped
from megatron_hyperrouter.data.text.streams import refusal
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.files import open_afresh

TokenArray = npt.NDArray[np.integer[Any]]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INT32 = struct.Struct("<i")
# 6 and 7 are floats, which no token is
_DTYPES = {
    1: "<u1",
    2: "<i1",
    3: "<i2",
    4: "<i4",
    5: "<i8",
    8: "<u2",
}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_INT32_MAX = 2**31 - 1
_CHUNK = 1 << 20  # sequences handled at a time: memory stays a few MB whatever the corpus
_CHECKED = 1 << 16  # sequences checked at a time: all results stay in a core's cache
_AGAIN = "rebuild both files with mhr preprocess"


def smallest_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """Token type that Megatron's preprocessing takes: uint16 for fewer than 65500 ids, else int32 (also for
    None).
    """
    return np.dtype("<u2" if vocab_size is not None and vocab_size < 65500 else "<i4")


def index_header(dtype: npt.DTypeLike, num_sequences: int, num_documents: int) -> bytes:
    """The bytes with which ``.idx`` begins."""
    return _HEADER.pack(
        _MAGIC, 1, _CODES[np.dtype(dtype).newbyteorder("<")], num_sequences, num_documents + 1
    )


class IndexedDataset:
    """Memory-mapped reader of ``prefix.bin`` and ``prefix.idx``; checks the whole index once, when it
    opens.

    ``sizes`` int32 [N] tokens in each sequence; ``pointers`` int64 [N] byte of ``.bin`` where it begins;
    ``document_indices`` int64 [M] marks; ``tokens`` the whole ``.bin`` as one array of ``dtype``.  All are
    views of the files. ``whole=False`` skips checks whose time grows with the number of sequences, until
    :meth:`check` is called. Raises DataError (file, byte, what was expected and found, remedy) if a file
    is missing, truncated, foreign or inconsistent.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        whole: bool = True,
        files: tuple[Mapped, Mapped] | None = None,
    ) -> None:
        """``files``: what to read in place of ``prefix.idx`` and ``prefix.bin``."""
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self._idx = Mapped(self.idx_path) if files is None else files[0]
        index = self._idx.content
        self.dtype, num_sequences, num_marks = self._read_header(index)
        self.sizes: Int32s = np.frombuffer(index, "<i4", num_sequences, _HEADER.size)
        self.pointers: Int64s = np.frombuffer(index, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
        self.document_indices: Int64s = np.frombuffer(
            index, "<i8", num_marks, _HEADER.size + 12 * num_sequences
        )
        self._bin = Mapped(self.bin_path) if files is None else files[1]
        if whole:
            self.check()
        rest = len(self._bin.content) % self.dtype.itemsize
        if rest:
            raise self._bad_bin(
                len(self._bin.content), f"a multiple of {self.dtype.itemsize} bytes", f"{rest} extra bytes"
            )
        self.tokens: TokenArray = self._bin.content.view(self.dtype)

    def check(self) -> None:
        """Check every number of the index."""
        self._check_marks()
        self._check_pointers(len(self._bin.content))

    def check_length(self) -> None:
        """DataError if a file is now shorter than before.  Call it before tokens are read, because reading
        missing memory would kill the process.

        It takes a system call for each file, less than a microsecond.  A file that is truncated between
        this check and the reading still ends in SIGBUS.
        """
        for mapped in (self._bin, self._idx):
            now = mapped.size_now()
            if now < len(mapped.content):
                raise mapped.cut(now)

    def blocks(self, count: int, size: int) -> Iterator[bytes]:
        """``count`` blocks of each file, evenly spread from its first bytes to its last."""
        for mapped in (self._idx, self._bin):
            last = max(len(mapped.content) - size, 0)
            places = [last * number // (count - 1) for number in range(count)]
            yield from mapped.read([(place, min(size, len(mapped.content))) for place in places])

    def changed(self) -> list[int]:
        """When ``.idx`` and ``.bin`` were last written, in nanoseconds."""
        return [self._idx.changed, self._bin.changed]

    def first_tokens(self, sequences: Iterable[int]) -> Int64s:
        """Position in ``tokens`` at which each of these sequences begins; for number N, where the last one
        ends.

        Read from the file, because its map would also load the pages around each position, and count them as
        memory. DataError if the numbers fall back or leave ``.bin``.
        """
        place, last = _HEADER.size + 4 * len(self), len(self._bin.content)
        wanted = list(sequences)
        found = iter(self._idx.read([(place + 8 * i, 8) for i in wanted if i < len(self)]))
        starts = np.frombuffer(
            b"".join(next(found) if i < len(self) else last.to_bytes(8, "little") for i in wanted), "<i8"
        )
        item = self.dtype.itemsize
        wrong = np.flatnonzero(
            (starts < 0) | (starts > last) | (starts % item != 0) | (np.diff(starts, prepend=0) < 0)
        )
        if len(wrong):
            bad = wanted[int(wrong[0])]
            expected = (
                f"sequence {bad} to start at a multiple of {item} bytes, not before sequence {bad - 1} "
                f"and not after byte {last}"
            )
            raise self._bad_index(place + 8 * bad, expected, f"{starts[wrong[0]]}")
        return starts // item

    def read_sequences(self, ranges: Sequence[range]) -> Iterator[tuple[Int32s, Int64s]]:
        """The part of ``sizes`` and of ``pointers`` of each of these ranges of sequences, read as
        :meth:`first_tokens` does.
        """
        places = ((_HEADER.size, 4), (_HEADER.size + 4 * len(self), 8))
        found = self._idx.read(
            [(place + each.start * item, len(each) * item) for each in ranges for place, item in places]
        )
        for sizes, pointers in zip(found[::2], found[1::2], strict=True):
            yield np.frombuffer(sizes, "<i4"), np.frombuffer(pointers, "<i8")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all sequences; counting them takes time."""
        return int(self.sizes.sum(dtype=np.int64))

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Pickle only the prefix: the receiving process opens the memory maps itself."""
        return IndexedDataset, (self.prefix,)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> TokenArray:
        """Tokens ``offset .. offset + length`` of sequence ``i`` (all the rest by default), as a view of
        the file.

        Raises IndexError for a sequence that is not there, ValueError for a range that leaves the sequence.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.idx_path} has no sequence {i}; it has {len(self)} sequences")
        size = int(self.sizes[i])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(
                f"{self.bin_path}: tokens {offset} to {offset + length} of sequence {i} are out of "
                f"range; the sequence has {size} tokens"
            )
        begin = int(self.pointers[i]) // self.dtype.itemsize + offset
        return self.tokens[begin : begin + length]

    def document_of(self, i: int) -> int:
        """The document that sequence ``i`` is a part of."""
        return int(np.searchsorted(self.document_indices, i, side="right")) - 1

    def foreign_token(self, i: int, offset: int, token: int, vocab_size: int) -> DataError:
        """What to raise for the id at token ``offset`` of sequence ``i``."""
        place = (
            f"{self.bin_path}, byte {int(self.pointers[i]) + offset * self.dtype.itemsize}, document "
            f"{self.document_of(i)}"
        )
        return DataError(
            f"{place}: token id {token} is outside the vocabulary, which has the ids 0 to {vocab_size - 1}",
            remedy=(
                "train with the tokenizer that made this file (--tokenizer-type, "
                "--tokenizer-model), or preprocess the text again"
            ),
        )

    def _read_header(self, index: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        if len(index) < _HEADER.size:
            raise self._bad_index(
                len(index),
                f"a header of {_HEADER.size} bytes",
                f"the end of the file after {len(index)} bytes",
            )
        magic, version, code, num_sequences, num_marks = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise self._bad_index(
                0,
                f"the magic {_MAGIC!r}",
                f"{magic!r}",
                "give the prefix of an index in Megatron format; this file has another format",
            )
        if version != 1:
            raise self._bad_index(9, "version 1", f"version {version}")
        if code not in _DTYPES:
            raise self._bad_index(
                17, f"the code of an integer type ({', '.join(map(str, _DTYPES))})", f"code {code}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
        if len(index) not in (expected, expected + num_sequences):
            counts = f"{expected} bytes for {num_sequences} sequences and {num_marks} document marks"
            raise self._bad_index(min(len(index), expected), counts, f"{len(index)} bytes")
        return np.dtype(_DTYPES[code]), num_sequences, num_marks

    def _check_marks(self) -> None:
        """Document marks run from 0 to the number of sequences and never fall back."""
        place, marks, last = _HEADER.size + 12 * len(self), self.document_indices, len(self)
        if not len(marks):
            raise self._bad_index(26, "at least one document mark", "none")
        for bad, want in ((0, 0), (len(marks) - 1, last)):
            if marks[bad] != want:
                raise self._bad_index(place + 8 * bad, f"document mark {bad} to be {want}", f"{marks[bad]}")
        for begin in range(0, len(marks) - 1, _CHECKED):
            some = marks[begin : begin + _CHECKED + 1]
            falls = np.flatnonzero(some[1:] < some[:-1])
            self._idx.let_go(place + 8 * begin, some.nbytes)
            if len(falls):
                bad = begin + int(falls[0]) + 1
                raise self._bad_index(
                    place + 8 * bad, f"document mark {bad} to be at least {marks[bad - 1]}", f"{marks[bad]}"
                )

    def _check_pointers(self, bin_bytes: int) -> None:
        """Every sequence is inside ``.bin``, and the last one ends where ``.bin`` ends."""
        item, end = self.dtype.itemsize, 0
        for begin in range(0, len(self), _CHECKED):
            few, pointers = self.sizes[begin : begin + _CHECKED], self.pointers[begin : begin + _CHECKED]
            # Nearly always each begins where the one before it ends; checking this first takes a third of
            # the time.
            ends = np.cumsum(few, dtype=np.int64) * item + end
            in_line = pointers[0] == end and np.array_equal(pointers[1:], ends[:-1])
            self._idx.let_go(_HEADER.size + 4 * len(self) + 8 * begin, pointers.nbytes)
            if in_line and few.min() >= 0 and ends[-1] <= bin_bytes:
                end = int(ends[-1])
                continue
            sizes = few.astype(np.int64)
            negative, odd = np.flatnonzero(sizes < 0), np.flatnonzero((pointers < 0) | (pointers % item != 0))
            if len(negative):
                bad = begin + int(negative[0])
                raise self._bad_index(
                    _HEADER.size + 4 * bad,
                    f"the size of sequence {bad} to be at least 0",
                    f"{self.sizes[bad]}",
                )
            if len(odd):
                bad = begin + int(odd[0])
                place = _HEADER.size + 4 * len(self) + 8 * bad
                raise self._bad_index(
                    place, f"sequence {bad} to start at a multiple of {item} bytes", f"{self.pointers[bad]}"
                )
            # A start beyond the file is caught before it can overflow the sum with the size.
            beyond = np.flatnonzero(
                (pointers > bin_bytes) | (sizes * item > bin_bytes - np.minimum(pointers, bin_bytes))
            )
            if len(beyond):
                bad = begin + int(beyond[0])
                until = int(self.pointers[bad]) + int(self.sizes[bad]) * item
                raise self._bad_bin(
                    bin_bytes,
                    f"sequence {bad} to reach byte {until}",
                    f"the end of the file after {bin_bytes} bytes",
                )
            end = max(end, int((pointers + sizes * item).max()))
        if end != bin_bytes:
            raise self._bad_bin(
                end,
                f"the end of the file after {end} bytes",
                f"{bin_bytes} bytes, so {self.idx_path} does not belong to this file",
            )

    def _bad_index(self, byte: int, expected: str, found: str, remedy: str = _AGAIN) -> DataError:
        return DataError(f"{self.idx_path}, byte {byte}: expected {expected}, found {found}", remedy=remedy)

    def _bad_bin(self, byte: int, expected: str, found: str) -> DataError:
        remedy = f"copy both files again, or {_AGAIN}"
        return DataError(f"{self.bin_path}, byte {byte}: expected {expected}, found {found}", remedy=remedy)


class IndexedWriter:
    """Writes ``prefix.bin`` and ``prefix.idx`` under temporary names; :meth:`close` puts both in place,
    :meth:`abort` removes them.

    As a context manager it closes at the end and aborts on an exception.  Memory does not grow with the
    corpus, unless documents contain several sequences each.  Raises DataError for a token that ``dtype``
    cannot represent, and if the disk cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(
                f"dtype = {self.dtype}: must be an integer type of 1 to 8 bytes, but not uint32 or uint64"
            )
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._marks: array[int] | None = None  # only once a document does not have exactly one sequence
        self._partial = {ending: Path(f"{self.prefix}.{ending}.partial") for ending in ("bin", "idx")}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open_afresh(self._partial["bin"], buffering=_CHUNK)
            self._idx = open_afresh(self._partial["idx"], buffering=_CHUNK)
            self._idx.write(bytes(_HEADER.size))  # the counts are not known yet
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.abort()

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append one document; ``lengths`` divides it into sequences (default: one)."""
        flat = self._as_tokens(tokens)
        if lengths is None:
            self._append(flat, flat.size, _INT32.pack(min(flat.size, _INT32_MAX)), 1)
            self._mark_documents(1, 1)
        else:
            self._append(flat, *self._checked_lengths(lengths, flat.size))
            self._mark_documents(1, len(lengths))

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append many documents of one sequence each: their tokens end to end, and the number of tokens in
        each.
        """
        flat = self._as_tokens(tokens)
        longest, sizes, count = self._checked_lengths(lengths, flat.size)
        self._append(flat, longest, sizes, count)
        self._mark_documents(count, 1)

    def close(self) -> None:
        """Complete the index and rename both files; the index last, because its presence tells readers
        that the pair is complete.
        """
        try:
            self._write_index()
            for stream in (self._bin, self._idx):
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            Path(self.prefix + ".idx").unlink(missing_ok=True)  # never an old index with new tokens
            for ending in ("bin", "idx"):
                self._partial[ending].replace(f"{self.prefix}.{ending}")
        except OSError as error:
            self.abort()
            raise self._refused(error) from error

    def abort(self) -> None:
        """Remove what was written; harmless after :meth:`close`."""
        for stream in (self._bin, self._idx):
            try:
                stream.close()
            except OSError:
                continue  # a full disk refuses the last buffer too; the file goes anyway
        for path in self._partial.values():
            path.unlink(missing_ok=True)

    def _as_tokens(self, tokens: npt.ArrayLike) -> TokenArray:
        given = (
            np.asarray(tokens)
            if not isinstance(tokens, (list, tuple)) or len(tokens)
            else np.zeros(0, self.dtype)
        )
        if given.dtype != self.dtype and given.size:
            limits = np.iinfo(self.dtype)
            for extreme in (given.min(), given.max()):
                if not limits.min <= extreme <= limits.max:
                    place = f"{self.prefix}.bin, document {self.num_documents}"
                    remedy = (
                        "use an integer type that can store all ids of the tokenizer's vocabulary, "
                        f"instead of {self.dtype.name}"
                    )
                    raise DataError(
                        f"{place}: token id {extreme} does not fit {self.dtype.name}", remedy=remedy
                    )
        return np.ascontiguousarray(given, self.dtype).reshape(-1)

    def _checked_lengths(self, lengths: npt.ArrayLike, num_tokens: int) -> tuple[int, bytes, int]:
        """The longest, the bytes for the index, and how many."""
        counts = np.asarray(lengths, np.int64)
        if counts.ndim != 1 or (len(counts) and counts.min() < 0) or int(counts.sum()) != num_tokens:
            raise ValueError(
                f"lengths must be at least 0 and add up to {num_tokens}, the number of tokens, got "
                f"{counts.tolist()[:8]} ..."
            )
        return int(counts.max(initial=0)), counts.astype("<i4").tobytes(), len(counts)

    def _append(self, tokens: TokenArray, longest: int, sizes: bytes, count: int) -> None:
        if longest > _INT32_MAX:
            message = (
                f"{self.prefix}.bin, document {self.num_documents}: the document has {longest} "
                f"tokens, but the format allows at most {_INT32_MAX}"
            )
            raise DataError(message, remedy="split the document into smaller ones")
        try:
            self._bin.write(tokens.data)
            self._idx.write(sizes)
        except OSError as error:
            raise self._refused(error) from error
        self.num_sequences += count
        self.num_tokens += tokens.size

    def _mark_documents(self, documents: int, sequences: int) -> None:
        """Count ``documents`` of ``sequences`` each; the marks are kept only from the first document that is
        not one sequence.
        """
        if sequences != 1 and self._marks is None:
            self._marks = array("q", range(self.num_documents + 1))
        if self._marks is not None:
            last = self._marks[-1]
            self._marks.extend(last + sequences * (document + 1) for document in range(documents))
        self.num_documents += documents

    def _write_index(self) -> None:
        """Fill in the header, and append pointers and marks chunk by chunk after the sizes that are already
        there.
        """
        self._idx.seek(0)
        self._idx.write(index_header(self.dtype, self.num_sequences, self.num_documents))
        pointer = 0
        for begin in range(0, self.num_sequences, _CHUNK):
            count = min(_CHUNK, self.num_sequences - begin)
            self._idx.seek(_HEADER.size + 4 * begin)
            sizes = np.frombuffer(self._idx.read(4 * count), "<i4")
            ends = pointer + np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
            self._idx.seek(_HEADER.size + 4 * self.num_sequences + 8 * begin)
            self._idx.write(np.concatenate(([pointer], ends[:-1])).astype("<i8").data)
            pointer = int(ends[-1])
        self._idx.seek(0, os.SEEK_END)
        for begin in range(0, self.num_documents + 1, _CHUNK):
            end = min(begin + _CHUNK, self.num_documents + 1)
            some = (
                np.arange(begin, end, dtype="<i8")
                if self._marks is None
                else np.array(self._marks[begin:end], "<i8")
            )
            self._idx.write(some.data)

    def _refused(self, error: OSError) -> DataError:
        message, remedy = refusal(error, self.prefix, "choose another --output-prefix")
        return DataError(message, remedy=remedy)
