"""One of two ranks with expert parallelism: an imported run's logits beside those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import serve_cases
from safetensors.torch import load_file

from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.sources import plain_run


def difference(home: str, engine: str, rows: int, topk: int) -> list[float]:
    """How far the logits of two ranks are from those of one process, and how widely the latter spread."""
    trained = TrainedRun.open(Path(home) / "run")
    run = plain_run(trained.settings)
    run = replace(
        run,
        engine=replace(run.engine, engine=engine),
        parallel=replace(run.parallel, expert_model_parallel_size=2),
    )
    tokens_BS = load_file(Path(home) / engine / "tokens.safetensors")["tokens_BS"]
    alone_BSV = load_file(Path(home) / engine / f"k-{topk}.safetensors")["logits_BSV"]
    host = open_engine(run, vocab_size=rows, for_training=False)
    try:
        host.load(trained.checkpoint, weights_only=True)
        found_BSV = host.logits(tokens_BS, topk=topk).float()
    finally:
        host.close()
    return [float((found_BSV - alone_BSV).abs().max()), float(alone_BSV.std())]


def answer(case: dict[str, Any]) -> list[float]:
    """See :func:`difference`."""
    return difference(**case)


if __name__ == "__main__":
    serve_cases(answer)
