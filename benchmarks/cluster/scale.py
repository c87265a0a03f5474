"""Measure on one machine what matters in a large job: the start of many ranks, long runs, and large data.

    python benchmarks/cluster/scale.py ranks --ranks 64      rendezvous, comparison of settings, all-reduce
    python benchmarks/cluster/scale.py steps --steps 100000  writing and reading metrics.jsonl
    python benchmarks/cluster/scale.py documents             reading the first samples of 10**8 documents

The ranks are forks of a process that has imported torch already, so their times do not include imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist

from megatron_hyperrouter.guard.heartbeat import Progress, beat_of, read_beats, write_beat
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.train.metrics import MetricsFile
from megatron_hyperrouter.watch.trace import read_steps

SETTINGS = {f"--setting-{number}": "x" * 12 for number in range(250)}
STATISTICS = 32 * (128 + 5)  # numbers that all ranks add up in a step: 32 layers of 128 experts
LAYERS = 32


def main() -> None:
    """Measure one thing."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("what", choices=("ranks", "steps", "documents"))
    flags.add_argument("--ranks", type=int, default=64, metavar="N")
    flags.add_argument("--steps", type=int, default=100_000, metavar="N")
    flags.add_argument("--documents", type=int, default=10**8, metavar="N")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "ranks":
            start_ranks(args.ranks, Path(folder))
        elif args.what == "steps":
            write_steps(args.steps, Path(folder))
        else:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from data import cold_start  # type: ignore[import-not-found]

            cold_start(Path(folder), args.documents)


def start_ranks(ranks: int, folder: Path) -> None:
    """Fork the ranks, let them start as a run does, and print the slowest time of each part."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    begun = time.monotonic()
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.environ["RANK"] = str(rank)
                told = start_as(rank, ranks, folder / "heartbeat", begun)
                (folder / f"told-{rank}.json").write_text(json.dumps(told))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"{len(failed)} of {ranks} ranks failed")
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(ranks)]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    now = time.perf_counter()
    found = len(read_beats(folder / "heartbeat"))
    read = time.perf_counter() - now
    print(
        f"{ranks} ranks on {os.cpu_count()} cores; seconds from the start until the slowest rank had done "
        "each part:"
    )
    for name in told[0]["seconds"]:
        print(f"  {name:<32} {max(each['seconds'][name] for each in told):8.2f}")
    print(f"mean CPU seconds of a rank: {(used.ru_utime + used.ru_stime) / ranks:.3f}")
    print(f"largest private memory of a rank, in MB: {max(each['memory'] for each in told) / 1e6:.0f}")
    print(f"time to read {found} heartbeats: {1000 * read:.1f} ms")


def start_as(rank: int, ranks: int, beats: Path, begun: float) -> dict[str, object]:
    """What a rank does before its first step, but for building the engine."""
    seconds = {}
    meeting = Meeting.of_this_process()
    seconds["rendezvous"] = time.monotonic() - begun
    if difference := meeting.difference("settings", SETTINGS):
        raise SystemExit(difference)
    seconds["settings compared"] = time.monotonic() - begun
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method="env://")
    seconds["process group"] = time.monotonic() - begun
    beats.mkdir(exist_ok=True)
    write_beat(beats, beat_of(Progress(), rank, "benchmark", waits=False))
    seconds["heartbeat written"] = time.monotonic() - begun
    total = torch.ones(STATISTICS, dtype=torch.float64)
    dist.all_reduce(total)
    if not (total == ranks).all():
        raise SystemExit("the sum is wrong")
    seconds["first all-reduce"] = time.monotonic() - begun
    memory = sum(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith(("Private_Dirty:", "Private_Clean:"))
    )
    dist.barrier()
    return {"seconds": seconds, "memory": memory}


def write_steps(steps: int, folder: Path) -> None:
    """Print what writing and reading back the metrics of so many steps takes."""
    names = [
        f"{name}/{layer}" for layer in range(1, LAYERS + 1) for name in ("entropy", "load_max_over_mean")
    ]
    per_layer = {f"router/{name}": 1.2345678901234567 for name in names}
    file = MetricsFile(folder / "metrics.jsonl")
    begun = time.process_time()
    for step in range(1, steps + 1):
        own = {"step": step, "lm_loss": 3.0 + 1 / step, "aux_loss": 0.01, "grad_norm": 0.5}
        own |= {"learning_rate": 3e-4, "topk": 8, "consumed_samples": 512 * step}
        own |= {"consumed_tokens": 2048 * 512 * step, "step_time": 1.0 + 1 / step, "tokens_per_second": 1e6}
        file.append(own | per_layer)
    file.close()
    written = time.process_time() - begun
    begun = time.process_time()
    found = read_steps(folder / "metrics.jsonl", after=0)
    read = time.process_time() - begun
    if found.last != steps:
        raise SystemExit(f"{found.last} steps were read of {steps}")
    size = (folder / "metrics.jsonl").stat().st_size
    print(
        f"{steps:,} steps of {2 * LAYERS} layer numbers: {size / 1e6:.0f} MB, written in "
        f"{1000 * written / steps:.3f} ms of CPU time a step, read by mhr status in {read:.1f} s of CPU time"
    )


if __name__ == "__main__":
    main()
