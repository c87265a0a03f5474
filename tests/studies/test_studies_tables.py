"""The tables of mhr compare, where a router does not have every measure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from megatron_hyperrouter.studies.router_scores import told
from megatron_hyperrouter.studies.router_tables import curves, write_tables


def results(score: float, drift: list[float | None]) -> dict[str, Any]:
    """What one run of two layers left; its Jacobian has an effective rank of 3 and 5."""
    layers = [{"jacobian": {"effective_rank": 3.0 + 2 * at, "drift": own}} for at, own in enumerate(drift)]
    return {
        "results": [{"topk": 2, "bits_per_byte": score, "lm_loss": 1.0}],
        "entropy": 1.5,
        "steps": 10,
        "train_curve": [],
        "valid_curve": [],
        "analysis": [{"topk": 2, "layers": layers}],
    }


def test_a_router_that_is_not_linear_has_no_drift(tmp_path: Path) -> None:
    finished = [
        ("xmoe", 1, results(3.0, [None, None])),
        ("xmoe", 2, results(3.5, [None, None])),
        ("topk", 1, results(2.0, [0.1, 0.2])),
        ("topk", 2, results(2.25, [0.3, 0.4])),
    ]
    write_tables(finished, tmp_path, {"comparisons": [], "effect": 0.02})
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["router", "seed", "bits_per_byte_k2", "entropy", "effective_rank", "drift"]
    assert [row["drift"] for row in rows[:2]] == ["", ""]
    assert [float(row["drift"]) for row in rows[2:]] == [(0.1 + 0.2) / 2, (0.3 + 0.4) / 2]
    assert {row["effective_rank"] for row in rows} == {"4.0"}
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| xmoe | 3.2500 ± 3.1766 | 1.500 ± 0.000 | 4.00 ± 0.00 | - |" in text
    assert "| topk | 2.1250 ± 1.5883 | 1.500 ± 0.000 | 4.00 ± 0.00 | 0.250 ± 1.271 |" in text
    # A difference needs the measure of both.
    assert "| topk | -1.1250 ± 1.5883 | +0.000 ± 0.000 | +0.00 ± 0.00 | - |" in text


def test_skipped_steps_are_left_out_and_curves_have_the_steps_of_all_seeds() -> None:
    def records(*skipped: int) -> list[dict[str, Any]]:
        """Steps 1 to 4; --skip-steps leaves step 2 without numbers, a bad step lacks some."""
        made = [
            {"step": step, "lm_loss": 5.0 - step, "step_time": step, "router/entropy/1": 1.0}
            | {"router/load_max_over_mean/1": 2.0}
            for step in range(1, 5)
        ]
        for step in skipped:
            made[step - 1] |= {"lm_loss": None, "router/entropy/1": None, "skipped": True}
        return [*made[:1], {"step": 2, "skipped": True, "lm_loss": None}, *made[2:]]

    first, second = told(records(4)), told(records())
    assert (first["steps"], first["step_time"], first["entropy"]) == (2, 2.0, 1.0)
    assert first["train_curve"] == [[1, 4.0], [3, 2.0]]
    found = curves({"topk": {1: first, 2: second}}, "train_curve")
    assert found == {"topk": ([1, 3], [4.0, 2.0], [0.0, 0.0])}
