"""Supervision of a run during training: requests to stop, its progress, and the thread that checks both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperrouter import console
from megatron_hyperrouter.guard.events import FILE, facts_of, record_failure_of
from megatron_hyperrouter.guard.heartbeat import Progress
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.stopping import StopRequest, stop_signals
from megatron_hyperrouter.guard.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine


@dataclass
class Supervision:
    """Supervision of one run on one rank; ``launcher``: the processes whose end stops the run."""

    launcher: Launcher = field(default_factory=lambda: Launcher(()))
    request: StopRequest = field(default_factory=StopRequest)
    progress: Progress = field(default_factory=Progress)

    @contextlib.contextmanager
    def signals(self, config: RunConfig) -> Iterator[None]:
        """Within this context, signals are requests to stop."""
        with stop_signals(self.request, enabled=config.train.exit_on_signal):
            yield

    @contextlib.contextmanager
    def recording_failures(
        self, config: RunConfig, engine: Engine, tell: Callable[..., None]
    ) -> Iterator[None]:
        """Within this context an error is an event, too: ``tell`` writes that of rank 0, or that of
        another rank if rank 0 has none.
        """
        try:
            yield
        except Exception as error:
            step, rank = self.progress.step, engine.place.rank
            if engine.place.is_main:
                tell("failure", step, **facts_of(error))
            elif not console.left_alone(error):
                record_failure_of(rank, Path(config.logging.run_dir) / FILE, step, **facts_of(error))
            if console.left_alone(error) and self.request.reason == "SIGTERM":
                # The launcher ends all ranks because one has failed, and only that rank knows the reason.
                console.warn("this rank stops because another rank has failed")
                raise console.EndedByLauncher(1) from error
            raise

    @contextlib.contextmanager
    def watchdog(self, config: RunConfig, engine: Engine, step: int) -> Iterator[None]:
        """Within this context, a run without progress is ended; it begins after ``step`` steps."""
        minutes, place = config.guard.distributed_timeout_minutes, engine.place
        self.progress.enter("start", step)
        with Watchdog(
            Path(config.logging.run_dir),
            rank=place.rank,
            world_size=place.world_size,
            limit=60 * minutes if minutes else engine.patience,
            progress=self.progress,
            stop=self.request,
            launcher=self.launcher,
        ):
            yield
