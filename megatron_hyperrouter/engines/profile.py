"""``--profile``: a trace of some steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hyperrouter import console
from megatron_hyperrouter.config.tree import LoggingConfig


class Profiler:
    """Records the steps from ``--profile-step-start`` to ``--profile-step-end`` on ``--profile-ranks``."""

    def __init__(self, settings: LoggingConfig, rank: int) -> None:
        self._start, self._end = settings.profile_step_start, settings.profile_step_end
        self._rank, self._folder = rank, Path(settings.run_dir) / "profile"
        self._asked = settings.profile and rank in settings.profile_ranks
        self._trace: Any = None

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Profile step ``step``, counted from 1, if it is one of the requested steps."""
        if self._asked and self._trace is None and self._start < step <= self._end:
            self._trace = torch.profiler.profile()
            self._trace.start()
        yield
        if self._trace is not None and step >= self._end:
            self._write()

    def _write(self) -> None:
        self._trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}.json"
        self._trace.export_chrome_trace(str(path))
        self._trace, self._asked = None, False
        console.note(f"wrote the trace of steps {self._start + 1} to {self._end} to {path}")
