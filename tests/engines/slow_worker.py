"""One rank of test_slow_ranks.py: a few steps and an evaluation between them, in which the attention of one
rank takes longer; tells the compute times of all ranks in each step.
"""

from __future__ import annotations

import os
import time
from typing import Any

from distributed import serve_cases
from engines.layout_worker import EOD, VOCABULARY, micro_batches, tiny_config
from torch.nn import functional

from megatron_hyperrouter.engines import open_engine

STEPS = 2  # before the evaluation, and after it


def run_case(case: dict[str, Any]) -> list[tuple[float, ...]]:
    """``flags`` of the program, the ``slow`` rank, and ``delay``: seconds by which each of its layers takes
    longer, in a step and in an evaluation.
    """
    config = tiny_config(case["flags"], int(os.environ["WORLD_SIZE"]))
    engine = open_engine(config, vocab_size=VOCABULARY, eod=EOD)
    in_step, in_evaluation = case["delay"]
    quick, delay, told = functional.scaled_dot_product_attention, in_step, []

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(delay)
        return quick(*given, **named)

    if engine.place.rank == case["slow"]:
        functional.scaled_dot_product_attention = slowly
    for step in range(2 * STEPS):
        if step == STEPS:
            delay = in_evaluation
            engine.evaluate(micro_batches(config, engine.place, 99), topk=2)
            delay = in_step
        batches = micro_batches(config, engine.place, step)
        told.append(engine.train_step(batches, step=step, learning_rate=1e-3).compute_times)
    engine.close()
    return told


if __name__ == "__main__":
    serve_cases(run_case)
