"""The data tools with unusual and wrong input: one message with a remedy, the right status, and no file of
the user is lost.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from distributed import environment

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXT = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(50))
PREPROCESS = "preprocess_data --input a.jsonl --output-prefix p --tokenizer-type ByteTokenizer"
TRAIN = "train_tokenizer --input a.jsonl --output t.json --vocab-size"
ASCII_ONLY = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class Case(NamedTuple):
    """A command, its status, what it says, and the files there are before it beside the input."""

    command: str
    status: int
    says: str
    files: dict[str, bytes | None]  # None: a folder


def case(command: str, status: int, says: str, **files: bytes | None) -> Case:
    return Case(command, status, says, {name.replace("__", "."): data for name, data in files.items()})


HEAD = b'{"version": 1, "settings": {"--tokenizer-type": "ByteTokenizer"}, "inputs": []}\n'
CASES = {
    # settings: status 2
    "a folder as prefix": case(
        PREPROCESS + " --output-prefix out/", 2, "--output-prefix = out/: must not end with a slash"
    ),
    "no prefix": case(PREPROCESS + " --output-prefix=", 2, "--output-prefix = '': must not be empty"),
    "a key with a slash": case(
        PREPROCESS + " --json-keys ../b", 2, "--json-keys = '../b': must not be empty or contain a slash"
    ),
    "an empty key": case(
        PREPROCESS + " --json-keys=", 2, ("--json-keys = '': must not be empty or contain a slash")
    ),
    "100000 workers": case(PREPROCESS + " --workers 100000", 2, "--workers = 100000: must be from 1 to 1024"),
    "a negative time": case(
        PREPROCESS + " --save-seconds -1", 2, "--save-seconds = -1.0: must be at least 0"
    ),
    "no number of a time": case(
        PREPROCESS + " --save-seconds nan", 2, "--save-seconds = nan: must be a finite number"
    ),
    "a prefix too long for the manifest": case(
        PREPROCESS + " --output-prefix " + "p" * 220,
        2,
        "--output-prefix = p+: is too long: the longest file name would have 256 bytes, but 255 is",
    ),
    "a shard of 20 digits": case(PREPROCESS + " --shard 1/" + "9" * 20, 2, r"--shard = 1/9+: must be I/N"),
    "input and output": case(
        PREPROCESS + " --input p_text_document.bin",
        2,
        "would overwrite the input .*p_text_document.bin",
        p_text_document__bin=b"a text",
    ),
    "input and journal": case(
        PREPROCESS + " --input p.journal",
        2,
        "would overwrite the input .*p.journal",
        p__journal=b"Dear diary\n",
    ),
    "vocabulary 2**40": case(f"{TRAIN} {2**40}", 2, f"--vocab-size = {2**40}: must be at most 16777216"),
    "vocabulary 10**30": case(f"{TRAIN} {10**30}", 2, f"--vocab-size = {10**30}: must be at most 16777216"),
    "no bytes to train on": case(f"{TRAIN} 300 --max-bytes 0", 2, "--max-bytes = 0: must be at least 1"),
    "a tokenizer over its text": case(
        f"{TRAIN} 300 --output ./a.jsonl", 2, "--output = ./a.jsonl: is one of the inputs"
    ),
    "a tokenizer of a long name": case(
        f"{TRAIN} 300 --output {'t' * 250}", 2, "--output = t+: cannot be written: File name too long"
    ),
    "a tokenizer below a file": case(
        f"{TRAIN} 300 --output a.jsonl/t.json",
        2,
        "--output = a.jsonl/t.json: cannot be written: (Not a directory|File exists)",
    ),
    "no bytes of a corpus": case(
        "make_corpus --root . --output c.jsonl --max-bytes -1", 2, "--max-bytes = -1: must be at least 1"
    ),
    "negative tokens": case("inspect_data p --tokens -5", 2, "--tokens = -5: must be at least 0"),
    # data: status 3
    "a corpus of a long name": case(
        "make_corpus --root . --output " + "c" * 250,
        3,
        "c+.partial cannot be written: File name too long\n  remedy: shorten that name, or choose",
    ),
    "another p.journal": case(
        PREPROCESS, 3, "name, but another file already has it", p__journal=b"Dear diary\n"
    ),
    "another p.journal, overwrite": case(
        PREPROCESS + " --overwrite",
        3,
        ("name, but another file already has it"),
        p__journal=b'{"dear": "diary"}\n',
    ),
    "a journal of another version": case(
        PREPROCESS,
        3,
        "p.journal: another version of this program wrote",
        p__journal=HEAD.replace(b"1", b"9", 1),
    ),
    "a folder in the way": case(
        PREPROCESS, 3, "p_text_document.bin.partial cannot be written", p_text_document__bin__partial=None
    ),
    "UTF-16": case(
        PREPROCESS,
        3,
        "a.jsonl, byte 0: the file is UTF-16\n  remedy: .*iconv -f UTF-16",
        a__jsonl=TEXT.encode("utf-16"),
    ),
    "a manifest of other types": case(
        "inspect_data p --verify",
        3,
        "not a manifest of token files",
        p__manifest__json=b'{"version": 1, "bin": {"bytes": "x", "sha256": 5}}',
    ),
    "a manifest without end": case(
        "inspect_data p --verify", 3, "p.manifest.json cannot be read", p__manifest__json=b"[" * 100_000
    ),
    "a corpus without a name": case("make_corpus --root . --output=", 2, "--output = '': must not be empty"),
    "a corpus in a folder's place": case(
        "make_corpus --root . --output c", 3, "c cannot be written, because it is not a file", c=None
    ),
}


def run(command: list[str], folder: Path, **options: object) -> tuple[int, str, str]:
    tool, *arguments = command
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120, **options
    )
    return done.returncode, done.stdout, done.stderr


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        os.fspath(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_one_message_a_remedy_and_no_file_lost(tmp_path: Path, name: str) -> None:
    command, status, says, files = CASES[name]
    for file, data in {"a.jsonl": TEXT.encode(), **files}.items():
        (tmp_path / file).mkdir() if data is None else (tmp_path / file).write_bytes(data)
    before = tree(tmp_path)
    found, out, err = run(command.split(), tmp_path)
    assert (found, out) == (status, ""), err
    assert "Traceback" not in err
    assert err.startswith("error: "), err
    assert re.search(says, err), err
    assert "  remedy: " in err if status == 3 else re.search(r"\n  - --\S+ = .*: .*\n    remedy: \S", err), (
        err
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", [10, 100])
def test_a_disk_too_full_for_the_first_line_of_the_journal(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_text(TEXT)
    before = tree(tmp_path)
    status, _, err = run(
        PREPROCESS.split(),
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert status == 3 and "p.journal cannot be written: File too large\n  remedy: free up space" in err, err
    assert tree(tmp_path) == before


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """From such a file to such files, and what a manifest says of them is what they are called."""
    source, prefix = (
        b"a\xff.jsonl".decode(errors="surrogateescape"),
        b"p\xff".decode(errors="surrogateescape"),
    )
    (tmp_path / source).write_text(TEXT)
    command = [
        "preprocess_data",
        "--input",
        source,
        "--output-prefix",
        prefix,
        "--tokenizer-type",
        "ByteTokenizer",
    ]
    status, _, err = run(command, tmp_path)
    assert status == 0, err
    manifest = json.loads((tmp_path / f"{prefix}_text_document.manifest.json").read_bytes())
    assert [each["path"] for each in manifest["inputs"]] == [source]
    status, out, err = run(["inspect_data", f"{prefix}_text_document", "--verify"], tmp_path)
    assert status == 0 and "verified" in out, err


def test_a_terminal_that_knows_no_such_letters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "żółw"}\n')
    assert run(PREPROCESS.split(), tmp_path)[0] == 0
    status, out, err = run(
        ["inspect_data", "p_text_document", "--tokenizer-type", "ByteTokenizer"], tmp_path, env=ASCII_ONLY
    )
    assert status == 0 and r"\u017c\xf3\u0142w" in out, err


def prepared(folder: Path, name: str, env: dict[str, str]) -> str:
    """Corpus, tokenizer and token files, each called ``name``; returns all output."""
    (folder / "root").mkdir()
    (folder / "root" / f"{name}.txt").write_text("a text of a few words, a text of other words")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{name}.json"]
    said = ""
    for command in (
        ["make_corpus", "--root", "root", "--output", f"{name}.jsonl"],
        ["train_tokenizer", "--input", f"{name}.jsonl", "--vocab-size", "270", "--output", f"{name}.json"],
        ["preprocess_data", "--input", f"{name}*l", "--output-prefix", name, *tokenizer],
        ["inspect_data", f"{name}_text_document", "--verify", *tokenizer],
    ):
        status, out, err = run(command, folder, env=env)
        assert status == 0, err
        said += out + err
    return said


def test_names_beyond_ascii_where_python_does_not_expect_them(tmp_path: Path) -> None:
    """The same files as with plain names, and messages in letters that the terminal has."""
    name = "слово-é"
    for folder in ("plain", "other"):
        (tmp_path / folder).mkdir()
    prepared(tmp_path / "plain", "word", dict(os.environ))
    said = prepared(tmp_path / "other", name, ASCII_ONLY)
    assert said.isascii() and name.encode("ascii", "backslashreplace").decode() in said
    plain = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir() if path.is_file()}
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir() if path.is_file()}
    assert sorted(other) == sorted(each.replace("word", name) for each in plain)
    for each in ("word.json", "word_text_document.bin", "word_text_document.idx"):
        assert other[each.replace("word", name)] == plain[each], each


@pytest.mark.parametrize("options", [[], ["-X", "utf8=0"]])
def test_one_message_about_a_name_beyond_ascii(tmp_path: Path, options: list[str]) -> None:
    """Also where Python does not change its encoding, so that the names stay bytes."""
    tool = str(TOOLS / "inspect_data.py")
    done = subprocess.run(
        [sys.executable, *options, tool, "слово"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        env=ASCII_ONLY,
        check=False,
    )
    assert done.returncode == 3 and done.stderr.startswith(b"error: \\u"), done.stderr
    assert b".idx: no such file\n  remedy: " in done.stderr and b"Traceback" not in done.stderr


def test_a_corpus_does_not_swallow_itself(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    command = ["make_corpus", "--root", ".", "--output", "c.jsonl"]
    made = [run(command, tmp_path)[0] or (tmp_path / "c.jsonl").read_bytes() for _ in range(2)]
    assert made[0] == made[1] == b'{"text": "one", "source": "one.txt"}\n'


def make_fifo(folder: Path) -> None:
    os.mkfifo(folder / "c.jsonl")


def link_to_fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "c.jsonl").symlink_to("fifo")


@pytest.mark.parametrize("make", [make_fifo, link_to_fifo])
def test_a_device_is_not_replaced_by_a_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """As /dev/null would be, under root."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one.txt").write_text("one")
    make(tmp_path)
    status, _, err = run(["make_corpus", "--root", "root", "--output", "c.jsonl"], tmp_path)
    assert status == 3 and "c.jsonl cannot be written, because it is not a file" in err
    assert (tmp_path / "c.jsonl").is_fifo()
    status, _, err = run(f"preprocess_data --input c.jsonl {PREPROCESS.split(' ', 3)[3]}".split(), tmp_path)
    assert status == 3 and "remedy: save the input in a regular file first" in err, err


def test_the_key_that_a_message_names_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one two"}\n')
    status, _, err = run(f"{TRAIN} 260".split(), tmp_path)
    assert status == 3 and "--json-keys KEY" in err
    assert run(f"{TRAIN} 260 --json-keys body".split(), tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("make", "says"), [("bytes(2**62)", ""), ("numpy.zeros(2**58)", r": Unable to allocate .+ EiB .+")]
)
def test_too_little_memory_is_one_message(make: str, says: str) -> None:
    script = (
        "import numpy; from megatron_hyperrouter.terminal import run_tool; "
        f"run_tool(lambda arguments: {make})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 1
    assert re.fullmatch(
        rf"error: not enough memory{says}\n  remedy: free some memory, "
        r"or use smaller sizes \(such as --micro-batch-size or --workers\)\n",
        done.stderr,
    ), done.stderr


def test_a_rank_that_its_launcher_ends_repeats_no_error() -> None:
    """Rank 0 has met the same error; the launcher then sends SIGTERM to the others."""
    script = (
        "from megatron_hyperrouter import terminal\n"
        "def main(arguments):\n"
        "    print('ready', flush=True)\n"
        "    raise terminal.HyperRouterError('wrong')\n"
        "terminal._PATIENCE = 60\n"
        "terminal.run_tool(main)\n"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"RANK": "1"},
    )
    assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    latest = time.monotonic() + 5  # where the system does not say what a process waits for
    while not _sleeps(rank.pid) and time.monotonic() < latest:
        time.sleep(0.05)
    rank.terminate()
    _, said = rank.communicate(timeout=30)
    assert (rank.returncode, said) == (-signal.SIGTERM, "")


def _sleeps(pid: int) -> bool:
    """Whether the process waits for a clock."""
    return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()
