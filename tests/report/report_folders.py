"""Folders of runs and studies as the commands leave them, with numbers that a test can look for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

EXPERTS, LAYERS = 4, 2


def write_run(folder: Path, *, steps: int = 30, name: str = "hyper") -> Path:
    """A finished run that was evaluated twice."""
    folder.mkdir(parents=True)
    settings = {
        "num_layers": LAYERS,
        "hidden_size": 8,
        "num_experts": EXPERTS,
        "moe_router_topk": 2,
        "lr": 0.01,
    }
    settings |= {"train_iters": steps, "router": {"name": name, "bias": False}, "data_path": ["a", "<b>"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "lm_loss": 5.0 / step,
            "grad_norm": 1.0,
            "learning_rate": 0.01,
            "topk": 1 + step // 16,
        }
        record |= {
            "consumed_tokens": 64 * step,
            "step_time": 0.1,
            "tokens_per_second": 640.0,
            "peak_memory": 2**30,
        }
        for layer in range(1, LAYERS + 1):
            record[f"router/entropy/{layer}"] = 1.0 + 0.1 * layer
            record[f"router/load_max_over_mean/{layer}"] = 1.5
            if step % 10 == 0:
                record |= {f"router/logit_std/{layer}": 0.9, f"router/dead_experts/{layer}": 0.0}
                record[f"router/mutual_information/{layer}"] = 0.2
        records.append(record)
        if step in (steps // 2, steps):
            score = {"step": step, "split": "valid", "topk": 2, "lm_loss": 4.0 / step, "perplexity": 2.0}
            records.append(score | {"bits_per_byte": 1.2345})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [{"event": "start", "time": 100.0, "step": 0, "attempt": 1}]
    events += [{"event": "alarm", "time": 160.0, "step": 7, "attempt": 1, "name": "collapse", "layer": 2}]
    events += [{"event": "end", "time": 220.0, "step": steps, "attempt": 1}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def layers(shift: float = 0.0) -> list[dict[str, Any]]:
    """What ``mhr analyze`` says of two layers."""
    part = {"share": 0.4, "rank": 1, "effective_rank": 2.5, "drift": 0.0123, "tokens": 64}
    part |= {"inputs_in_span": 0.3, "inputs_by_chance": 0.25}
    matrix = [[1.0 if i == j else 0.5 for j in range(EXPERTS)] for i in range(EXPERTS)]
    row = {"entropy": 1.2 + shift, "logit_std": 0.8, "mutual_information": 0.1, "load_max_over_mean": 1.7}
    row |= {"effective_experts": 0.8, "dead_experts": 0.0, "load": [1.7, 1.0, 0.8, 0.5], "similarity": matrix}
    row |= {"mean_similarity": 0.5, "largest_similarity": 0.5, "jacobian": part}
    return [{"layer": layer, **row} for layer in range(1, LAYERS + 1)]


def write_analysis(path: Path) -> Path:
    """A file of ``mhr analyze``."""
    over = [{"layer": n, "saturation": [0.8, 1.0], "fluctuation": [0.2]} for n in range(1, LAYERS + 1)]
    for row in over:
        row |= {"saturation_by_chance": 0.5, "fluctuation_by_chance": 0.7}
    content = {"step": 30, "results": [{"topk": 1, "layers": layers()}, {"topk": 2, "layers": layers()}]}
    content["checkpoints"] = {"topk": 2, "tokens": 64, "steps": [10, 30], "layers": over}
    path.write_text(json.dumps(content))
    return path


def write_comparison(folder: Path, *, seeds: int = 4) -> Path:
    """Three routers; ``hyper`` beats ``plain`` by 0.2 at k = 1, and is level with the control."""
    best = {"plain": 2.0, "hyper": 1.8, "control": 1.8}
    for label, level in best.items():
        for seed in range(seeds):
            wobble = 0.01 * math.sin(3 * seed + len(label))
            scores = [
                {"topk": k, "lm_loss": 1.0, "perplexity": 3.0, "bits_per_byte": level - 0.1 * k + wobble}
                for k in (1, 2)
            ]
            told = {"results": scores, "expert_similarity": 0.5, "entropy": 1.1, "load_max_over_mean": 1.5}
            told |= {"step_time": 0.1, "steps": 20, "train_curve": [[s, 5 / s] for s in range(1, 21)]}
            told |= {
                "valid_curve": [[10, 2.0], [20, 1.9]],
                "analysis": [{"topk": 2, "layers": layers(wobble)}],
            }
            told["flops"] = {"training": 1e9, "inference": {"1": 1e5, "2": 1.5e5}}
            target = folder / "runs" / f"{label}-seed{seed}"
            target.mkdir(parents=True)
            (target / "results.json").write_text(json.dumps(told))
            (target / "settings.yaml").write_text(yaml.safe_dump({"router": {"name": "topk", "bias": True}}))
    study = {"labels": list(best), "control": "control", "effect": 0.02, "jobs": 1}
    study["comparisons"] = ["hyper:plain@1", "hyper:control@1"]
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def write_finetuning(folder: Path) -> Path:
    """Two seeds, two k."""
    folder.mkdir(parents=True)
    rows = [
        {
            "topk": k,
            "seed": seed,
            "split": split,
            "accuracy": 0.7 + 0.01 * k,
            "macro_f1": 0.6,
            "loss": 0.5,
            "ece": 0.1,
        }
        for k in (1, 2)
        for seed in (1, 2)
        for split in ("dev", "test")
    ]
    (folder / "results.json").write_text(json.dumps({"results": rows}))
    return folder


def write_scaling(folder: Path) -> Path:
    """Three runs and a fit."""
    folder.mkdir(parents=True)
    lines = ["hidden_size,seed,parameters_total,parameters_active,tokens,flops,lm_loss,bits_per_byte,seconds"]
    lines += [f"{8 * n},1,{1000 * n},{500 * n},64,{3e6 * n},{4 / n},{3 / n},1.0" for n in (1, 2, 4)]
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")
    fit = {"runs": "", "k": None, "N": "active", "parameters": {"E": 1.5, "A": 9.0, "alpha": 0.31}}
    fit |= {"intervals": {"alpha": [0.2, 0.4]}, "at_bounds": []}
    (folder / "fit.json").write_text(json.dumps([fit, {"runs": "topk", "k": 2, "refused": "too few sizes"}]))
    return folder
