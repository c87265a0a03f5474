"""Starts the program and the tools as a user does, on one or two ranks, and reads what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import REPOSITORY, environment, meeting_store

from megatron_hyperrouter.train.metrics import METRICS

PROGRAM = REPOSITORY / "pretrain_gpt_hyperrouter.py"
TIMES = {metric.name for metric in METRICS if metric.group == "speed"}
Record = dict[str, Any]
_PATIENCE = 3.0  # seconds from SIGTERM to SIGKILL; real launchers give 30


@dataclass
class Job:
    """Ranks of one start; ``statuses`` holds None for those that still run."""

    zygote: Zygote
    pids: list[int]
    folder: Path
    statuses: list[int | None] = field(default_factory=list)
    store: object = None  # at which its ranks meet
    launchers: list[int] = field(default_factory=list)  # of each rank, where it was asked for

    def poll(self) -> list[int | None]:
        """Exit status of each rank; negative: the signal that ended it."""
        running = [pid for pid, status in zip(self.pids, self.statuses, strict=True) if status is None]
        if running:
            found = self.zygote.ask({"poll": running})
            self.statuses = [
                found.get(str(pid), status) for pid, status in zip(self.pids, self.statuses, strict=True)
            ]
        return self.statuses

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank that runs, as a scheduler does, and to the processes that read its
        data.
        """
        for pid, status in zip(self.pids, self.statuses, strict=True):
            if status is None:
                try:
                    os.killpg(pid, number)
                except ProcessLookupError:  # a fresh fork leads no group yet
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)

    def wait(self, timeout: float = 240) -> Job:
        """Until every rank has ended; as a launcher does, the first failure ends the others."""
        self.wait_for(lambda: False, timeout)
        return self

    def wait_for(self, happened: Callable[[], object], timeout: float = 240) -> bool:
        """Until something has happened, or the ranks have ended (False)."""
        end = time.monotonic() + timeout
        while True:
            if happened():
                return True
            statuses = self.poll()
            if all(status is not None for status in statuses):
                return False
            if any(statuses):
                self.kill(signal.SIGTERM)
                patient = time.monotonic() + _PATIENCE
                while None in self.poll() and time.monotonic() < patient:
                    time.sleep(0.01)
                self.kill()
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"ranks still run after {timeout} s:\n{self.stderr[-3000:]}")
            time.sleep(0.01)

    @property
    def status(self) -> int:
        """The first exit status that is not 0; signals come from the launcher's part that this class
        plays.
        """
        own = [status for status in self.statuses if status is not None and status > 0]
        return own[0] if own else 0 if not any(self.statuses) else -1

    @property
    def stdout(self) -> str:
        """What all ranks wrote to stdout."""
        return (self.folder / "stdout.txt").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What all ranks wrote to stderr."""
        return (self.folder / "stderr.txt").read_text(encoding="utf-8")


class Zygote:
    """The process of ``zygote.py``; jobs are forks of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        worker = Path(__file__).with_name("zygote.py")
        with (folder / "zygote.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )
        while (line := self._read()) != "ready\n":  # hosts print at import
            assert line, (folder / "zygote.log").read_text()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def start(
        self,
        arguments: Sequence[object],
        *,
        ranks: int = 1,
        program: Path = PROGRAM,
        launched: bool = False,
        **more: Any,
    ) -> Job:
        """Start ``program`` as a launcher would; plain ``python program`` when ``ranks`` is 1, unless
        ``launched``.

        ``more``: see ``zygote.become``.
        """
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        folder.mkdir()
        store: Any = meeting_store() if ranks > 1 or launched else None
        job = Job(self, [], folder, [None] * ranks, store)
        for rank in range(ranks):
            place: dict[str, object] = {}
            if store:  # of this process, as under torchrun
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": store.port,
                }
                place["TORCHELASTIC_USE_AGENT_STORE"] = True
            request = {
                "program": str(program),
                "arguments": [str(argument) for argument in arguments],
                "env": {name: str(value) for name, value in place.items()},
                "cwd": str(folder),
                "stdout": str(folder / "stdout.txt"),
                "stderr": str(folder / "stderr.txt"),
                **more,
            }
            answer = self.ask({"start": request})
            job.pids.append(answer["pid"])
            job.launchers.append(answer["launcher"])
        return job

    def run(self, arguments: Sequence[object], *, expect: int = 0, timeout: float = 240, **more: Any) -> Job:
        """Start and wait; the exit status has to be ``expect``."""
        job = self.start(arguments, **more).wait(timeout)
        assert job.status == expect, f"exit status {job.statuses}, not {expect}:\n{job.stderr[-4000:]}"
        return job

    def close(self) -> None:
        """End the zygote and all that runs under it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def metrics(run_dir: Path, *, times: bool = False) -> list[Record]:
    """The lines of ``metrics.jsonl``; without times they have to be equal in every bit in two runs that
    are the same.
    """
    records = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        {name: value for name, value in record.items() if times or name not in TIMES} for record in records
    ]


def one_message(stderr: str) -> str:
    """The single error that a user sees: no second one, no traceback, no line of a host."""
    lines = stderr.splitlines()
    heads = [line for line in lines if line.startswith("error")]
    assert len(heads) == 1 and "Traceback" not in stderr, stderr
    first = lines.index(heads[0])
    assert all(line.startswith("warning: ") for line in lines[:first]), stderr
    assert all(line.startswith("  ") for line in lines[first + 1 :]), stderr
    return "\n".join(lines[first:])
