"""The program, where rank 1 computes slowly from a step on; a worker of test_program_status.py."""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

from distributed import REPOSITORY
from torch.nn import functional

from megatron_hyperrouter.engines.shared import SharedEngine

HEALTHY = 30  # steps
DELAY = 0.03  # seconds for each layer and micro-batch
quick, train_step = functional.scaled_dot_product_attention, SharedEngine.train_step


def slowly(*given: Any, **named: Any) -> Any:
    """As torch's."""
    time.sleep(DELAY)
    return quick(*given, **named)


def hot_after_a_while(engine: Any, batches: Any, *, step: int, **named: Any) -> Any:
    """As the engine's; ``step`` counts from 0."""
    if os.environ["RANK"] == "1" and step >= HEALTHY:
        functional.scaled_dot_product_attention = slowly
    return train_step(engine, batches, step=step, **named)


if __name__ == "__main__":
    SharedEngine.train_step = hot_after_a_while  # type: ignore[method-assign]
    sys.argv[0] = str(REPOSITORY / "pretrain_gpt_hyperrouter.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
