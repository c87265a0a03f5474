"""preprocess_data.py with kills, full disks and bad inputs, on several machines; and its messages."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from distributed import environment

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BYTES = ("--output-prefix", "p", "--tokenizer-type", "ByteTokenizer")


def start(tool: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(tool: str, *arguments: object, **options: object) -> tuple[int, str, str]:
    process = start(tool, *arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("p")}


def when_written(path: Path) -> int:
    """Nanoseconds; 0 if there is no such file."""
    return path.stat().st_mtime_ns if path.exists() else 0


def lines(count: int) -> str:
    return "".join(
        json.dumps({"text": f"line {n} of a story about żółw number {n * n} " * (n % 7)}) + "\n"
        for n in range(count)
    )


@pytest.mark.processes
@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_end_in_identical_bytes(tmp_path: Path, seed: int, kills: int) -> None:
    """``kills`` that hit a run which has saved something, and others from its start on.

    The process is stopped whenever it is looked at, so that none gets away between the look and the kill,
    however fast the machine.
    """
    generator = random.Random(seed)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    data = lines(60_000)
    (tmp_path / "a.jsonl").write_text(data)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(data[: len(data) // 2].rsplit("\n", 1)[0].encode(), 1)
    )
    total = sum(path.stat().st_size for path in tmp_path.glob("*.jsonl*"))
    arguments = ("--input", "../*.jsonl*", *BYTES, "--append-eod", "--save-seconds", 0)
    status, _, err = run("preprocess_data", *arguments, cwd=tmp_path / "whole")
    assert status == 0 and "continuing from" not in err, err
    folder, whole = tmp_path / "killed", contents(tmp_path / "whole")
    hits = 0
    for attempt in range(8 * kills):
        before = saved(folder)
        position = before[-1]["position"] if before else 0
        moment = generator.uniform(position, (position + total) / 2)
        # every other one soon after it starts, wherever that is
        seconds = generator.uniform(0, 0.5) if attempt % 2 else 60.0
        finishes = hits == kills
        process = start("preprocess_data", *arguments, "--workers", generator.choice([1, 1, 2]), cwd=folder)
        if not finishes:
            kill_later(
                process,
                lambda at=moment: bool(now := saved(folder)) and now[-1]["position"] > at,
                seconds,
                generator,
            )
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0 if finishes else process.returncode in (0, -signal.SIGKILL), err
        after = saved(folder)
        if process.returncode == 0 or len(after) > len(before):
            goes_on = bool(before) and not before[-1]["complete"]
            assert (f"continuing from {position / 1e6:,.1f} of {total / 1e6:,.1f} MB" in err) == goes_on, err
        if finishes:
            break
        if (folder / "p.journal").exists():
            assert after[: len(before)] == before  # nothing that was saved is done again
            hits += process.returncode != 0 and len(after) > len(before)
        elif (
            folder / "p_text_document.manifest.json"
        ).exists():  # whole before the kill: once more from the start
            assert {name: folder.joinpath(name).read_bytes() for name in whole} == whole
            for path in folder.iterdir():
                path.unlink()
        else:
            assert not before and not contents(folder)
    assert hits == kills, "the other runs ended before they were hit"
    assert contents(folder) == whole
    assert sorted(whole) == [f"p_text_document.{ending}" for ending in ("bin", "idx", "manifest.json")]


def saved(folder: Path) -> list[dict[str, Any]]:
    """What the journal of an unfinished run says that is done, one record a save."""
    try:
        journal = (folder / "p.journal").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in journal[: journal.rfind(b"\n") + 1].splitlines()[1:]]


def kill_later(
    process: subprocess.Popen[str], hit: Callable[[], bool], seconds: float, generator: random.Random
) -> None:
    """Let the process run a few milliseconds at a time; kill it when ``hit()``, or after so many seconds of
    that, unless it ends before.
    """
    while True:
        slice_of_time = min(generator.uniform(0, 0.01), seconds)
        time.sleep(slice_of_time)
        process.send_signal(signal.SIGSTOP)
        state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if state is not None and state.si_code != os.CLD_STOPPED:
            return
        seconds -= slice_of_time
        if seconds <= 0 or hit():
            process.kill()
            return
        process.send_signal(signal.SIGCONT)


@pytest.mark.processes
def test_a_full_disk_and_a_signal_keep_what_was_saved(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(30_000))
    size = (tmp_path / "a.jsonl").stat().st_size
    arguments = ("--input", "a.jsonl", *BYTES, "--save-seconds", 0)

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # the tokens are twice as long

    status, _, err = run("preprocess_data", *arguments, cwd=tmp_path, preexec_fn=small_files)
    assert status == 3
    assert "p_text_document cannot be written: File too large\n  remedy: free up space" in err
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".bin", ".idx", ".json"))]
    begun = when_written(tmp_path / "p_text_document.bin.partial")  # of the full disk
    process = start("preprocess_data", *arguments, cwd=tmp_path)
    while process.poll() is None and when_written(tmp_path / "p_text_document.bin.partial") <= begun:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and process.returncode in (0, 1), (process.returncode, err)
    status, _, err = run("preprocess_data", *arguments, cwd=tmp_path)
    assert status == 0 and ("continuing from" in err or process.returncode == 0), err
    killed = contents(tmp_path)
    status, _, err = run("preprocess_data", *arguments, cwd=tmp_path)
    assert contents(tmp_path) == killed


def bad_inputs(folder: Path) -> dict[str, tuple[str, str]]:
    """Arguments and the message they end in."""
    good = lines(3000).encode()
    whole = {"cut.jsonl.gz": gzip.compress(good)[:-20], "cut.jsonl.zst": zstandard.compress(good)[:-20]}
    files = {
        **whole,
        "latin.jsonl": b'{"text": "a"}\n{"text": "caf\xe9"}\n',
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "tokens.jsonl": b"MMIDIDX\x00\x00" + bytes(50),
        "binary.txt": b"\x7fELF\x00\x01",
        "empty.jsonl": b"",
        "hollow.parquet": b"",
        "foreign.parquet": b"no table",
        "key.jsonl": b'{"body": "a"}\n',
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "cut.jsonl.gz": ("cut.jsonl.gz", r"cut\.jsonl\.gz cannot be read beyond byte \d+: "),
        "cut.jsonl.zst": ("cut.jsonl.zst", r"cut\.jsonl\.zst cannot be read beyond byte \d+: "),
        "latin": ("latin.jsonl", r"latin\.jsonl, line 2, byte 27: the text is not UTF-8"),
        "broken": ("broken.jsonl", r"broken\.jsonl, line 2: invalid JSON: .* at column"),
        "tokens": (
            "tokens.jsonl",
            r"tokens\.jsonl, byte 0: the file is the index of existing token files",
        ),
        "binary": ("binary.txt", r"binary\.txt, byte 4: the file has a NUL"),
        "empty": ("empty.jsonl", r"empty\.jsonl: the input has no documents"),
        "hollow": ("hollow.parquet", r"empty file: hollow\.parquet"),
        "foreign": ("foreign.parquet", r"footer of .*foreign\.parquet cannot be read"),
        "key": ("key.jsonl", r"key\.jsonl, line 1: there is no key 'text' \(keys present: 'body'\)"),
        "glob": ("nothing-*.jsonl", r"no input file matches: nothing-\*\.jsonl"),
    }


BAD = (
    "cut.jsonl.gz",
    "cut.jsonl.zst",
    "latin",
    "broken",
    "tokens",
    "binary",
    "empty",
    "hollow",
    "foreign",
    "key",
    "glob",
)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(tmp_path: Path, bad: str) -> None:
    name, message = bad_inputs(tmp_path)[bad]
    before = {path.name for path in tmp_path.iterdir()}
    status, out, err = run("preprocess_data", "--input", name, *BYTES, "--save-seconds", 0, cwd=tmp_path)
    assert status == 3
    assert re.match(rf"error: .*{message}.*\n  remedy: \S.*\n$", err), err
    assert not out
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.processes
def test_flags_of_megatrons_tool_that_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(5))
    theirs = ("--log_interval", 1000, "--dataset-impl", "mmap")
    common = ("--input", "a.jsonl", "--tokenizer-type", "ByteTokenizer", "--output-prefix")
    for prefix, more in (("p", ()), ("q", theirs)):
        status, _, err = run("preprocess_data", *common, prefix, *more, cwd=tmp_path)
        assert status == 0, err
    for ending in (".bin", ".idx"):
        ours = (tmp_path / f"p_text_document{ending}").read_bytes()
        assert (tmp_path / f"q_text_document{ending}").read_bytes() == ours
    status, _, err = run("preprocess_data", *common, "r", "--dataset-impl", "lazy", cwd=tmp_path)
    assert status == 2 and "--dataset-impl = lazy: must be one of mmap" in err


@pytest.mark.processes
def test_three_machines_and_a_merge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(500))
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        arrow.table({"text": [f"row {n}" for n in range(90)]}), tmp_path / "b.parquet", row_group_size=20
    )
    common = ("--input", "a.jsonl", "b.parquet", "--tokenizer-type", "ByteTokenizer", "--append-eod")
    for shard in (("--shard", "1/3"), ("--shard", "2", "--partitions", 3), ("--shard", "3/3")):
        status, _, err = run("preprocess_data", *common, "--output-prefix", "p", *shard, cwd=tmp_path)
        assert status == 0, err
    status, _, err = run("merge_data", "p", "--remove-shards", cwd=tmp_path)
    assert status == 0 and "590 documents" in err, err
    merged = contents(tmp_path)
    assert run("preprocess_data", *common, "--output-prefix", "p", cwd=tmp_path)[0] == 0
    assert contents(tmp_path) == merged
    assert len(merged) == 3
    status, out, err = run("inspect_data", "p_text_document", "--verify", cwd=tmp_path)
    assert status == 0 and "verified" in out
    with open(tmp_path / "p_text_document.bin", "r+b") as stream:
        stream.write(b"\x01\x01")
    status, out, err = run("inspect_data", "p_text_document", "--verify", cwd=tmp_path)
    assert status == 3 and not out
    assert "p_text_document.bin: the file has changed" in err and "remedy: copy the files again" in err
    assert run("inspect_data", "p_text_document", cwd=tmp_path)[0] == 0
    status, _, err = run("merge_data", "p", cwd=tmp_path)
    assert status == 3 and "p: there are no shards (p.shard-" in err
    status, _, err = run("preprocess_data", *common, "--output-prefix", "p", "--partitions", 3, cwd=tmp_path)
    assert status == 2 and "--partitions = 3: needs --shard I" in err


def test_progress_tells_speeds_and_the_time_left(tmp_path: Path) -> None:
    """Lines elsewhere than on a terminal: speed, documents, and the time left; a few, ever further apart."""
    script = """
import sys, time
from megatron_hyperrouter.commands.data.preprocess import PreprocessBar
clock = [100.0]
time.monotonic = lambda: clock[0]
with PreprocessBar() as progress:
    for second in range(1001):
        clock[0] = 100.0 + second
        progress.show(50_000_000 + second * 1_000_000, 1_050_000_000, 10 + 7 * second)
print(progress.summary(), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment()
    )
    told = done.stderr.splitlines()
    assert told[0] == "mhr preprocess: continuing from 50.0 of 1,050.0 MB"
    assert told[1] == "mhr preprocess: 55.0 of 1,050.0 MB, 1.0 MB/s, 7 documents/s, 0:16:35 left (ETA)"
    assert told[-1] == "1,000.0 MB in 1000.0 s, 1.0 MB/s, 7 documents/s"
    assert 8 <= len(told) <= 20
