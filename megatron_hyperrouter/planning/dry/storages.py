"""Counts the bytes of all live tensor storages, real or fake."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Numbers that depend on data: a fake tensor has none.
_SCALAR = torch.ops.aten._local_scalar_dense.default
# torch 2.13 knows its output for fake tensors in bfloat16 alone.
_GROUPED = torch.ops.aten._grouped_mm.default


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, counts the live bytes and their maximum in each phase.

    Each storage counts once, even if several tensors share it.  ``answers``: whether reads of a number
    return a made-up value (1, or 0 if a host asks whether gradients overflowed), which fake tensors need.
    """

    def __init__(self, *, answers: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.phase = "build"
        self.peaks: dict[str, int] = {}
        self._seen: set[int] = set()
        self._answers = answers

    def begin(self, phase: str) -> None:
        """A phase begins with what is alive."""
        self.phase = phase
        self.peaks[phase] = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count the storages of its results."""
        if self._answers and func is _SCALAR:
            return self._answer(args[0])
        if self._answers and func is _GROUPED:
            found = _grouped(*args, **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, torch.Tensor):
                self._see(each)
        return found

    def _answer(self, asked: torch.Tensor) -> float | int | bool:
        if asked.dtype in (torch.bool, torch.uint8):  # whether gradients have overflowed
            return 0
        return 1.0 if asked.is_floating_point() else 1

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        weakref.finalize(storage, self._gone, key, size)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _grouped(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The output of a grouped product: rows through the matrix of their group, or a matrix for each group."""
    if right.dim() == 3:
        return left.new_empty(left.size(0), right.size(-1))
    return left.new_empty(offs.size(0), left.size(0), right.size(-1))
