"""The verdicts on the claims of plan A, from made-up runs with obvious verdicts."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "results/plan_a/claims.py"
ROUTERS = ("smoe_dropout", "matched", "hyper", "paper", "topk")


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    bits: float, *, entropy: float = 2.0, told: float = 0.4, rank: float = 5.0, drift: float = 0.0
) -> Any:
    layer = {
        "entropy": entropy,
        "mutual_information": told,
        "jacobian": {"effective_rank": rank, "drift": drift},
    }
    return {
        "results": [{"topk": k, "bits_per_byte": bits - 0.01 * k} for k in (1, 2, 4, 8, 16)],
        "analysis": [{"topk": 1, "layers": []}, {"topk": 16, "layers": [layer, layer]}],
        "steps": 600,
    }


def runs(better: float, spread: float, **hyper: float) -> Any:
    """Five seeds; ``hyper`` is ``better`` than all others, give or take ``spread``."""
    noise = {seed: spread * (seed - 3) for seed in range(1, 6)}
    found = {label: {seed: run(4.0) for seed in noise} for label in ROUTERS}
    found["hyper"] = {seed: run(4.0 - better + each, **hyper) for seed, each in noise.items()}
    return found


def verdicts(claims: ModuleType, given: Any) -> dict[str, str]:
    return {claim.name[:2]: claim.verdict for claim in claims.of_a1(given)}


def test_a_router_that_keeps_its_promise(claims: ModuleType) -> None:
    found = verdicts(claims, runs(0.2, 0.01, entropy=1.5, told=0.8, rank=9.0, drift=0.3))
    assert found == {
        "F1": "supported",
        "F2": "supported",
        "F3": "supported",
        "F4": "supported",
        "F7": "not decided",
    }


def test_a_router_that_breaks_it(claims: ModuleType) -> None:
    found = verdicts(claims, runs(-0.2, 0.01, entropy=2.5, told=0.1, rank=3.0))
    assert found == {"F1": "refuted", "F2": "refuted", "F3": "refuted", "F4": "refuted", "F7": "refuted"}


def test_wide_intervals_decide_nothing_but_a_router_that_does_not_move(claims: ModuleType) -> None:
    found = verdicts(claims, runs(0.01, 0.5, drift=0.01))
    assert found["F1"] == found["F2"] == found["F3"] == "not decided"
    assert found["F4"] == "refuted"  # its drift alone says so


def test_differences_are_paired_by_seed(claims: ModuleType) -> None:
    given = runs(0.0, 0.0)
    for seed in range(1, 6):
        given["hyper"][seed], given["matched"][seed] = run(seed - 0.1), run(seed)
    found = claims.difference(given, "hyper", "matched", claims.bits(1))
    assert (found.mean, found.seeds) == (pytest.approx(-0.1), 5) and found.half < 1e-9


def test_a_block_is_judged_by_the_seeds_that_all_of_its_routers_have(claims: ModuleType) -> None:
    found = claims.shared(
        {"topk": {1: run(1.0), 2: run(2.0), 3: run(3.0)}, "lr10": {3: run(3.0), 1: run(1.0)}}
    )
    assert {label: list(by_seed) for label, by_seed in found.items()} == {"topk": [1, 3], "lr10": [1, 3]}
    assert claims.shared({}) == {}


@pytest.mark.parametrize(("count", "expected"), [(0, 2.9957), (1, 4.7439), (5, 10.5130)])
def test_the_bound_is_that_of_tables_of_the_poisson_distribution(
    claims: ModuleType, count: int, expected: float
) -> None:
    assert 1000 * claims.upper_bound(count, 1000) == pytest.approx(expected, abs=1e-4)


def test_the_page_of_a_folder(
    claims: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, by_seed in runs(0.2, 0.01).items():
        for seed, each in by_seed.items():
            folder = tmp_path / f"A1/runs/{label}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(each))
            alarm = (
                {"event": "alarm", "alarm": "imbalance"} if (label, seed) == ("topk", 2) else {"event": "end"}
            )
            (folder / "events.jsonl").write_text(json.dumps(alarm) + "\n")
    monkeypatch.setattr("sys.argv", ["claims.py", str(tmp_path)])
    claims.main()
    text = capsys.readouterr().out
    assert "| F1: HyperRouter is better with few experts | **supported** | -0.200 ± 0.020 (k = 1) |" in text
    assert "A3 was not run" in text and "A4 was not run" in text
    rate = 1000 * 4.7439 / (25 * 560)
    assert "Alarms of A1 in 14,000 watched steps: 1 (imbalance 1)." in text
    assert f"With 95 % confidence, the rate is at most {rate:.2f} alarms in 1,000 steps." in text
    assert math.isclose(claims.interval([0.19, 0.2, 0.21]).half, 0.01 * 4.302653 / math.sqrt(3), rel_tol=1e-5)
