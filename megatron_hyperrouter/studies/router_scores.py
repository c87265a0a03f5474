"""What one finished run of mhr compare has to tell: a process of its own, started with a
task (JSON).

The task: ``run_dir``, ``topk`` (a list), ``test_iters`` (global batches of the test split, or null for
all of it), ``settings`` (the digest that the results are filed under) and ``output``, which is there,
whole, when this process ends with status 0.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.files import write_json
from megatron_hyperrouter.terminal import run_tool

if TYPE_CHECKING:
    from megatron_hyperrouter.train.metrics import Record

LAST_SHARE = 0.1  # of the steps, whose mean is a run's entropy and load


def main(arguments: Sequence[str]) -> None:
    """Checkpoint -> losses at each k and similarity of experts; metrics -> entropy, load, times and
    curves.
    """
    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    run_dir = Path(task["run_dir"])
    run = TrainedRun.open(run_dir)
    results, similarity = scores(run, task["topk"], task["test_iters"])
    records = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    content = {
        "settings": task["settings"],
        "results": results,
        "expert_similarity": similarity,
        **told(records, run.settings.model.num_layers),
    }
    write_json(Path(task["output"]), content)


def scores(run: TrainedRun, topks: Sequence[int], test_iters: int | None) -> tuple[list[Record], float]:
    """Losses of the test split, and the mean over layers of the experts' similarity on its first
    micro-batch.
    """
    import torch

    from megatron_hyperrouter.analysis.experts import expert_similarity, open_to_routers
    from megatron_hyperrouter.evaluate.perplexity import loss_by_topk
    from megatron_hyperrouter.routers import ROUTERS
    from megatron_hyperrouter.train.metrics import score

    tokenizer = run.tokenizer()
    samples = test_iters and test_iters * run.global_batch_size
    dataset = run.dataset(tokenizer, samples=samples)
    bytes_V = tokenizer.token_bytes_V()
    size = min(run.settings.train.micro_batch_size, len(dataset))
    with open_to_routers(ROUTERS[run.settings.router.name]):
        engine: Any = run.open_engine(tokenizer)
    try:
        run.load_into(engine)
        results = loss_by_topk(
            engine,
            dataset,
            topks,
            micro_batch_size=size,
            num_samples=samples,
            token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
        )
        layers = expert_similarity(
            engine.routers.values(),
            lambda: score(engine, dataset, topk=topks[0], micro_batch_size=size, num_samples=size),
        )
    finally:
        engine.close()
    return results, statistics.fmean(layers.values())


def told(records: Sequence[dict[str, Any]], num_layers: int) -> dict[str, Any]:
    """What the metrics of a run say: means of its last steps, the median step time (seconds), and curves
    as [step, value].
    """
    steps = [record for record in records if "split" not in record]
    last = steps[-max(round(LAST_SHARE * len(steps)), 1) :]

    def mean(name: str) -> float:
        values = [record[f"router/{name}/{layer}"] for record in last for layer in range(1, num_layers + 1)]
        return statistics.fmean(values)

    valid = [record for record in records if record.get("split") == "valid"]
    unit = "bits_per_byte" if all(record["bits_per_byte"] is not None for record in valid) else "lm_loss"
    return {
        "entropy": mean("entropy"),
        "load_max_over_mean": mean("load_max_over_mean"),
        "step_time": statistics.median(record["step_time"] for record in steps),
        "steps": len(steps),
        "train_curve": [[record["step"], record["lm_loss"]] for record in steps],
        "valid_curve": [[record["step"], record[unit]] for record in valid],
    }


if __name__ == "__main__":
    run_tool(main)
