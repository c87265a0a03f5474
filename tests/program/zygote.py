"""Imports the hosts once, then forks ranks of a program on request: a start takes a fraction of a second
instead of many.

One JSON object a line on stdin, one answer a line on stdout: ``{"start": {...}}`` gives ``{"pid": N}``,
``{"poll": [N, ...]}`` gives ``{"N": exit status, or null while it runs}`` (negative: the signal that ended
it).  With ``"launcher": true`` a process of its own stands above the rank, and the answer names it as well.
The end of stdin ends every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

HOSTS = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_count",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ctypeslib",
    "rich.progress",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "megatron_hyperrouter.evaluate.ngram",
    "megatron_hyperrouter.data.tokenize.tokenizer",
    "megatron_hyperrouter.engines.deepspeed.engine",
    "megatron_hyperrouter.evaluate.perplexity",
    "megatron_hyperrouter.train.reporters",
    "megatron_hyperrouter.train.loop",
)


def import_hosts() -> None:
    """All that a run imports; nothing here may start a thread, which a fork would lose."""
    from megatron_hyperrouter.compat.host_logs import silence_hosts

    silence_hosts()
    for name in HOSTS:
        importlib.import_module(name)

    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads after the imports: a fork would lose all but one")
    gc.freeze()  # otherwise each fork copies all of it, only to find at its end that none of it is garbage


def become(request: dict[str, Any]) -> None:
    """Turn this fresh fork into the rank that was asked for."""
    os.setsid()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    if limit := request.get("largest_file"):  # bytes; writing more fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # seconds that each optimizer step takes longer, so that a signal comes in time
    if pace := request.get("pace"):
        from megatron_hyperrouter.train.run import Run

        step = Run.step
        Run.step = lambda *args, **kwargs: (time.sleep(pace), step(*args, **kwargs))[1]
    # where each rank writes its samples as it reads them: the first one's number, and their inputs
    if fault := request.get("fault"):
        make_faulty(fault)
    if folder := request.get("noted"):
        from megatron_hyperrouter.data.stream.loader import Batches

        read, path = Batches._read, Path(folder, os.environ.get("RANK", "0"))
        path.parent.mkdir(exist_ok=True)

        def noting(batches: Batches, start: int) -> Any:
            batch = read(batches, start)
            with path.open("a") as file:
                file.write(json.dumps([start, batch[0].tolist()]) + "\n")
            return batch

        Batches._read = noting
    # the first fsync of a file while such a path is there does not come back
    if pattern := request.get("stall_at"):
        quick = os.fsync
        os.fsync = lambda file: stall() if glob.glob(pattern) else quick(file)
    sys.argv = [request["program"], *request["arguments"]]
    sys.path[0] = str(Path(request["program"]).parent)


def make_faulty(fault: dict[str, Any]) -> None:
    """``{"step": 5, "rank": 1, "times": 1}``: so often, this rank's gradients of a step are not finite."""
    from megatron_hyperrouter.engines.shared import SharedEngine

    run_step, left, now_at, hooked = SharedEngine._run, [fault["times"]], [0], []

    def spoilt(gradient: Any) -> Any:
        return gradient * float("nan") if now_at[0] == fault["step"] and left[0] >= 0 else gradient

    def faulty(engine: Any, now: Any, *more: Any) -> Any:
        if engine.place.rank == fault["rank"]:
            if not hooked:
                weight = next(weight for name, weight in engine.named_parameters() if "qkv" in name)
                hooked.append(weight.register_hook(spoilt))
            now_at[0] = now.step + 1
            left[0] -= now_at[0] == fault["step"]
        return run_step(engine, now, *more)

    SharedEngine._run = faulty


def stall() -> None:
    """Tell that this rank has come to the place, and stay there."""
    Path("stalled").touch()
    time.sleep(600)


def fork_below() -> tuple[int, int]:
    """Fork a launcher that does nothing, and below it a rank: their ids; (0, 0) in the rank."""
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        pid = os.fork()
        if pid == 0:
            return 0, 0
        os.write(writing, str(pid).encode())
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
    told = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    return launcher, told


def adopt_orphans() -> None:
    """Be the next parent of ranks whose launcher has died."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def main() -> None:
    """Serve until stdin ends."""
    import_hosts()
    adopt_orphans()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    alive: set[int] = set()
    launchers: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            launcher, pid = fork_below() if request["start"].get("launcher") else (0, os.fork())
            if pid == 0:
                become(request["start"])
                runpy.run_path(request["start"]["program"], run_name="__main__")
                return
            alive.add(pid)
            launchers[pid] = launcher
            answer: dict[str, Any] = {"pid": pid, "launcher": launcher}
        else:
            answer = {}
            for pid in request["poll"]:
                try:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:  # of its launcher, which ends as the rank does, unless it is killed
                    ended, status = os.waitpid(launchers[pid], os.WNOHANG)
                    ended = 0 if os.WIFSIGNALED(status) else ended
                answer[str(pid)] = os.waitstatus_to_exitcode(status) if ended else None
                alive.discard(ended)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
