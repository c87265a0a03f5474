"""The end of the launcher stops a rank; the end of a shell does not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hyperrouter.guard import launcher
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.processes import child_environment

PROGRAM = ["python", "-u", "pretrain_gpt_hyperrouter.py"]
TORCHRUN = ["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node", "2"]
DEEPSPEED = ["/venv/bin/python", "/venv/bin/deepspeed", "--num_gpus", "2"]
ITS_PART = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"]
SHELL, REMOTE = ["-bash"], ["bash", "-c", "cd /x; python -u -m deepspeed.launcher.launch --node_rank=1"]
IN_THE_BACKGROUND = ["bash", "-c", "nohup deepspeed --num_gpus 2 pretrain_gpt_hyperrouter.py &"]
SSHD, WRAPPER, OWN = ["sshd: me"], ["bash", "wrapper.sh"], ["python", "my_launcher.py"]
CHAINS = {  # processes from the rank's parent up -> how many of them are watched, and which
    "torchrun": ([TORCHRUN, SHELL, SSHD], [0]),
    "deepspeed": ([ITS_PART, DEEPSPEED, SHELL, SSHD], [0, 1]),
    "deepspeed from a shell that may end": ([ITS_PART, DEEPSPEED, IN_THE_BACKGROUND, SSHD], [0, 1]),
    "deepspeed on another node": ([ITS_PART, REMOTE, SSHD], [0, 1]),
    "a shell script with a wait": ([["bash", "start.sh"], SHELL, SSHD], []),
    "a wrapper under torchrun": ([WRAPPER, TORCHRUN, SHELL], [1]),
    "a launcher of one's own": ([OWN, SHELL, SSHD], [0]),
    "an elastic launcher as the first process": ([TORCHRUN], [0]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_who_is_watched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    above, expected = CHAINS[name]
    rank = os.getpid()
    pids = [rank, *range(100, 100 + len(above))]
    parents = dict(zip(pids, [*pids[1:], 1], strict=True))
    words = dict(zip(pids, [PROGRAM, *above], strict=True))
    monkeypatch.setattr(launcher, "_parent", parents.get)
    monkeypatch.setattr(launcher, "_command", lambda process: words.get(process, []))
    monkeypatch.setenv("RANK", "0")
    found = Launcher.of_this_process()
    assert [parent - 100 for _, parent in found.line] == expected
    assert not found.is_gone()
    for number in expected:  # whoever of them dies, its child gets another parent
        parents[pids[number]] = 1
        assert found.is_gone()
        parents[pids[number]] = pids[number + 1]


def test_without_a_launcher_nobody_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert Launcher.of_this_process() == Launcher(())


def test_torchrun_is_found_above_a_rank(tmp_path: Path) -> None:
    """Also with a shell between them, and not where another launcher has started the rank."""
    code = "from megatron_hyperrouter.guard.launcher import start_of_torchrun; print(start_of_torchrun())"
    rank = f"{sys.executable} -c '{code}'"
    below = rank.replace("'", '"')
    (tmp_path / "torchrun").write_text(f"#!/bin/sh\n{rank}; sh -c '{below}; true'; true\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = child_environment(OMP_NUM_THREADS="1")
    before = time.time()
    told = subprocess.run(
        [tmp_path / "torchrun"], env=environment, capture_output=True, text=True, check=True
    )
    first, second = (float(line) for line in told.stdout.split())
    assert first == second and before - 2 < first < time.time() + 1
    alone = subprocess.run(shlex.split(rank), env=environment, capture_output=True, text=True, check=True)
    assert float(alone.stdout) == 0.0 or os.environ.get("TORCHELASTIC_RUN_ID")
