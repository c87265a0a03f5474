"""How long a rank takes for a piece of work that is the same on every rank and contains no communication.

The time of a step is the same on all ranks, because they wait for each other in collectives.  Such a piece
shows which of them is slow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron_hyperrouter.config.derived import windows
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.attention.core import ScaledDotProductAttention


class Stopwatch:
    """Within this context, the device works on the piece; counts from :meth:`start` until :meth:`take`.

    On a GPU, a pair of events marks the piece in the stream, and the host never waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._runs = False
        self._begin: Any = None  # seconds, or an event
        self._marked: list[tuple[Any, Any]] = []  # pairs of events that were not yet read
        self._seconds, self._pieces = 0.0, 0

    def start(self) -> None:
        """Count from now on."""
        self._runs = True

    def take(self) -> float:
        """Stop, and return the mean seconds of a piece; 0 if the device has finished none.

        Pieces that the device has not finished count at the next call.
        """
        self._runs = False
        while self._marked and self._marked[0][1].query():
            begin, end = self._marked.pop(0)
            self._add(begin.elapsed_time(end) / 1000)
        mean = self._seconds / max(1, self._pieces)
        self._seconds, self._pieces = 0.0, 0
        return mean

    def __enter__(self) -> None:
        if self._runs:
            self._begin = _mark() if self._on_gpu else time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if not self._runs:
            return
        if self._on_gpu:
            self._marked.append((self._begin, _mark()))
        else:
            self._add(time.perf_counter() - self._begin)

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._pieces += 1


def stopwatch_of(modules: Iterable[nn.Module], config: RunConfig, device: torch.device) -> Stopwatch:
    """A stopwatch for the scores and weighted sums of this rank's attention: of its first layer on a GPU; of
    all on a CPU, where reading the clock costs nothing, and a busy core disturbs only some of them.

    Where layers differ in their window, only those with the most common one count.  Transformer Engine's
    attention is timed unless its layers differ, or it communicates with context-parallel ranks.
    """
    found = Stopwatch(device)
    kinds = Counter(windows(config)).most_common()
    alike = len(kinds) == 1 and config.parallel.context_parallel_size == 1
    for name, module in (pair for each in modules for pair in each.named_modules()):
        if isinstance(module, ScaledDotProductAttention):
            if module.window != kinds[0][0]:
                continue
            module.stopwatch = found
        elif alike and name.endswith("core_attention"):
            module.register_forward_pre_hook(lambda *_: found.__enter__())
            module.register_forward_hook(lambda *_: found.__exit__())
        else:
            continue
        if device.type == "cuda":
            break
    return found


def _mark() -> Any:
    """An event at the present end of the stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
