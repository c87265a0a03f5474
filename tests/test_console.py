"""console.py: one message, the right exit status, on the right rank."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HostError,
    HyperRouterError,
    Problem,
)


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_success_is_silent(capsys):
    assert console.run(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError([Problem("--lr", -1, "must be a number >= 0", "use 3e-4")]), 2),
        (DataError("a.idx: byte 7", remedy="write it again"), 3),
        (CheckpointError("disk full", remedy="free up space on that disk"), 4),
        (HostError("deepspeed 0.1"), 5),
        (HyperRouterError("other"), 1),
    ],
)
def test_each_error_has_its_status_and_its_whole_message(error, status, capsys):
    assert console.run(failing(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error}\n"  # brackets, long lines and all, exactly once
    assert "Traceback" not in err


def test_long_lines_and_brackets_arrive_unchanged(capsys):
    text = "[bold]not markup[/bold] " + "x" * 300
    console.report(DataError(text))
    assert capsys.readouterr().err == f"error: {text}\n"


def test_an_unexpected_error_shows_its_traceback(capsys):
    assert console.run(failing(ZeroDivisionError("oops"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: oops" in err and "raise error" in err


def test_a_rank_that_was_left_alone_waits_for_the_one_that_knows_why(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    begun = time.monotonic()
    assert (
        console.run(
            failing(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")), patience=0.1
        )
        == 1
    )
    assert time.monotonic() - begun >= 0.3  # longer than the other one, which waits for rank 0
    assert "Connection closed by peer" in capsys.readouterr().err  # no launcher came


def test_a_missing_library_is_the_host(capsys):
    assert console.run(failing(ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed.moe"))) == 5
    err = capsys.readouterr().err
    assert "deepspeed" in err and "setup_env.sh or pip install ." in err and "Traceback" not in err


def test_a_missing_module_of_ours_is_a_bug(capsys):
    assert (
        console.run(failing(ModuleNotFoundError("No module named 'x'", name="megatron_hyperrouter.x"))) == 1
    )
    assert "Traceback" in capsys.readouterr().err


def test_without_rich_the_words_are_the_same(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert console.run(failing(DataError("[a] b", remedy="c"))) == 3
    console.note("d")
    assert capsys.readouterr() == ("note: d\n", "error: [a] b\n  remedy: c\n")


def test_system_exit_passes():
    with pytest.raises(SystemExit) as leaving:
        console.run(failing(SystemExit(0)))
    assert leaving.value.code == 0


def test_a_rank_that_its_launcher_ends_leaves_no_status_of_its_own():
    """It dies by the signal, so the launcher can report only the status of the rank that failed first."""
    child = os.fork()
    if child == 0:
        os._exit(console.run(failing(console.EndedByLauncher(1))))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_too_little_memory_is_one_message(capsys):
    assert console.run(failing(MemoryError("Unable to allocate 5.69 TiB"))) == 1
    assert capsys.readouterr().err == (
        "error: not enough memory: Unable to allocate 5.69 TiB\n  remedy: free some memory, "
        "or use smaller sizes (such as --micro-batch-size or --workers)\n"
    )


def test_interrupt(capsys):
    assert console.run(failing(KeyboardInterrupt())) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (DataError("mine alone"), 0.1),
        (ConfigError([Problem("--lr", -1, "must be >= 0", "use 3e-4")]), 1.0),
    ],  # settings are everybody's
)
def test_another_rank_waits_and_then_speaks(variable, error, seconds, monkeypatch, capsys):
    monkeypatch.setenv(variable, "3")
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    try:
        assert console.run(failing(error), patience=0.1) == error.exit_status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started >= seconds
    assert capsys.readouterr().err == f"error (rank 3): {error}\n"


def test_global_rank_counts_on_several_nodes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "4")
    assert not console.speaks()


def test_notes_and_warnings_are_told_once(monkeypatch, capsys):
    console.note("a")
    console.warn("b")
    monkeypatch.setenv("RANK", "1")
    console.note("c")
    console.warn("d")
    assert capsys.readouterr() == ("note: a\n", "warning: b\n")


def test_a_waiting_rank_dies_by_the_launchers_sigterm_even_where_the_run_handles_it():
    program = (
        "import signal, sys\n"
        "from megatron_hyperrouter import console\n"
        "from megatron_hyperrouter.errors import DataError\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "def main():\n"
        "    print('started', flush=True)\n"
        "    raise DataError('the same everywhere')\n"
        "sys.exit(console.run(main, patience=60))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        deadline = time.monotonic() + 20
        # the first ones may still meet the run's own handler
        while process.poll() is None and time.monotonic() < deadline:
            process.terminate()
            time.sleep(0.1)
        process.kill()
        _, err = process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert err == ""


TOOL = "from megatron_hyperrouter.terminal import run_tool; run_tool(lambda words: print('found'))"


@pytest.mark.parametrize("words", ["--help", "--version", "train --help", "train --help router hyper", TOOL])
def test_output_that_has_no_room_is_no_traceback(words):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    program = ["-c", words] if words == TOOL else ["-m", "megatron_hyperrouter", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *program], stdout=full, stderr=subprocess.PIPE, text=True)
    if words == TOOL:
        assert done.returncode == 1
        assert done.stderr.startswith("error: the output cannot be written: No space left on device")
    else:
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["--help", "train --help router hyper", "train --mock-data --lr x"])
def test_standard_streams_that_are_closed(words):
    """``>&-``: another file must not take their place."""
    command = f"{sys.executable} -m megatron_hyperrouter {words} >&- <&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "--lr" in words else 0)


ON_A_TERMINAL = """
from megatron_hyperrouter import console
console.table([("router", "hyper, 8 experts in each of 2 layers"), ("run folder", "runs/a")])
console.warn("the options --moe-aux-loss-coeff and --moe-z-loss-coeff alone train the router")
console.note("to continue, run: mhr train --config examples/quickstart.yaml --load runs/a")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_long_lines_end_between_words_on_a_terminal_only(terminal):
    theirs, ours = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    read, write = os.pipe()
    stream = ours if terminal else write
    command, environment = [sys.executable, "-c", ON_A_TERMINAL], {**os.environ, "TERM": "dumb"}
    subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=True)
    os.close(ours)
    os.close(write)
    lines = os.read(theirs if terminal else read, 10_000).decode().replace("\r\n", "\n").splitlines()
    os.close(theirs)
    os.close(read)
    note = lines.pop()
    assert note == "note: to continue, run: mhr train --config examples/quickstart.yaml --load runs/a"
    assert lines == (
        [
            "router      hyper, 8 experts in each of",
            "            2 layers",
            "run folder  runs/a",
            "warning: the options",
            "  --moe-aux-loss-coeff and",
            "  --moe-z-loss-coeff alone train the",
            "  router",
        ]
        if terminal
        else [
            "router      hyper, 8 experts in each of 2 layers",
            "run folder  runs/a",
            "warning: the options --moe-aux-loss-coeff and --moe-z-loss-coeff alone train the router",
        ]
    )


@pytest.mark.parametrize("width", [10, 30, 80])
def test_folding_keeps_the_words_and_the_lines(width):
    remedy = "    remedy: import it first: mhr import-hf --input a --output b"
    text = f"2 problems:\n  - --lr = -1: must be positive\n{remedy}\n\nand another"
    folded = console.folded("error: ", text, width, 2)
    assert folded.split() == text.split()
    lines = ("error: " + folded).splitlines()
    assert remedy in lines  # with its command on one line
    assert all(len(line) <= width for line in lines if line != remedy and " " in line.strip())
    assert console.folded("error: ", text, 200, 2) == text


def test_a_text_that_begins_with_an_empty_line_keeps_its_words():
    assert console.folded("error: ", "\nabc", 80, 2) == "\nabc"


def test_an_error_reaches_a_stream_that_is_no_file(monkeypatch):
    class Kept:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    kept = Kept()
    monkeypatch.setattr(sys, "stderr", kept)
    console.report(DataError("a.idx: byte 7", remedy="write it again"))
    assert "a.idx: byte 7" in kept.text and "write it again" in kept.text
