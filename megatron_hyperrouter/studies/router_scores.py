"""Scores one finished run of mhr compare, in a separate process that is started with a task (JSON).

The task: ``run_dir``, ``topk`` (a list), ``test_iters`` (global batches of the test split, or null for all
of it), ``settings`` (the digest that the results are filed under) and ``output``, a file that is complete
when this process ends with status 0.
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

LAST_SHARE = 0.1  # share of the steps over which a run's entropy and load are averaged
LOOKED_AT = 16  # global batches of the test split


def main(arguments: Sequence[str]) -> None:
    """Checkpoint -> losses at each k, measures of routers and experts; metrics -> entropy, load, times,
    FLOPs and curves.
    """
    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    run_dir = Path(task["run_dir"])
    run = TrainedRun.open(run_dir)
    results, looked = scores(run, task["topk"], task["test_iters"])
    records = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    content = {
        "settings": task["settings"],
        "results": results,
        **means_of(looked[-1]["layers"]),
        **told(records),
        "flops": work(run, task["topk"], records),
        "analysis": looked,
    }
    write_json(Path(task["output"]), content)


def scores(
    run: TrainedRun, topks: Sequence[int], test_iters: int | None
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Losses on the test split, and statistics of routers and experts there: first at the smallest k, then
    at the k with which training ended.
    """
    import torch

    from megatron_hyperrouter.evaluate.perplexity import loss_by_topk
    from megatron_hyperrouter.evaluate.selection import first_batches
    from megatron_hyperrouter.studies.analyzed import Analysis

    tokenizer = run.tokenizer()
    dataset, samples = first_batches(run, tokenizer, test_iters, flag="--test-iters")
    bytes_V = tokenizer.token_bytes_V()
    engine: Any = run.open_engine(tokenizer)
    try:
        run.load_into(engine)
        results = loss_by_topk(
            engine,
            dataset,
            topks,
            micro_batch_size=min(run.settings.train.micro_batch_size, len(dataset)),
            num_samples=samples,
            token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
        )
        looked_at = min(samples or len(dataset), len(dataset), LOOKED_AT * run.global_batch_size)
        analysis = Analysis(run, engine, dataset, looked_at, tokenizer.vocab_size)
        trained = run.settings.model.moe_router_topk
        ks = [*(k for k in (min(topks),) if k != trained), trained]
        looked = [{"topk": k, "layers": analysis.at(k)} for k in ks]
    finally:
        engine.close()
    return results, looked


def means_of(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The table's columns of :func:`scores`, means over layers."""
    columns = (
        ("expert_similarity", "mean_similarity"),
        ("logit_std", "logit_std"),
        ("mutual_information", "mutual_information"),
    )
    return {name: statistics.fmean(row[key] or 0.0 for row in layers) for name, key in columns}


def work(run: TrainedRun, topks: Sequence[int], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """FLOPs of the whole training, and of a token's forward pass at each k."""
    from megatron_hyperrouter.analysis.size import size_of
    from megatron_hyperrouter.checkpoint.weights import weight_shapes

    size = size_of(run.settings, weight_shapes(run.checkpoint))
    return {
        "training": size.training_flops([record for record in records if "split" not in record]),
        "inference": {str(k): size.flops(k) / 3 for k in topks},
    }


def told(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers from the metrics of a run: means of its last steps, the median step time (seconds), and
    curves as [step, value].  They leave out skipped steps, which may have no loss.
    """
    steps = [record for record in records if "split" not in record and "skipped" not in record]
    last = steps[-max(round(LAST_SHARE * len(steps)), 1) :]

    def mean(name: str) -> float:
        values = [
            value for record in last for key, value in record.items() if key.startswith(f"router/{name}/")
        ]
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
