"""The program, where the data of rank 1 take longer to build than any collective may; a worker of
test_program_late.py.
"""

from __future__ import annotations

import os
import runpy
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed.constants
import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

from megatron_hyperrouter import console
from megatron_hyperrouter.data.stream import segments as course

COLLECTIVES, BUILDING, SILENCE = 10.0, 14.0, 4.0  # seconds

for module in (constants, distributed_c10d, deepspeed.constants):
    vars(module)["default_pg_timeout"] = timedelta(seconds=COLLECTIVES)
console.SILENCE = SILENCE
splits_of_run = course.splits_of_run


def slowly(*arguments: Any, **how: Any) -> Any:
    """As ``splits_of_run``."""
    if os.environ["RANK"] == "1":
        time.sleep(BUILDING)
    built = splits_of_run(*arguments, **how)
    assert not dist.is_initialized(), "while data are built there is nothing that a rank could wait in"
    Path(f"built-{os.environ['RANK']}").write_text(str(time.monotonic()))
    return built


course.splits_of_run = slowly
runpy.run_path(str(Path(__file__).resolve().parents[2] / "pretrain_gpt_hyperrouter.py"), run_name="__main__")
