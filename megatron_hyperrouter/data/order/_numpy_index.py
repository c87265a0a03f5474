"""The C++ extension ``_index`` in NumPy: the same arguments, numbers and kinds of errors, but slower.

Used if no compiler was found at installation.  ``csrc/bindings.cpp`` documents each function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]
Words = npt.NDArray[np.uint64]
BlendIndices = tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]

_MOST_SETS = 32767  # the set's number is an int16
_ROUNDS = 6  # of the Feistel network
_WORD = 2**64 - 1


def sample_index(
    sizes: npt.NDArray[np.int32],
    document_index: Integers,
    seq_length: int,
    num_samples: int,
    num_tokens: int,
    extra: int,
    wide: bool,
) -> Integers:
    """Where each sample begins, as rows (position in document_index, token in that document): [num_samples +
    1, 2].
    """
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    if num_samples < 0:
        raise ValueError(f"num_samples must be at least 0, got {num_samples}")
    rows = np.zeros((num_samples + 1, 2), np.int64 if wide else np.int32)
    if num_samples == 0:
        return rows
    if len(document_index) and not 0 <= document_index.min() <= document_index.max() < len(sizes):
        raise IndexError(
            f"document_index has entries from {document_index.min()} to {document_index.max()}, but "
            f"there are {len(sizes)} documents"
        )
    lengths = sizes[document_index]
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"sizes must be at least 0, but one is {lengths.min()}")
    ends = np.cumsum(lengths, dtype=np.int64)
    boundaries = np.arange(1, num_samples + 1, dtype=np.int64) * seq_length
    # Row k belongs to the document of token boundary + extra - 1, the last one that sample k - 1 reads.
    documents = np.searchsorted(ends, boundaries + (extra - 1), side="right")
    inside = int(np.searchsorted(documents, len(document_index)))
    rows[1 : inside + 1, 0] = documents[:inside]
    rows[1 : inside + 1, 1] = boundaries[:inside] - (ends - lengths)[documents[:inside]]
    if inside < num_samples:
        before = int(ends[-1]) if len(ends) else 0
        # only the last sample can be left, and only if it is shorter than the others
        if inside < num_samples - 1 or before < num_tokens:
            raise ValueError(
                f"the documents in document_index have {before} tokens in total, "
                f"but num_tokens is {num_tokens}"
            )
        # As in megatron-core: the last document, even if it is empty, but never token -1 of it.
        last = len(lengths) - 1 if lengths[-1] >= extra else int(np.flatnonzero(lengths)[-1])
        rows[-1] = last, lengths[last] - extra
    return rows


def shuffle(values: Integers, key: npt.NDArray[np.uint32], position: int) -> int:
    """Shuffle in place, like RandomState.shuffle with that state. Changes ``key`` and returns the new
    position.
    """
    random_state = np.random.RandomState()
    random_state.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})
    random_state.shuffle(values)
    state: dict[str, Any] = dict(random_state.get_state(legacy=False))
    key[:] = state["state"]["key"]
    return int(state["state"]["pos"])


def blending_indices(weights: npt.NDArray[np.float64], size: int) -> BlendIndices:
    """Set and sample of that set for each sample of a blend: always the set that is furthest behind its
    share.
    """
    _check_count(len(weights), "weights")
    if not np.isfinite(weights).all() or weights.min() <= 0:
        raise ValueError(f"weights must be finite and greater than 0, got {weights.tolist()}")
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    return _blend(weights, np.full(len(weights), size + 1), size)


def exhaustive_blending_indices(sizes: npt.NDArray[np.int64]) -> BlendIndices:
    """The same with weights sizes / sum(sizes), until set i has given exactly sizes[i] samples."""
    _check_count(len(sizes), "sizes")
    if sizes.min() < 0:
        raise ValueError(f"sizes must be at least 0, got {sizes.tolist()}")
    total = sum(sizes.tolist())
    return _blend(sizes / float(max(total, 1)), sizes, total)


def permuted(position: int, size: int, key: int) -> int:
    """Element ``position`` of the permutation of 0 .. size - 1 that ``key`` names."""
    if not 0 <= position < size:
        _check_size(size)
        raise IndexError(f"position {position} is out of range: the permutation has {size} elements")
    return int(_permute(np.array([position], np.uint64), size, key)[0])


def permutation(size: int, key: int) -> npt.NDArray[np.int64]:
    """All elements of that permutation in order: int64 [size]."""
    _check_size(size)
    return _permute(np.arange(size, dtype=np.uint64), size, key).astype(np.int64)


def gather(
    tokens: Integers,
    pointers: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    document_index: Integers,
    first: int,
    begin: int,
    last: int,
    end: int,
    limit: int,
    out: npt.NDArray[np.int64],
) -> int:
    """Copy one sample into ``out``; returns the first position of an id outside 0 .. limit - 1, or -1."""
    if not 0 <= first <= last < len(document_index):
        raise IndexError(
            f"document_index has {len(document_index)} entries, but entries {first} to {last} are requested"
        )
    filled = 0
    for i in range(first, last + 1):
        document = int(document_index[i])
        if not 0 <= document < len(sizes):
            raise IndexError(f"document {document} is out of range: there are {len(sizes)} documents")
        size, start = int(sizes[document]), int(pointers[document]) // tokens.itemsize
        low, high = begin if i == first else 0, end if i == last else size
        if not 0 <= low <= high <= size or not 0 <= start <= len(tokens) - size:
            raise IndexError(
                f"document {document} has {size} tokens, but tokens {low} to {high} are requested"
            )
        if high - low > len(out) - filled:
            raise IndexError(f"the sample has more than {len(out)} tokens, the size of out")
        out[filled : filled + high - low] = tokens[start + low : start + high]
        filled += high - low
    if filled != len(out):
        raise IndexError(f"the sample has {filled} tokens, but the size of out is {len(out)}")
    if not len(out) or 0 <= out.min() <= out.max() < limit:
        return -1
    return int(np.flatnonzero((out < 0) | (out >= limit))[0])


def _check_size(size: int) -> None:
    if not 1 <= size <= 2**62:
        raise ValueError(f"size must be from 1 to 2**62, got {size}")


def _permute(values: Words, size: int, key: int) -> Words:
    """A Feistel network over the bits that ``size`` needs; values that fall outside pass through it again."""
    _check_size(size)
    bits = max(1, (size - 1).bit_length())
    low_bits = np.uint64(bits - bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    words = np.array([(key + (i + 1) * 0x9E3779B97F4A7C15) & _WORD for i in range(_ROUNDS)], np.uint64)
    keys = _mix(words)
    walking = np.ones(len(values), bool)
    while walking.any():
        low, high = values[walking] & low_mask, values[walking] >> low_bits
        for i in range(0, _ROUNDS, 2):
            high ^= _mix(low ^ keys[i]) & high_mask
            low ^= _mix(high ^ keys[i + 1]) & low_mask
        values[walking] = high << low_bits | low
        walking[walking] = values[walking] >= size
    return values


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def _check_count(count: int, name: str) -> None:
    if not 1 <= count <= _MOST_SETS:
        raise ValueError(f"{name} must have 1 to {_MOST_SETS} elements, got {count}")


def _blend(weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64], size: int) -> BlendIndices:
    """``limits``: samples after which a set drops out."""
    sets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    counts, left, behind = np.zeros(len(weights)), limits.tolist(), np.empty(len(weights))
    counts[limits == 0] = np.inf  # infinitely far ahead of its share: never picked
    for t in range(size):
        np.multiply(weights, max(t, 1), out=behind)
        np.subtract(behind, counts, out=behind)
        i = int(behind.argmax())
        sets[t], samples[t] = i, counts[i]
        counts[i] += 1
        left[i] -= 1
        if left[i] == 0:
            counts[i] = np.inf
    return sets, samples
