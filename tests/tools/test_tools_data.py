"""The data tools as a user starts them: exit statuses, messages, signals, memory, help."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_hyperrouter.data.store.token_files import IndexedDataset

TOOLS = Path(__file__).resolve().parents[2] / "tools"
STORY = "".join(f"Line {n} of a story about żółw number {n * n}.\n" for n in range(40))


def start(tool: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, arguments)]
    # Tests that a shell started in the background ignore SIGINT, and so would the tool, on purpose.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(tool: str, *arguments: object, **options: object) -> tuple[int, str, str]:
    process = start(tool, *arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def corpus(path: Path, num_bytes: int, text: str = STORY) -> Path:
    line = json.dumps({"text": text}) + "\n"
    path.write_text(line * (num_bytes // len(line) + 1))
    return path


@pytest.fixture
def slow(tmp_path: Path) -> tuple[object, ...]:
    """Arguments of a preprocess_data that takes several seconds at least: time to interrupt it."""
    from megatron_hyperrouter.data.tokenize.bpe import train_bpe

    corpus(tmp_path / "big.jsonl", 60_000_000)
    train_bpe(iter([STORY]), 300, str(tmp_path / "tokenizer.json"))
    return (
        "--tokenizer-backend",
        "tokenizers",
        "--input",
        "big.jsonl",
        "--output-prefix",
        "p",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "tokenizer.json",
    )


@pytest.mark.processes
def test_from_folder_to_described_tokens(tmp_path: Path) -> None:
    """The four tools in a row, from another working folder, with relative paths."""
    for n in range(30):
        (tmp_path / "root" / f"{n}").mkdir(parents=True)
        (tmp_path / "root" / f"{n}" / "story.txt").write_text(STORY + str(n))
    tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "out/tokenizer.json")
    steps = [
        ("make_corpus", "--root", "root", "--output", "out/corpus.jsonl"),
        (
            "train_tokenizer",
            "--input",
            "out/corpus.jsonl",
            "--vocab-size",
            300,
            "--output",
            "out/tokenizer.json",
        ),
        (
            "preprocess_data",
            "--input",
            "out/corpus.jsonl",
            "--output-prefix",
            "out/p",
            "--append-eod",
            "--workers",
            2,
            *tokenizer,
        ),
        ("inspect_data", "out/p_text_document", "--verify", "--tokens", 20, *tokenizer),
    ]
    for tool, *arguments in steps:
        status, out, err = run(tool, *arguments, cwd=tmp_path)
        assert status == 0, err
    made = [f"p_text_document.{ending}" for ending in ("bin", "idx", "manifest.json")]
    assert sorted(os.listdir(tmp_path / "out")) == ["corpus.jsonl", *made, "tokenizer.json"]
    data = IndexedDataset(tmp_path / "out" / "p_text_document")
    described = dict(line.split(":", 1) for line in out.splitlines())
    assert described["documents"].strip() == "30"
    assert described["tokens"].strip() == f"{data.num_tokens:,}"
    assert described["first tokens"].split() == [str(token) for token in data.tokens[:20]]
    assert "Line 0 of a story" in described["first text"]


WRONG = [
    ("make_corpus", ["--output", "o", "--root", "gone"], 3, "gone: no such folder"),
    ("make_corpus", [], 2, "--output"),
    (
        "train_tokenizer",
        ["--input", "good.jsonl", "--vocab-size", "256", "--output", "o"],
        2,
        "must be at least 257",
    ),
    ("train_tokenizer", ["--input", "gone.jsonl", "--vocab-size", "300", "--output", "o"], 3, "gone.jsonl"),
    (
        "train_tokenizer",
        ["--input", "broken.jsonl", "--vocab-size", "300", "--output", "o"],
        3,
        "broken.jsonl, line 2: invalid JSON",
    ),
    (
        "train_tokenizer",
        ["--input", "good.jsonl", "--vocab-size", "300", "--output", "o", "--json-key", "body"],
        3,
        "keys present: 'text'",
    ),
    (
        "preprocess_data",
        ["--input", "gone.jsonl", *(BYTES := ["--output-prefix", "o", "--tokenizer-type", "ByteTokenizer"])],
        3,
        "gone.jsonl",
    ),
    ("preprocess_data", ["--input", "broken.jsonl", *BYTES], 3, "broken.jsonl, line 2: invalid JSON"),
    ("preprocess_data", ["--input", "empty.jsonl", *BYTES], 3, "empty.jsonl: the input has no documents"),
    (
        "preprocess_data",
        ["--input", "good.jsonl", *BYTES, "--json-keys", "body"],
        3,
        "line 1: there is no key 'body' (keys present: 'text')",
    ),
    ("preprocess_data", ["--input", "good.jsonl", *BYTES, "--workers", "0"], 2, "--workers = 0"),
    (
        "preprocess_data",
        ["--input", "good.jsonl", "--output-prefix", "o", "--tokenizer-type", "SentencePiece"],
        2,
        "SentencePiece",
    ),
    (
        "preprocess_data",
        ["--input", "good.jsonl", "--output-prefix", "o", "--tokenizer-type", "HuggingFaceTokenizer"],
        2,
        "--tokenizer-model",
    ),
    (
        "preprocess_data",
        ["--input", "good.jsonl", *BYTES[:3], "HuggingFaceTokenizer", "--tokenizer-model", "gone"],
        3,
        "gone: there is no such tokenizer file",
    ),
    ("preprocess_data", ["--inptu", "good.jsonl", *BYTES], 2, "--input"),
    ("inspect_data", ["gone"], 3, "gone.idx"),
]


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "message"),
    WRONG,
    ids=[f"{tool}-{message}" for tool, _, _, message in WRONG],
)
def test_wrong_use(tmp_path: Path, tool: str, arguments: list[str], status: int, message: str) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    found, out, err = run(tool, *arguments, cwd=tmp_path)
    assert found == status
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl", "broken.jsonl", "empty.jsonl"}


def test_a_missing_library_has_status_5(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "hidden" / "tokenizers").mkdir(parents=True)
    (tmp_path / "hidden" / "tokenizers" / "__init__.py").write_text("raise ImportError('not here')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    arguments = ("--input", "good.jsonl", "--vocab-size", 300, "--output", "o")
    status, _, err = run("train_tokenizer", *arguments, cwd=tmp_path, env=environment)
    assert (status, "the tokenizers library" in err, "setup_env.sh" in err) == (5, True, True)


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path, slow: tuple[object, ...], number: signal.Signals, workers: int
) -> None:
    process = start("preprocess_data", *slow, "--workers", workers, cwd=tmp_path, start_new_session=True)
    _wait_for(
        lambda: (
            (tmp_path / "p_text_document.bin.partial").exists()
            and os.path.getsize(tmp_path / "p_text_document.bin.partial")
        ),
        process,
    )
    # Ctrl-C reaches the workers too
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"stopped by {number.name}; run the same command again to continue" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "tokenizer.json"]


@pytest.mark.processes
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, slow: tuple[object, ...]) -> None:
    process = start("preprocess_data", *slow, "--workers", 2, cwd=tmp_path)
    partial = tmp_path / "p_text_document.bin.partial"
    _wait_for(lambda: partial.exists() and os.path.getsize(partial), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not (tmp_path / "p_text_document.idx").exists()


def test_a_full_disk_keeps_the_files_that_were_there(tmp_path: Path) -> None:
    corpus(tmp_path / "big.jsonl", 3_000_000)
    (tmp_path / "p_text_document.bin").write_text("from before")
    arguments = ("--input", "big.jsonl", "--output-prefix", "p", "--tokenizer-type", "ByteTokenizer")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    status, _, err = run("preprocess_data", *arguments, cwd=tmp_path, preexec_fn=small_files)
    assert status == 3
    assert "cannot be written" in err
    assert (tmp_path / "p_text_document.bin").read_text() == "from before"
    assert {path.name for path in tmp_path.iterdir()} == {"big.jsonl", "p_text_document.bin"}


# Run by an interpreter of its own: a process inherits the peak of the one that started it, and pytest may
# hold all of torch.
PEAK = (
    "import os, subprocess, sys; usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0); "
    "print(usage[1], usage[2].ru_maxrss)"
)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["small documents", "plain text"])
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, workers: int, kind: str) -> None:
    """40 MB more of text, and less than 10 MB more of memory in the largest process: holding the text or its
    tokens would show.
    """
    peaks = []
    for size in (4_000_000, 44_000_000):
        name = "big.jsonl" if kind == "small documents" else "big.txt"
        corpus(tmp_path / name, size) if name == "big.jsonl" else (tmp_path / name).write_text(
            STORY * (size // len(STORY))
        )
        arguments = (
            "--input",
            name,
            "--output-prefix",
            "p",
            "--tokenizer-type",
            "ByteTokenizer",
            "--append-eod",
            "--workers",
            workers,
        )
        command = [
            sys.executable,
            "-c",
            PEAK,
            sys.executable,
            str(TOOLS / "preprocess_data.py"),
            *map(str, arguments),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        # of the tool, or of the largest worker that it has waited for
        status, kilobytes = map(int, done.stdout.split())
        assert status == 0, done.stderr
        peaks.append(kilobytes / 1024)
    assert peaks[0] < 80, peaks  # else something else was measured
    assert peaks[1] - peaks[0] < 10, peaks


def test_progress_is_told_on_stderr(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl", 3_000_000)
    arguments = ("--input", "a.jsonl", "--output-prefix", "p", "--tokenizer-type", "ByteTokenizer")
    status, out, err = run("preprocess_data", *arguments, cwd=tmp_path)
    assert status == 0
    assert not out
    assert "MB/s" in err
    assert "\x1b" not in err  # no terminal, no terminal codes


def test_a_terminal_gets_a_bar_with_speed_and_eta(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl", 30_000_000)
    arguments = ["--input", "a.jsonl", "--output-prefix", "p", "--tokenizer-type", "ByteTokenizer"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=slave, stdout=slave, stdin=slave, env=environment
    )
    os.close(slave)
    seen = b""
    try:
        while block := os.read(master, 1 << 16):
            seen += block
    except OSError:  # the terminal closes with the process
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert re.search(
        rb"[\d.]+ of [\d.]+ MB, [\d.]+ MB/s, [\d,]+ documents/s, \d+:\d\d:\d\d left \(ETA\)", seen
    ), "whole, on 80 columns"
    assert "━".encode() in seen


@pytest.mark.parametrize(
    "tool", ["make_corpus", "train_tokenizer", "preprocess_data", "inspect_data", "merge_data"]
)
def test_help_explains_every_option(tool: str) -> None:
    status, out, _ = run(tool, "--help")
    assert status == 0
    sections = out.split("options:\n")[1].split("\n\n")[0]
    entries = [
        entry.strip() for entry in re.split(r"^  (?=-)", sections, flags=re.MULTILINE) if entry.strip()
    ]
    assert len(entries) >= 2
    for entry in entries:
        explained = re.match(r"-.*?(?:\s{2,}|\n\s+)(\S+ .+)", entry, flags=re.DOTALL)
        assert explained, f"no help: {entry}"


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl", 1000)
    run(
        "preprocess_data",
        "--input",
        "a.jsonl",
        "--output-prefix",
        "p",
        "--tokenizer-type",
        "ByteTokenizer",
        cwd=tmp_path,
    )
    command = f"{sys.executable} {TOOLS / 'inspect_data.py'} p_text_document | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def _wait_for(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
