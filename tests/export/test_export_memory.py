"""An export holds one tensor at a time, whatever the size of the checkpoint: ``pytest -m by_hand``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import environment
from export.made_up import make_up

SHARD = 500 * 10**6
# Not ru_maxrss, which a new process has from the one that started it.
MEASURED = """
import sys
from megatron_hyperrouter.commands.models.export_hf import main
main(sys.argv[1:])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SETTINGS = {
    "num_layers": 10,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "moe_ffn_hidden_size": 2048,
    "num_experts": 8,
    "qk_layernorm": True,
    "router": {"name": "hyper"},
}


@pytest.mark.by_hand
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_2_gigabytes(
    tmp_path: Path, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    make_up(tmp_path / "run", SETTINGS, torch.ones)
    weights = sum(path.stat().st_size for path in (tmp_path / "run").rglob("weights-*"))
    assert weights > 2e9
    words = ["--load", tmp_path / "run", "--output", tmp_path / "out", "--no-proof"]
    words += ["--max-shard-size", str(SHARD), "--dtype", dtype]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    peak = int(done.stdout.split()[-1]) * 1024
    record_property("checkpoint, GB", weights / 1e9)
    record_property("peak, MB", peak / 1e6)
    print(f"{dtype}: checkpoint {weights / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB")
    assert peak <= 1.2 * SHARD + 300e6
