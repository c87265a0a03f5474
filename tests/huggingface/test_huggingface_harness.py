"""lm-evaluation-harness itself, on a run and on an export of it, beside sums over logits in plain loops."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from export.made_up import TINY, make_up

from megatron_hyperrouter.commands.models import export_hf
from megatron_hyperrouter.commands.models.lm_eval import main
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.decoder import Loaded
from megatron_hyperrouter.generation.load import load
from megatron_hyperrouter.huggingface.harness import row_of
from megatron_hyperrouter.huggingface.local_tasks import questions

pytestmark = pytest.mark.processes
SETTINGS = {**TINY, "seq_length": 64}
END = 256  # of a text of bytes; the harness begins with it


def texts() -> list[str]:
    """Texts that fit into one window, in lines of one length."""
    draw = random.Random(1)
    return ["\n".join("".join(draw.choices("abcdef", k=5)) for _ in range(8)) for _ in range(9)]


@torch.no_grad()
def log_probability(loaded: Loaded, k: int, before: list[int], text: str) -> float:
    """Of the bytes of ``text`` behind ``before``."""
    ids = list(text.encode())
    logits_1SV = loaded.decoder.logits(
        torch.tensor([before + ids[:-1]]), KeyValueCache(torch.zeros(1, 0, dtype=torch.bool)), topk=k
    )
    log_SV = logits_1SV[0].double().log_softmax(-1)[len(before) - 1 :]
    return float(sum(log_SV[at, byte] for at, byte in enumerate(ids)))


def expected(loaded: Loaded, k: int) -> dict[tuple[str, str], float]:
    """The metrics of both tasks."""
    nats = -sum(log_probability(loaded, k, [END], text) for text in texts())
    per_byte = nats / sum(len(text.encode()) for text in texts())
    right = []
    for row in questions(texts()):
        prompt, choices = str(row["prompt"]), row["choices"]
        assert isinstance(choices, list)
        scores = [log_probability(loaded, k, list(prompt.encode()), choice) for choice in choices]
        right.append(scores.index(max(scores)) == row["label"])
    accuracy = sum(right) / len(right)
    return {
        ("held_out", "bits_per_byte"): per_byte / math.log(2),
        ("held_out", "byte_perplexity"): math.exp(per_byte),
        ("next_line", "acc"): accuracy,
        ("next_line", "acc_norm"): accuracy,  # all lines have five bytes
    }


def scored(home: Path, *flags: str) -> dict[str, Any]:
    file = home / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    words = ["--tasks", "held_out", "next_line", "--text", str(file), "--output", str(home / "scores.json")]
    main([*words, *flags])
    scores: dict[str, Any] = json.loads((home / "scores.json").read_text())
    return scores


def test_a_metric_of_two_filters_has_both_values() -> None:
    metrics = {"alias": "gsm8k", "acc,none": 1, "acc_stderr,none": "N/A", "acc_name,none": "x"}
    for filter_, value in (("strict", 0.25), ("flexible", 0.5)):
        metrics |= {f"exact_match,{filter_}": value, f"exact_match_stderr,{filter_}": value / 10}
    assert row_of(2, "gsm8k", metrics) == {
        "topk": 2,
        "task": "gsm8k",
        "acc": 1,
        "acc_stderr": None,
        "exact_match,strict": 0.25,
        "exact_match,strict_stderr": 0.025,
        "exact_match,flexible": 0.5,
        "exact_match,flexible_stderr": 0.05,
    }


def test_the_harness_scores_each_k(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    generator = torch.Generator().manual_seed(1)
    make_up(run, SETTINGS, lambda shape: 0.3 * torch.randn(shape, generator=generator))
    export_hf.main(["--load", str(run), "--output", str(folder), "--no-proof"])
    tokenizer = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    loaded = load(run)
    results = scored(tmp_path, "--load", str(run), "--topk", "1", "4")["results"]
    assert [(row["topk"], row["task"]) for row in results] == [
        (k, task) for k in (1, 4) for task in ("held_out", "next_line")
    ]
    scores = scored(tmp_path, "--load", str(folder), "--topk", "2", "--tokenizer-model", str(tokenizer))
    results += scores["results"]
    assert scores["versions"]["lm_eval"]
    (tmp_path / "scores.json").unlink()
    with pytest.raises(ConfigError, match="--tasks = held_in: is not a task of the harness"):
        scored(tmp_path, "--load", str(folder), "--tokenizer-model", str(tokenizer), "--tasks", "held_in")
    assert not (tmp_path / "scores.json").exists()
    for row in results:  # each metric has its standard error, or null
        for name in {*row} - {"topk", "task"}:
            assert f"{name}_stderr" in row or name.endswith("_stderr"), row
    seen = {
        (row["topk"], row["task"], name): row[name]
        for row in results
        for name in row
        if name not in ("topk", "task") and "_stderr" not in name
    }
    wanted = {(k, *name): value for k in (1, 2, 4) for name, value in expected(loaded, k).items()}
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert len({wanted[k, "held_out", "bits_per_byte"] for k in (1, 2, 4)}) == 3
