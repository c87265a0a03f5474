"""ZeRO's state of one number of data-parallel ranks, cut anew for another, is what that number would have cut
itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.engines.deepspeed import host_state
from megatron_hyperrouter.errors import CheckpointError

ALIGNMENT = 2  # numbers of each rank; as DeepSpeed's nccl_start_alignment_factor


def cut(row: torch.Tensor, ranks: int) -> tuple[list[torch.Tensor], list[int]]:
    """Equal pieces, the row filled up with zeros, and how much of that is said to be filling: all of it by
    the last rank.
    """
    filling = -len(row) % (ALIGNMENT * ranks)
    return list(torch.nn.functional.pad(row, (0, filling)).chunk(ranks)), [0] * (ranks - 1) + [filling]


def states_of(rows: list[torch.Tensor], ranks: int) -> list[dict[str, Any]]:
    """As DeepSpeed's ``state_dict`` of each rank: values without filling, moments with it, the step of each
    group a scalar.
    """
    cuts = [cut(row, ranks) for row in rows]
    return [
        {
            "single_partition_of_fp32_groups": [
                pieces[rank][: len(pieces[rank]) - filling[rank]] for pieces, filling in cuts
            ],
            "base_optimizer_state": {
                "param_groups": [{"params": [number]} for number in range(len(rows))],
                "state": {
                    number: {
                        "exp_avg": pieces[rank] * 2,
                        "exp_avg_sq": pieces[rank] * 3,
                        "step": torch.tensor(5.0),
                    }
                    for number, (pieces, _) in enumerate(cuts)
                },
            },
            "clip_grad": 1.0,
        }
        for rank in range(ranks)
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 8))
def test_each_rank_gets_its_piece(sizes: list[int], before: int, after: int) -> None:
    rows = [torch.arange(1.0, size + 1) + 100 * number for number, size in enumerate(sizes)]
    saved = states_of(rows, before)
    for rank in range(after):
        wanted = [cut(row, after)[0][rank] for row in rows]
        present = SimpleNamespace(
            single_partition_of_fp32_groups=[torch.zeros_like(piece) for piece in wanted],
            dp_process_group=rank,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_state.dist, "get_rank", lambda group: group)
            found = host_state._cut_anew(saved, present)
        assert found["clip_grad"] == 1.0
        for number, piece in enumerate(wanted):
            value, moments = (
                found["single_partition_of_fp32_groups"][number],
                found["base_optimizer_state"]["state"][number],
            )
            # DeepSpeed fills it up
            assert value.tolist() == piece.tolist()[: len(value)] and not piece[len(value) :].any()
            assert (
                moments["exp_avg"].tolist() == (piece * 2).tolist()
                and moments["exp_avg_sq"].tolist() == (piece * 3).tolist()
            )
            assert moments["step"].item() == 5.0
    assert found["base_optimizer_state"]["param_groups"] == saved[0]["base_optimizer_state"]["param_groups"]


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ({}, ""),
        (
            {"single_partition_of_fp32_groups": [], "round_robin_gradients": True},
            " with round_robin_gradients",
        ),
    ],
)
def test_a_state_that_is_laid_out_otherwise_is_refused(host: dict[str, Any], named: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"the state of a SimpleNamespace{named} cannot be cut anew"
    ) as caught:
        host_state._cut_anew([{}], SimpleNamespace(**host))
    assert "--finetune" in caught.value.remedy


def test_without_zero_each_rank_has_all_of_it() -> None:
    states = [{"state": 1}, {"state": 1}]
    assert host_state._cut_anew(states, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is states[0]
