"""Requests to stop: which signals make them, and what a second one does."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megatron_hyperrouter.guard import stopping
from megatron_hyperrouter.guard.stopping import SIGNALS, StopRequest, stop_signals


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_noted_and_the_old_handler_comes_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_signals(StopRequest(), enabled=True) as request:
        assert not request.came
        os.kill(os.getpid(), number)
        assert request.came and request.reason == name
    assert signal.getsignal(number) == before


def test_the_first_reason_counts() -> None:
    request = StopRequest()
    request.ask("the end of the launcher")
    request.on_signal(signal.SIGTERM, None)
    assert request.reason == "the end of the launcher"


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals(StopRequest(), enabled=True) as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not request.came and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_handled_when_not_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals(StopRequest(), enabled=False):
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with stop_signals(StopRequest(), enabled=True), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert "press Ctrl-C again to end at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that insists is no person who gives up
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_launcher_that_passes_ctrl_c_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    request = StopRequest()
    request.on_signal(signal.SIGINT, None)
    now += 0.5
    request.on_signal(signal.SIGINT, None)
    now += 5
    with pytest.raises(KeyboardInterrupt):
        request.on_signal(signal.SIGINT, None)
