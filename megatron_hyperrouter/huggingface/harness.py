"""lm-evaluation-harness on a Hugging Face folder, once for each k: ``python harness.py TASK.json
ANSWER.json``.

Needs lm-eval and transformers alone, so that any environment can run it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def main(arguments: list[str]) -> None:
    """Read the task, write the answer: the scores, or the names of tasks that the harness does not know."""
    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    manager = TaskManager(include_path=task["include_path"], include_defaults=task["include_defaults"])
    known = {*manager.all_tasks}
    if unknown := [name for name in task["tasks"] if name not in known and not Path(name).is_file()]:
        Path(arguments[1]).write_text(json.dumps({"unknown": unknown}), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    for k in task["topks"]:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": task["folder"],
                "tokenizer": task["tokenizer"],  # None: the folder's
                "dtype": task["dtype"],
                "num_experts_per_tok": k,
                "trust_remote_code": task["custom_code"],
            },
            tasks=task["tasks"],
            task_manager=manager,
            device=task["device"],
            batch_size=task["batch_size"],
            limit=task["limit"],
            log_samples=False,
        )
        rows += [row_of(k, name, metrics) for name, metrics in found["results"].items()]
    answer = {"versions": {"lm_eval": lm_eval.__version__}, "results": rows}
    Path(arguments[1]).write_text(json.dumps(answer), encoding="utf-8")


def row_of(k: int, task: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """``acc,none`` and ``acc_stderr,none`` as ``acc`` and ``acc_stderr``, which is None if there is none.  A
    metric that the task computes from several filters of the answers keeps the filter in its name.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}  # metric -> filter -> "" or "_stderr" -> value
    for name, value in metrics.items():
        metric, comma, filter_ = name.partition(",")
        end = "_stderr" if metric.endswith("_stderr") else ""
        number = value if isinstance(value, (int, float)) else None
        if comma and (number is not None or end):
            found.setdefault(metric.removesuffix(end), {}).setdefault(filter_, {})[end] = number
    row: dict[str, Any] = {"topk": k, "task": task}
    for metric, filters in found.items():
        for filter_, numbers in filters.items():
            name = metric if len(filters) == 1 else f"{metric},{filter_}"
            row |= {name + end: number for end, number in numbers.items()}
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
