"""What the user sees of a run: a line every ``--log-interval`` steps, and a live bar on a terminal."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from megatron_hyperrouter.train.hooks import Hook
from megatron_hyperrouter.train.metrics import Record, summary

_GAP = "  "
_ON_THE_BAR = 5  # numbers in the bar besides step and remaining time; the others are in the lines


class ConsoleHook(Hook):
    """Prints the lines; the bar stays below them."""

    def __init__(self, train_iters: int, *, log_interval: int, screen: Console | None = None) -> None:
        self._train_iters, self._log_interval = train_iters, log_interval
        self._screen = screen or Console()
        self._recent: deque[Record] = deque(maxlen=log_interval)
        self._progress: Progress | None = None

    def on_start(self, step: int) -> None:
        """Open the bar if the output is a terminal."""
        if not self._screen.is_terminal or step >= self._train_iters:
            return
        # The numbers come first: what does not fit is cut off at their end, or from the bar.
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._progress = Progress(
            text, BarColumn(bar_width=None), console=self._screen, transient=True, expand=True
        )
        self._progress.add_task(f"{step}/{self._train_iters}", total=self._train_iters, completed=step)
        self._progress.start()

    def on_step(self, record: Record) -> None:
        """Update the bar; at the log interval, print a line about the steps since the last line."""
        step = int(record["step"] or 0)
        if record.get("skipped"):
            self._say(f"step {step}  skipped")
            return
        self._recent.append(record)
        place, pieces = f"{step}/{self._train_iters}", summary(self._recent)
        if self._progress is not None:
            short = _GAP.join([place, pieces[0], self._left(step), *pieces[1:_ON_THE_BAR]])
            self._progress.update(self._progress.task_ids[0], completed=step, description=short)
        if step % self._log_interval == 0 or step == self._train_iters:
            self._say(*self._in_lines([f"step {place}", *pieces, self._left(step), *self._waiting()]))
            self._recent.clear()

    def on_evaluation(self, record: Record) -> None:
        """One line."""
        bits = "" if record["bits_per_byte"] is None else f", {record['bits_per_byte']:.4f} bits per byte"
        self._say(
            f"step {record['step']}  {record['split']} loss {record['lm_loss']:.4f}, "
            f"perplexity {record['perplexity']:.2f}{bits} with k = {record['topk']}"
        )

    def on_save(self, step: int, folder: Path) -> None:
        """One line."""
        self._say(f"step {step}  saved {folder}")

    def on_return(self, step: int) -> None:
        """The next line is not about steps that the run has undone."""
        kept = [record for record in self._recent if int(record["step"] or 0) <= step]
        self._recent = deque(kept, maxlen=self._log_interval)

    def on_end(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _left(self, step: int) -> str:
        times = [float(record["step_time"] or 0.0) for record in self._recent]
        return f"{duration((self._train_iters - step) * sum(times) / len(times))} left"

    def _waiting(self) -> list[str]:
        total = sum(float(record["step_time"] or 0.0) for record in self._recent)
        share = sum(float(record.get("data_time") or 0.0) for record in self._recent) / total
        return [f"{share:.0%} waiting for data"] if share >= 0.01 else []

    def _in_lines(self, pieces: list[str]) -> list[str]:
        """One line in a log; on a terminal as many as its width needs, with later lines indented."""
        if not self._screen.is_terminal:
            return [_GAP.join(pieces)]
        lines = [pieces[0]]
        for piece in pieces[1:]:
            if len(lines[-1]) + len(_GAP) + len(piece) <= self._screen.width:
                lines[-1] += _GAP + piece
            else:
                lines.append(_GAP * 2 + piece)
        return lines

    def _say(self, *lines: str) -> None:
        for line in lines:
            self._screen.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``3 s``, ``2:05 min``, ``1:02:03 h``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
