"""Two nodes under torchrun, which restarts the ranks of both when one is killed: metrics.jsonl has every step
once.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import environment, free_port
from program.launched import PROGRAM, metrics
from program.settings import flags_of, write_text

from megatron_hyperrouter.guard.heartbeat import read_beats
from megatron_hyperrouter.guard.launcher import _parent
from megatron_hyperrouter.watch.status import status_of
from megatron_hyperrouter.watch.trace import read_trace

STEPS = 120


@pytest.mark.processes
@pytest.mark.by_hand
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_a_killed_rank(tmp_path: Path, rendezvous: str) -> None:
    run_dir, port = tmp_path / "run", free_port()
    more = ["--train-iters", STEPS, "--save-interval", 20, "--eval-interval", 0, "--keep-checkpoints", 2]
    program = [str(PROGRAM), *flags_of(write_text(tmp_path / "text"), run_dir, *more, "--load", run_dir)]
    meeting = {
        "c10d": f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-id once "
        "--rdzv-conf read_timeout=300",  # a busy machine starts the other node late
        "static": f"--master-addr 127.0.0.1 --master-port {port}",
    }[rendezvous].split()
    nodes = []
    with (tmp_path / "said.txt").open("w") as said:
        for node in range(2):
            own = ["--node-rank", str(node), "--local-addr", "127.0.0.1"]
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
            ]
            command = [*torchrun, "--max-restarts", "2", *own, *meeting, *program]
            nodes.append(
                subprocess.Popen(command, env=environment(), stdout=said, stderr=said, start_new_session=True)
            )
    try:
        aim = random.Random(rendezvous).randint(30, 90)
        wait(lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= aim, nodes)
        victim = read_beats(run_dir / "heartbeat")[1].pid
        assert _parent(victim) in {each.pid for each in nodes}
        os.kill(victim, signal.SIGKILL)
        assert [each.wait(480) for each in nodes] == [0, 0], (tmp_path / "said.txt").read_text()[-4000:]
    finally:
        for each in nodes:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
    status = status_of(read_trace(run_dir))
    assert (status.state, status.restarts) == ("finished", 1)


def wait(happened: Callable[[], bool], nodes: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < end and all(each.poll() is None for each in nodes)
        time.sleep(0.1)
