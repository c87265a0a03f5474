"""The random choice on which all ranks agree."""

from __future__ import annotations

import subprocess
import sys

from megatron_hyperrouter.ops.coin import shared_coin


def test_another_process_tosses_the_same():
    code = (
        "from megatron_hyperrouter.ops.coin import shared_coin; print([shared_coin(seed=7, step=s, "
        "layer=2).hex() for s in range(20)])"
    )
    ours = [shared_coin(seed=7, step=step, layer=2).hex() for step in range(20)]
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == str(ours)


def test_every_argument_counts():
    tosses = {
        shared_coin(seed=seed, step=step, layer=layer)
        for seed in (1, 11)
        for step in range(112)
        for layer in (1, 11, 12)
    }
    assert len(tosses) == 2 * 112 * 3  # 1:11 and 11:1 are different, too


def test_tosses_are_uniform():
    tosses = sorted(shared_coin(seed=3, step=step, layer=1) for step in range(10_000))
    assert 0.0 <= tosses[0] < tosses[-1] < 1.0
    distance = max(abs(toss - i / 10_000) for i, toss in enumerate(tosses))
    assert distance < 1.63 / 100  # Kolmogorov-Smirnov at 1 %
