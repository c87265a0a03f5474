"""Orders of documents and samples, and blends: by the C++ extension, or by its NumPy version if the
extension was not built.

The numbers are those of megatron-core 0.16 for the same arguments and random state, so that a run can move
between the two programs. Every function takes ``impl``, one of :data:`IMPLEMENTATIONS`, so that tests can
compare both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.data.order import _numpy_index

Integers = npt.NDArray[np.integer[Any]]
BlendIndices = tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]


class Implementation(Protocol):
    """The functions of ``csrc/bindings.cpp``, where they are documented in full."""

    def sample_index(
        self,
        sizes: npt.NDArray[np.int32],
        document_index: Integers,
        seq_length: int,
        num_samples: int,
        num_tokens: int,
        extra: int,
        wide: bool,
    ) -> Integers:
        """Where each sample begins: [num_samples + 1, 2]."""
        ...

    def shuffle(self, values: Integers, key: npt.NDArray[np.uint32], position: int) -> int:
        """Shuffle in place from a state of NumPy's Mersenne Twister; the new position."""
        ...

    def blending_indices(self, weights: npt.NDArray[np.float64], size: int) -> BlendIndices:
        """Set and sample of each sample of a blend."""
        ...

    def exhaustive_blending_indices(self, sizes: npt.NDArray[np.int64]) -> BlendIndices:
        """The same until every set is used up."""
        ...

    def permuted(self, position: int, size: int, key: int) -> int:
        """One element of a keyed permutation of 0 .. size - 1."""
        ...

    def permutation(self, size: int, key: int) -> npt.NDArray[np.int64]:
        """All of them in order."""
        ...

    def gather(
        self,
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
        """Copy one sample; the first position of an id outside 0 .. limit - 1, or -1."""
        ...


def _available() -> Mapping[str, Implementation]:
    """The fastest one comes first."""
    found: dict[str, Implementation] = {}
    try:
        from megatron_hyperrouter.data import _index

        found["C++"] = _index
    except ImportError:  # no compiler at installation: slower, same numbers
        pass
    return MappingProxyType(found | {"NumPy": _numpy_index})


IMPLEMENTATIONS: Mapping[str, Implementation] = _available()
_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1


def implementation() -> str:
    """The one in use: ``C++`` or ``NumPy``."""
    return next(iter(IMPLEMENTATIONS))


def sample_index(
    sizes: npt.ArrayLike,
    document_index: npt.ArrayLike,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    add_extra_token: int = 1,
    *,
    impl: Implementation | None = None,
) -> Integers:
    """Cut documents, laid end to end, into samples: rows (position in ``document_index``, token in that
    document), [N + 1, 2].

    ``sizes`` int32: tokens of each document; ``document_index`` int32 or int64: the documents of all epochs
    in reading order. Sample k goes from row k to row k + 1 and reads ``add_extra_token`` (0 or 1) tokens on.
    ``drop_last=False`` keeps a last sample that is shorter than ``seq_length``.  Rows are int32 where that
    can count the documents, else int64. Raises ValueError for arguments that contradict each other,
    IndexError for a document that is not there.
    """
    if seq_length < 1 or num_epochs < 1 or tokens_per_epoch < 1 or add_extra_token not in (0, 1):
        given = f"{seq_length=}, {num_epochs=}, {tokens_per_epoch=}, {add_extra_token=}"
        raise ValueError(
            f"add_extra_token must be 0 or 1, and the other three values at least 1, got {given}"
        )
    order = np.asarray(document_index)
    order = _exact(order, np.int64 if order.dtype == np.int64 else np.int32, "document_index")
    num_tokens = num_epochs * tokens_per_epoch
    usable = num_tokens - int(add_extra_token)
    # exact: megatron-core's float32 is not
    num_samples = usable // seq_length if drop_last else -(-usable // seq_length)
    if num_tokens + seq_length >= 2**63:
        given = f"{num_epochs=}, {tokens_per_epoch=}, {seq_length=}"
        raise ValueError(f"num_epochs * tokens_per_epoch + seq_length must be less than 2**63, got {given}")
    wide = len(order) > _INT32_MAX
    chosen = impl or IMPLEMENTATIONS[implementation()]
    return chosen.sample_index(
        _exact(sizes, np.int32, "sizes"),
        order,
        seq_length,
        num_samples,
        num_tokens,
        int(add_extra_token),
        wide,
    )


def shuffle(
    values: Integers, random_state: np.random.RandomState, *, impl: Implementation | None = None
) -> None:
    """``random_state.shuffle(values)`` for a 1-D array, bit for bit and with the same state afterwards,
    several times faster.
    """
    state: dict[str, Any] = dict(random_state.get_state(legacy=False))
    fast = (
        state["bit_generator"] == "MT19937"
        and values.dtype in (np.int32, np.uint32, np.int64)
        and values.flags.c_contiguous
    )
    if not fast or values.ndim != 1 or len(values) > _UINT32_MAX:
        random_state.shuffle(values)
        return
    inner = state["state"]
    inner["key"] = np.ascontiguousarray(inner["key"], np.uint32)
    inner["pos"] = (impl or IMPLEMENTATIONS[implementation()]).shuffle(values, inner["key"], inner["pos"])
    random_state.set_state(state)


def document_index(
    documents: Integers,
    num_epochs: int,
    random_state: np.random.RandomState,
    separate_final_epoch: bool,
    *,
    impl: Implementation | None = None,
) -> Integers:
    """``num_epochs`` times ``documents`` in random order; the last epoch by itself where
    ``separate_final_epoch``.
    """
    together = num_epochs - 1 if separate_final_epoch and num_epochs > 1 else num_epochs
    order = np.tile(documents, num_epochs)
    shuffle(order[: together * len(documents)], random_state, impl=impl)
    if together < num_epochs:
        shuffle(order[together * len(documents) :], random_state, impl=impl)
    return order


def shuffle_index(
    num_samples: int, total: int, random_state: np.random.RandomState, *, impl: Implementation | None = None
) -> Integers:
    """The numbers 0 .. total - 1 shuffled: the first ``num_samples`` among themselves, then the rest.
    uint32, or int64 by need.
    """
    if not 0 <= num_samples <= total:
        raise ValueError(f"num_samples must be from 0 to total = {total}, got {num_samples}")
    order: Integers = np.arange(total, dtype=np.uint32 if total < _UINT32_MAX - 1 else np.int64)
    shuffle(order[:num_samples], random_state, impl=impl)
    if num_samples < total:
        shuffle(order[num_samples:], random_state, impl=impl)
    return order


def blending_indices(
    weights: npt.ArrayLike, size: int, *, impl: Implementation | None = None
) -> BlendIndices:
    """Set (int16 [size]) and number within that set (int64 [size]) of each sample: always the set furthest
    behind its share.

    ``weights``: above 0, taken as they are (normalise them first).  Raises ValueError for others, and for
    over 32767 sets.
    """
    return (impl or IMPLEMENTATIONS[implementation()]).blending_indices(
        np.ascontiguousarray(weights, np.float64), size
    )


def exhaustive_blending_indices(sizes: npt.ArrayLike, *, impl: Implementation | None = None) -> BlendIndices:
    """As :func:`blending_indices`, with every sample of every set exactly once: ``sizes[i]`` samples of set
    i.
    """
    return (impl or IMPLEMENTATIONS[implementation()]).exhaustive_blending_indices(
        _exact(sizes, np.int64, "sizes")
    )


def key_of(*numbers: int) -> int:
    """A 64-bit key for :meth:`Implementation.permutation`, from integers; each of them changes all bits of
    the key.
    """
    digest = hashlib.blake2b(
        b"".join(number.to_bytes(16, "little", signed=True) for number in numbers), digest_size=8
    )
    return int.from_bytes(digest.digest(), "little")


def _exact(values: npt.ArrayLike, dtype: Any, name: str) -> npt.NDArray[Any]:
    """``values`` as contiguous ``dtype``; ValueError if a number would change."""
    given = np.asarray(values)
    converted = np.ascontiguousarray(given, dtype)
    if given.dtype != dtype and not np.array_equal(given, converted):
        raise ValueError(
            f"the values of {name} must fit {np.dtype(dtype).name}, got {given.dtype.name} values "
            f"from {given.min()} to {given.max()}"
        )
    return converted
