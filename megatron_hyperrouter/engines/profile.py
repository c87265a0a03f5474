"""Where the time of a step goes: what each rank measures in all steps, and ``--profile``, a trace of some of
them for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from megatron_hyperrouter import console
from megatron_hyperrouter.config.tree import LoggingConfig, RunConfig
from megatron_hyperrouter.errors import reason_of
from megatron_hyperrouter.model.attention.stopwatch import Stopwatch, stopwatch_of

Item = TypeVar("Item")


class OwnTimes(NamedTuple):
    """Seconds that a rank has measured in a step."""

    waited: float = 0.0  # for its batches
    computed: float = 0.0  # for a piece of work that is the same on every rank; 0: not known
    total: float = 0.0  # since the step before; 0 in the first one


class StepTimes:
    """Measures the times of this rank."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._stopwatch: Stopwatch | None = None
        self._waited = 0.0
        self._taken_at: float | None = None

    def fetched(self, items: Iterable[Item]) -> list[Item]:
        """All items, which this rank waits for."""
        begin = time.perf_counter()
        held = list(items)
        self._waited = time.perf_counter() - begin
        return held

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """A step begins; ``modules``: the model of this rank, the same in every step."""
        if self._stopwatch is None:
            self._stopwatch = stopwatch_of(modules, self._config, self._device)
        self._stopwatch.start()

    def take(self) -> OwnTimes:
        """The times of this step, when its work is done."""
        before, self._taken_at = self._taken_at, time.perf_counter()
        computed = 0.0 if self._stopwatch is None else self._stopwatch.take()
        return OwnTimes(self._waited, computed, 0.0 if before is None else self._taken_at - before)


class Profiler:
    """Records the steps from ``--profile-step-start`` to ``--profile-step-end`` on ``--profile-ranks``."""

    def __init__(self, settings: LoggingConfig, rank: int) -> None:
        self._start, self._end = settings.profile_step_start, settings.profile_step_end
        self._rank, self._folder = rank, Path(settings.run_dir) / "profile"
        self._asked = settings.profile and rank in settings.profile_ranks
        self._trace: Any = None
        self._step = 0  # the last one

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Profile step ``step``, counted from 1, if it is one of the requested steps."""
        self._step = step
        if self._asked and self._trace is None and self._start < step <= self._end:
            self._start = step - 1
            self._trace = torch.profiler.profile()
            self._trace.start()
        yield
        if self._trace is not None and step >= self._end:
            self._write()

    def close(self) -> None:
        """The run has ended, perhaps before the last step of the trace."""
        if self._trace is not None:
            self._end = self._step
            self._write()
        elif self._asked and self._step:
            console.warn_from_here(
                f"--profile wrote no trace: this run took no step from {self._start + 1} to {self._end}; "
                "change --profile-step-start and --profile-step-end"
            )

    def _write(self) -> None:
        trace, self._trace, self._asked = self._trace, None, False
        trace.stop()
        path = self._folder / f"rank-{self._rank}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # training continues without it
            console.warn_from_here(f"the trace cannot be written to {path}: {reason_of(error)}")
            return
        console.note(f"wrote the trace of steps {self._start + 1} to {self._end} to {path}")
