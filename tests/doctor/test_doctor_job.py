"""``mhr doctor`` in a job of several ranks: each injected fault is named, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import environment, free_port
from program.launched import Zygote

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("examined.py")


def examine(
    zygote: Zygote, folder: Path, faults: str, *flags: object, ranks: int, expect: int
) -> dict[str, Any]:
    report = folder / "report.json"
    words = [faults, "--json", report, "--run-dir", "run", *flags]
    job = zygote.run(words, program=WORKER, ranks=ranks, launched=True, expect=expect)
    found: dict[str, Any] = json.loads(report.read_text())
    # the first rank that leaves with 5 makes the launcher end the others: they keep their own status
    assert found["status"] == expect and set(job.statuses) == {expect}, job.statuses
    assert "Traceback" not in job.stderr
    return found | {"stdout": job.stdout}


def faults_of(report: dict[str, Any]) -> dict[str, str]:
    return {each["check"]: each["text"] for each in report["findings"] if each["level"] == "fault"}


def test_a_sound_machine_has_no_fault(zygote: Zygote, tmp_path: Path) -> None:
    """Nor one on which other work disturbs the first measurements."""
    report = examine(zygote, tmp_path, "disturbed@1", ranks=4, expect=0)
    assert faults_of(report) == {} and report["ranks"] == 4 and len(report["hosts"]) == 1
    checks = {each["check"] for each in report["findings"]}
    assert {"versions", "extension", "speed", "clock", "ports", "collectives", "run folder", "lock"} <= checks
    assert all(report["numbers"][name] > 1e6 for name in ("all_reduce", "all_to_all", "pair"))
    assert len(report["numbers"]["matmul"]) == 4 and "no faults" in report["stdout"]


SEEDED = [
    # what one rank has, and no other
    ("other_version@1", "versions", "rank 1 on", "numpy 0.0.1"),
    ("no_extension@1", "extension", "rank 1 on", "NumPy"),
    ("wrong_clock@1", "clock", "rank 1 on", "5.0 s ahead"),
    ("few_open_files@1", "open files", "rank 1 on", "512"),
    ("slow@1", "speed", "rank 1 on", "% of that speed"),
    ("own_locks@1", "lock", "rank 1 on", "could lock a file that rank 0 had already locked"),
    ("closed_ports@1", "ports", "rank 1 on", "Connection refused"),
    ("torn_renames@0", "rename", "not atomic", ""),
]


def test_eight_faults_at_once_are_all_named(zygote: Zygote, tmp_path: Path) -> None:
    found = examine(zygote, tmp_path, ",".join(word for word, *_ in SEEDED), ranks=2, expect=5)
    faults = faults_of(found)
    assert sorted(faults) == sorted(check for _, check, *_ in SEEDED)
    for _, check, *words in SEEDED:
        assert all(word in faults[check] for word in words), faults[check]
    assert all(each["remedy"] for each in found["findings"] if each["level"] == "fault")
    assert "FAULT  clock" in found["stdout"] and "8 faults" in found["stdout"]


def test_a_folder_that_is_not_shared_and_no_room(zygote: Zygote, tmp_path: Path) -> None:
    found = faults_of(examine(zygote, tmp_path, "not_shared@1", "--checkpoint-gb", 1e6, ranks=2, expect=5))
    assert sorted(found) == ["room", "run folder"], found
    assert "rank 1 on" in found["run folder"] and "3,000,000.0 GB" in found["room"]


def test_the_rank_that_cannot_exchange_is_named(zygote: Zygote, tmp_path: Path) -> None:
    """The ranks that wait for it are not named."""
    found = faults_of(examine(zygote, tmp_path, "no_exchange@1", ranks=2, expect=5))
    assert sorted(found) == ["collectives"]
    assert "cannot exchange tensors; rank 1 on" in found["collectives"], found
    assert "unhandled system error" in found["collectives"]


def test_a_full_disk(zygote: Zygote, tmp_path: Path) -> None:
    found = faults_of(examine(zygote, tmp_path, "full_disk@0", ranks=2, expect=5))
    assert sorted(found) == ["disk"] and "File too large" in found["disk"]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_meet(tmp_path: Path, rank: int) -> None:
    """Rank 0 waits for one that never comes; rank 1 finds nobody at the address."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    code = (
        "from datetime import timedelta; from megatron_hyperrouter.doctor import ranks; import sys\n"
        "ranks.PATIENCE = timedelta(seconds=2); sys.argv = ['doctor']\n"
        "from megatron_hyperrouter.commands.main import start; start('doctor')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**{name: str(value) for name, value in place.items()}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    assert f"127.0.0.1:{place['MASTER_PORT']}" in done.stderr and "remedy" in done.stderr
    assert os.listdir(tmp_path) == []
