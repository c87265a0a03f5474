"""The program, where each batch of rank 1 takes a while to read; a worker of test_program_status.py."""

from __future__ import annotations

import os
import runpy
import sys
import time

from distributed import REPOSITORY

from megatron_hyperrouter.data.stream.loader import Batches

DELAY = 0.2  # seconds
quick = Batches._read


def slowly(batches: Batches, start: int) -> object:
    """As ``Batches._read``."""
    if os.environ["RANK"] == "1":
        time.sleep(DELAY)
    return quick(batches, start)


if __name__ == "__main__":
    Batches._read = slowly
    sys.argv[0] = str(REPOSITORY / "pretrain_gpt_hyperrouter.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
