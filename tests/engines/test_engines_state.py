"""What a rank keeps of its optimizer and of its random generators, and what it says where that cannot be
read.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hyperrouter.engines.state import load_state, save_state
from megatron_hyperrouter.errors import CheckpointError


def drawn() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(torch.rand(())),
        float(torch.nn.functional.dropout(torch.ones(64)).sum()),
    ]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    drawn()
    save_state(tmp_path, 3, {"step": torch.tensor(7.0), "moments": torch.randn(4, dtype=torch.float64)})
    expected = drawn()
    drawn()
    state = load_state(tmp_path, 3)
    assert drawn() == expected
    assert state["step"] == 7 and state["moments"].dtype == torch.float64


def test_another_number_of_ranks(tmp_path: Path) -> None:
    save_state(tmp_path, 0, {})
    with pytest.raises(
        CheckpointError, match=r"state-00001\.pt is missing: .* another number of ranks"
    ) as caught:
        load_state(tmp_path, 1)
    assert "--finetune" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state-00000.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state-00000\.pt cannot be read"):
        load_state(tmp_path, 0)
