"""The display of a run: lines in a log, lines and a bar on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from train.records import VALID, step_record

from megatron_hyperrouter import console
from megatron_hyperrouter.train.screen import ConsoleHook, duration


class TestConsole:
    def lines(self, hook: ConsoleHook, screen: Console) -> list[str]:
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue().splitlines()

    def test_a_line_every_interval_and_at_the_end_with_means(self) -> None:
        screen = Console(file=io.StringIO(), width=40)
        hook = ConsoleHook(7, log_interval=3, screen=screen)
        hook.on_start(0)
        for step in range(1, 8):
            hook.on_step(step_record(step, loss=float(step)))
        hook.on_end()
        lines = self.lines(hook, screen)
        assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
        assert ["loss 2.0000" in lines[0], "loss 5.0000" in lines[1], "loss 7.0000" in lines[2]] == [True] * 3
        assert "lr 1.00e-03  k 2  2,000 tokens/s  2 s left" in lines[0]

    def test_steps_that_do_not_count_are_in_no_mean(self) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(8, log_interval=4, screen=screen)
        for step, loss in enumerate((1.0, 9.0, 9.0), start=1):
            hook.on_step(step_record(step, loss=loss))
        hook.on_return(1)
        hook.on_step(step_record(3, loss=float("nan"), skipped=True))
        hook.on_step(step_record(4, loss=2.0))
        skipped, line = self.lines(hook, screen)
        assert skipped == "step 3  skipped" and "loss 1.5000" in line

    def test_speed_is_tokens_over_time_not_a_mean_of_speeds(self) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(2, log_interval=2, screen=screen)
        hook.on_step(step_record(1, step_time=3.0, tokens_per_second=100.0))
        hook.on_step(step_record(2, step_time=1.0, tokens_per_second=300.0))
        assert "150 tokens/s" in self.lines(hook, screen)[0]  # 600 tokens in 4 s

    @pytest.mark.parametrize(
        ("waits", "said"),
        [((0.0, 0.0), None), ((0.004, 0.004), None), ((0.5, 0.5), "25%"), ((0.0, 0.04), "1%")],
    )
    def test_waiting_for_data_is_told_where_it_matters(
        self, waits: tuple[float, float], said: str | None
    ) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(2, log_interval=2, screen=screen)
        for step, (wait, time) in enumerate(zip(waits, (1.0, 3.0), strict=True), start=1):
            hook.on_step(step_record(step, step_time=time, data_time=wait))
        (line,) = self.lines(hook, screen)
        assert ("waiting" in line) == (said is not None)
        assert said is None or line.endswith(f"left  {said} waiting for data")

    def test_evaluations_and_saves_have_their_lines(self) -> None:
        screen = Console(file=io.StringIO(), width=20)
        hook = ConsoleHook(7, log_interval=3, screen=screen)
        hook.on_evaluation(VALID)
        hook.on_evaluation({**VALID, "bits_per_byte": None})
        hook.on_save(4, Path("runs/[a]/step_0000004"))
        assert self.lines(hook, screen) == [
            "step 4  valid loss 2.0000, perplexity 7.39, 1.2500 bits per byte with k = 2",
            "step 4  valid loss 2.0000, perplexity 7.39 with k = 2",
            "step 4  saved runs/[a]/step_0000004",
        ]

    def test_health_norm_and_speed_stand_on_the_line(self) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(2, log_interval=2, screen=screen)
        for step, (entropy, load) in enumerate(((1.0, 1.5), (2.0, 2.5)), start=1):
            health = {f"router/entropy/{layer}": entropy + layer for layer in (1, 2)}
            loads = {f"router/load_max_over_mean/{layer}": load + layer for layer in (1, 2)}
            more = {"grad_norm": float(step), "tflops_per_gpu": 123.4, "mfu": 0.415, "peak_memory": 3 * 2**29}
            hook.on_step(step_record(step, **health, **loads, **more))
        (line,) = self.lines(hook, screen)
        assert line.split("  ")[1:6] == ["loss 3.0000", "norm 1.50", "lr 1.00e-03", "k 2", "entropy 3.00"]
        assert line.split("  ")[6:] == [  # load: of layer 2
            *("load 4.00", "2,000 tokens/s", "123.4 TFLOP/s", "MFU 41.5%", "1.50 GiB", "0 s left")
        ]

    @pytest.mark.parametrize("width", [40, 80, 110])
    def test_the_bar_keeps_step_and_loss_and_every_line_stays(self, width: int) -> None:
        """Read off a terminal emulator's screen, not from our own bytes."""
        screen = Console(file=io.StringIO(), force_terminal=True, width=width, height=12)
        hook = ConsoleHook(100000, log_interval=2, screen=screen)
        hook.on_start(86995)
        for step in range(86996, 87000):
            hook.on_step(step_record(step, grad_norm=1.0, tflops_per_gpu=300.0, data_time=0.1))
        assert hook._progress is not None
        hook._progress.refresh()
        terminal = pyte.Screen(width, 12)
        pyte.Stream(terminal).feed(screen.file.getvalue().replace("\n", "\r\n"))  # type: ignore[attr-defined]
        shown = [line.rstrip() for line in terminal.display]
        bar = next(line for line in reversed(shown) if line)
        assert bar.startswith("86999/100000  loss 3.0000")
        assert any(line.startswith("step 86996/100000  loss 3.0000") for line in shown)
        assert any(line.startswith("step 86998/100000  loss 3.0000") for line in shown)
        assert all(len(line) <= width for line in shown)
        assert any("waiting for data" in line for line in shown) or width < 80
        hook.on_end()
        hook.on_end()  # twice does no harm

    def test_a_warning_stands_above_the_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not through it, which would leave a piece of the bar on the screen."""
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        screen = Console(file=stream, force_terminal=True, width=80, height=12)
        hook = ConsoleHook(9, log_interval=5, screen=screen)
        hook.on_start(0)
        for step in (1, 2):
            hook.on_step(step_record(step))
            console.warn(f"look at step {step}")
        assert hook._progress is not None
        hook._progress.refresh()
        terminal = pyte.Screen(80, 12)
        pyte.Stream(terminal).feed(stream.getvalue().replace("\n", "\r\n"))
        hook.on_end()
        shown = [line.rstrip() for line in terminal.display if line.strip()]
        assert shown[:2] == ["warning: look at step 1", "warning: look at step 2"]
        assert len(shown) == 3 and shown[2].startswith("2/9")

    def test_a_lost_loss_does_not_break_the_line(self) -> None:
        screen = Console(file=io.StringIO())
        ConsoleHook(1, log_interval=1, screen=screen).on_step(step_record(1, loss=float("nan")))
        assert "loss nan" in screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (59.6, "1:00 min"), (125, "2:05 min"), (3723, "1:02:03 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
