"""The journal: saved progress is read back, an incomplete line is ignored, and refusals name what differs."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_hyperrouter.data.store.journal import Journal
from megatron_hyperrouter.errors import ConfigError, DataError

SETTINGS = {"--append-eod": False, "--json-keys": "text"}
INPUTS = [("a.jsonl", 10, 111), ("b.jsonl", 20, 222)]
RECORDS = [{"n": 1}, {"n": 2, "żółw": [1, None]}]


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = str(tmp_path / "folder" / "p.journal")
    journal = Journal(made, SETTINGS, INPUTS)
    assert journal.records == []
    for record in RECORDS:
        journal.append(record)
    journal.close(remove=False)
    return made


def records(path: str, **options: bool) -> list[dict]:
    journal = Journal(path, SETTINGS, INPUTS, **options)
    journal.close(remove=False)
    return journal.records


def test_records_come_back_until_they_are_forgotten(path: str) -> None:
    assert records(path) == RECORDS
    assert records(path, overwrite=True) == []
    assert records(path) == []
    Journal(path, SETTINGS, INPUTS).close(remove=True)
    assert not Path(path).exists()


def test_every_way_to_cut_the_last_line_loses_that_line_alone(path: str) -> None:
    whole = Path(path).read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        Path(path).write_bytes(whole[:cut])
        kept = (
            sum(len(b"".join(lines[: number + 2])) <= cut for number in range(2))
            if cut >= len(lines[0])
            else 0
        )
        assert records(path) == RECORDS[:kept], cut
        journal = Journal(path, SETTINGS, INPUTS)
        journal.append({"n": 3})
        journal.close(remove=False)
        assert records(path) == [*RECORDS[:kept], {"n": 3}]


def test_garbage_after_a_crash_of_the_machine(path: str) -> None:
    with open(path, "ab") as stream:
        stream.write(b"\0" * 100 + b"\n" + b'{"n": 9}\n')
    assert records(path) == RECORDS


def test_other_settings_are_named(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Journal(path, {"--append-eod": True, "--json-keys": "body"}, INPUTS)
    assert "--append-eod = True: differs from False in the unfinished run" in str(caught.value)
    assert "--json-keys = body: differs from text" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert records(path) == RECORDS  # nothing is lost by the attempt


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [INPUTS[0], ("b.jsonl", 21, 222)],
            r"b\.jsonl: the input has changed since .*had 20 bytes and now has 21",
        ),
        ([INPUTS[0], ("b.jsonl", 20, 223)], r"b\.jsonl: the input has changed since"),
        (
            [INPUTS[0], ("c.jsonl", 20, 222)],
            r"c\.jsonl: the unfinished run that wrote .* read b\.jsonl instead",
        ),
        (INPUTS[:1], "the number of input files is 1, but was 2 in the unfinished run that wrote"),
        ([*INPUTS, INPUTS[0]], "the number of input files is 3, but was 2 in the unfinished run that wrote"),
    ],
)
def test_changed_inputs_are_named(path: str, inputs: list[tuple[str, int, int]], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Journal(path, SETTINGS, inputs)
    assert "--overwrite" in caught.value.remedy
    journal = Journal(path, SETTINGS, inputs, overwrite=True)
    assert journal.records == []
    journal.close(remove=False)


def test_a_second_process_is_refused(path: str) -> None:
    journal = Journal(path, SETTINGS, INPUTS)
    with pytest.raises(DataError, match="another process is writing these files"):
        Journal(path, SETTINGS, INPUTS, overwrite=True)
    assert Path(path).read_bytes().count(b"\n") == 3
    journal.close(remove=False)
    assert records(path) == RECORDS


def test_a_journal_that_its_owner_removes_before_it_is_locked_is_opened_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a third process would find no journal, and write the same files."""
    real = fcntl.flock

    def flock(stream: BinaryIO, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        Path(path).unlink()  # the owner is done in this moment
        real(stream, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = Journal(path, SETTINGS, INPUTS)
    assert journal.records == [] and Path(path).exists()
    with pytest.raises(DataError, match="another process is writing these files"):
        Journal(path, SETTINGS, INPUTS)
    journal.close(remove=True)


@pytest.mark.parametrize(
    "foreign", [b"Dear diary", b"[1]\n", b'{"version": 0, \n'.replace(b"version", b"edition"), b"\0\0text"]
)
def test_another_file_of_that_name_is_left_alone(path: str, foreign: bytes) -> None:
    Path(path).write_bytes(foreign)
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"p\.journal: .* but another file already has it"):
            Journal(path, SETTINGS, INPUTS, overwrite=overwrite)
        assert Path(path).read_bytes() == foreign
