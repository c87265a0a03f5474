"""One rank of the tests of logits and of texts that a run writes: ``flags`` of the program, and ``writes``:
whether texts are written after each step.
"""

from __future__ import annotations

from typing import Any

import torch
from engines import layout_worker
from engines.layout_worker import VOCABULARY, micro_batches, tiny_config

from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.train.written import SampleWriter

STEPS, LENGTH = 2, 16


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Losses of two steps, and what the model computes between and after them."""
    config = tiny_config(case["flags"], world_size)
    engine = open_engine(config, vocab_size=VOCABULARY)
    rows = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    told: dict[str, Any] = {"losses": [], "texts": [], "logits": [], "similarity": {}}
    prompts: list[list[int]] = [[1, 2, 3], [7], rows[0, : LENGTH - 1].tolist()]
    writer = SampleWriter(
        every=1,
        prompts=["a", "b", "c"],
        ids=prompts,
        decode=lambda ids: " ".join(map(str, ids)),
        vocab_size=VOCABULARY,
        length=LENGTH,
    )
    try:
        if case["writes"]:
            # Before the first step, for Adam makes much of gradients that are nearly 0.  With all experts
            # nearly equal router logits cannot decide otherwise.
            told["logits"] = engine.logits(rows, topk=4).tolist()
            told["similarity"] = engine.expert_similarity(rows[: config.train.micro_batch_size], topk=4)
        for step in range(STEPS):
            batches = micro_batches(config, engine.place, step)
            told["losses"].append(engine.train_step(batches, step=step, learning_rate=0.01).lm_loss)
            if case["writes"]:
                told["texts"].append(writer.texts(engine, topk=2))
    finally:
        engine.close()
    return told


if __name__ == "__main__":
    layout_worker.run_case = run_case
    layout_worker.main()
