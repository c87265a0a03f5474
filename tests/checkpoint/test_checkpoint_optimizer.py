"""Optimizer state on disk: what several ranks wrote is read back bit for bit, and incomplete state is
refused.
"""

from __future__ import annotations

import json
import os
import pickletools
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Box, boxes
from megatron_hyperrouter.checkpoint.optimizer import (
    INDEX,
    MASTER,
    MOMENTS,
    NotFiniteError,
    Staged,
    State,
    read_box,
    read_index,
)
from megatron_hyperrouter.checkpoint.weights import Reader, read_tensors
from megatron_hyperrouter.errors import CheckpointError

RANKS = 3
SHAPES = {"a.weight": (5, 7), "b.expert": (4, 3, 2), "c.norm": (9,), "d.scale": ()}


def whole() -> dict[str, dict[str, Tensor]]:
    """Name -> field -> the whole tensor."""
    torch.manual_seed(3)
    return {
        name: {field: torch.randn(shape) for field in ("weight", MASTER, *MOMENTS)}
        for name, shape in SHAPES.items()
    }


def staged(
    tensors: dict[str, dict[str, Tensor]], rank: int, dtype: torch.dtype = torch.bfloat16, ranks: int = RANKS
) -> Staged:
    """What one of three ranks writes: a third of each tensor's numbers, every third weight, and a frozen
    buffer.
    """
    names = list(tensors)[rank::ranks]
    weights = {name: tensors[name]["weight"].to(dtype) for name in names}
    if rank == 1:
        weights["e.buffer"] = torch.arange(6)
    states = []
    for name, fields in tensors.items():
        shape, count = SHAPES[name], fields[MASTER].numel()
        for placed in boxes(shape, count * rank // ranks, count * (rank + 1) // ranks, None):
            rows = {field: fields[field].view(-1)[placed.begin : placed.end] for field in (MASTER, *MOMENTS)}
            if dtype == torch.float32:
                del rows[MASTER]
            states.append(State(name, shape, placed.box, 7, {key: row.clone() for key, row in rows.items()}))
    return Staged(rank, ranks, weights, set(tensors), states, {f"random-{rank:05d}.json": lambda: "{}"})


def save(folder: Path, parts: list[Staged]) -> None:
    for part in parts:
        part.write(folder)
    parts[0].join(folder)


def test_comes_back_bit_for_bit_in_any_boxes(tmp_path: Path) -> None:
    tensors = whole()
    save(tmp_path, [staged(tensors, rank) for rank in range(RANKS)])
    index = read_index(tmp_path)
    assert index is not None and index.keys() == {*tensors, "e.buffer"}
    assert not index["e.buffer"].trained and index["e.buffer"].steps is None
    for name, fields in tensors.items():
        assert (index[name].shape, index[name].steps, index[name].dtype) == (SHAPES[name], 7, "bfloat16")
        for begin, end in ((0, 1), (1, fields[MASTER].numel())):
            for placed in boxes(SHAPES[name], begin, end, None):
                for field in (MASTER, *MOMENTS):
                    row = torch.zeros(placed.box.numel)
                    read_box(Reader(tmp_path), index[name], field, placed.box, row)
                    assert torch.equal(row, fields[field].view(-1)[placed.begin : placed.end]), (name, field)
    found = read_tensors(tmp_path, [*tensors, "e.buffer"])
    assert all(torch.equal(found[name], tensors[name]["weight"].bfloat16()) for name in tensors)
    assert found["e.buffer"].tolist() == list(range(6))


def test_what_is_written_is_listed_is_no_code_and_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        parts = [staged(whole(), rank, torch.float32) for rank in range(RANKS)]
        listed = {path.name for part in parts for path in part.write(tmp_path)}
        parts[0].join(tmp_path)
    finally:
        os.umask(before)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*listed, INDEX} and len(listed) == 3 * RANKS
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name
        with pytest.raises(ValueError, match=r".*"):
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_a_parameter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights and moments in float32 alone are 12 bytes; bfloat16 with a master weight is 14."""
    count = 700 * 1000
    rows = {field: torch.randn(count) for field in (MASTER, *MOMENTS)}
    if dtype == torch.float32:
        del rows[MASTER]
    state = State("w", (700, 1000), Box((0, 0), (700, 1000)), 1, rows)
    save(tmp_path, [Staged(0, 1, {"w": torch.randn(700, 1000).to(dtype)}, {"w"}, [state], {})])
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written / count <= (12.1 if dtype == torch.float32 else 14.1)


class TestNotWhole:
    def test_a_rank_that_wrote_nothing(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        for part in parts[:-1]:
            part.write(tmp_path)
        with pytest.raises(CheckpointError, match="rank 2 wrote no files"):
            parts[0].join(tmp_path)

    def test_an_expert_that_a_rank_left_out(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        parts[1].states = [state for state in parts[1].states if state.name != "b.expert"]
        with pytest.raises(CheckpointError, match=r"b\.expert: 8 of 24 values are missing"):
            save(tmp_path, parts)

    def test_an_expert_that_no_rank_has_state_of(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        for part in parts:
            part.states = [state for state in part.states if state.name != "b.expert"]
        with pytest.raises(
            CheckpointError, match=r"b\.expert: no rank has written its exp_avg, exp_avg_sq, master"
        ):
            save(tmp_path, parts)

    def test_an_expert_that_two_ranks_write(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        parts[1].states += [state for state in parts[2].states if state.name == "b.expert"]
        with pytest.raises(CheckpointError, match=r"b\.expert: a part is present twice"):
            save(tmp_path, parts)

    def test_a_weight_that_two_ranks_write(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        parts[2].weights |= parts[0].weights
        with pytest.raises(CheckpointError, match=r"a\.weight: two ranks write its weight"):
            save(tmp_path, parts)

    def test_ranks_that_took_other_numbers_of_steps(self, tmp_path: Path) -> None:
        parts = [staged(whole(), rank) for rank in range(RANKS)]
        parts[1].states = [state._replace(steps=8) for state in parts[1].states]
        with pytest.raises(CheckpointError, match="it has 7 optimizer steps on one rank and 8 on another"):
            save(tmp_path, parts)

    @pytest.mark.parametrize("field", ["weight", MASTER, *MOMENTS])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_number_that_is_not_finite(self, tmp_path: Path, field: str, value: float) -> None:
        tensors = whole()
        tensors["a.weight"][field].view(-1)[3] = value
        with pytest.raises(
            NotFiniteError, match=rf"a\.weight: its {field} contains NaN or infinity; nothing was saved"
        ):
            staged(tensors, 0).write(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": {"shape": [1]}}', json.dumps({"a": {"shape": "x"}})]
)
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"optimizer\.json cannot be read"):
        read_index(tmp_path)


def test_without_an_index(tmp_path: Path) -> None:
    assert read_index(tmp_path) is None
