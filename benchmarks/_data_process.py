"""One dataset in a separate process, which reports its times and its memory: ``_data_process.py KIND
PREFIX EPOCHS STARTED``.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _token_files import SEQ_LENGTH, megatron_dataset, our_dataset


def in_a_process(kind: str, prefix: Path, *, epochs: int) -> dict[str, float]:
    """``wall`` and ``cpu`` seconds and ``peak_mb`` after the imports; ``all_wall``, ``all_cpu`` and
    ``all_mb`` from the start of the process on.

    ``kind``: megatron, ours or cold, which imports no more than it needs.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        kind,
        str(prefix),
        str(epochs),
        str(time.monotonic()),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(told.stderr)
    result: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return result


def main() -> None:
    """The process."""
    kind, prefix, epochs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    modules = {
        "megatron": ["megatron.core.datasets.gpt_dataset"],
        "ours": ["megatron_hyperrouter.data.stream.dataset", "torch"],
        "cold": [],
    }
    for name in modules[kind]:  # imports are not what is measured
        importlib.import_module(name)
    documents = int(np.fromfile(f"{prefix}.idx", "<u8", 1, offset=18)[0])
    # a little less than the epochs hold: no separate last epoch
    samples = max(epochs * documents * 990 // SEQ_LENGTH, 16)
    with tempfile.TemporaryDirectory() as cache:
        before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
        if kind == "megatron":
            dataset = megatron_dataset(prefix, samples, cache=cache)
        else:
            dataset = our_dataset(
                prefix,
                samples,
                data_cache_path=cache,
                data_index="on-demand" if kind == "cold" else "materialised",
            )
        for i in range(10):
            dataset[i]
        told = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "peak_mb": peak_mb() - before,
        }
        told |= {"all_wall": time.monotonic() - float(sys.argv[4]), "all_mb": peak_mb()}
        told["all_cpu"] = time.process_time()
    print(json.dumps(told))


def peak_mb() -> float:
    """The most memory that this process has had, mapped files included."""
    with open(f"/proc/{os.getpid()}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
