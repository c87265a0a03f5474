"""Weights on disk: every bit is read back, whichever file contains it; all mismatches are
reported at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors, read_weights, weight_names, write_weights
from megatron_hyperrouter.errors import CheckpointError


def some() -> dict[str, Tensor]:
    whole = torch.randn(6, 4)
    return {
        "a.weight": torch.nn.Parameter(torch.randn(3, 5)),
        "b.weight": whole.t(),  # not contiguous
        "c.weight": whole[2:4],  # a view of the same memory
        "d.half": torch.randn(7).bfloat16(),
        "e.hash": torch.arange(32, dtype=torch.uint8),
        "f.seed": torch.tensor([2**40], dtype=torch.int64),
    }


def test_every_bit_comes_back_from_the_files_of_several_ranks(tmp_path: Path) -> None:
    tensors = some()
    names = sorted(tensors)
    for rank in range(2):
        write_weights(tmp_path, rank, {name: tensors[name] for name in names[rank::2]})
    write_weights(tmp_path, 2, {})  # a rank that owns nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "weights-00000.safetensors",
        "weights-00001.safetensors",
    ]
    assert weight_names(tmp_path) == set(names)
    for name, tensor in read_tensors(tmp_path, [*names, "unknown"]).items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_weights(tmp_path, targets)
    assert all(torch.equal(targets[name], tensors[name]) for name in names)


def test_a_part_is_read_without_the_rest(tmp_path: Path) -> None:
    write_weights(tmp_path, 0, some())
    target = torch.zeros(7)
    read_weights(tmp_path, {"d.half": target})
    assert target.abs().sum() > 0


def test_what_does_not_fit_is_told_at_once_and_nothing_is_changed(tmp_path: Path) -> None:
    write_weights(tmp_path, 0, some())
    targets = {
        "a.weight": torch.zeros(3, 5),
        "b.weight": torch.zeros(4, 7),
        "x.weight": torch.zeros(2),
        "y.weight": torch.zeros(2),
    }
    with pytest.raises(CheckpointError, match=r"the model in .* has different tensors or shapes") as caught:
        read_weights(tmp_path, targets)
    for line in (
        "b.weight: shape [4, 6] in the checkpoint, but [4, 7] in this model",
        "x.weight is not in the checkpoint",
        "y.weight is not in",
    ):
        assert line in caught.value.message
    assert "config.yaml" in caught.value.remedy
    assert not targets["a.weight"].any()


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    write_weights(tmp_path, 0, some())
    with pytest.raises(CheckpointError, match="and 4 more") as caught:
        read_weights(tmp_path, {f"{number:02}": torch.zeros(1) for number in range(12)})
    assert "07" in caught.value.message and "08" not in caught.value.message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path, 0, some())
    path = tmp_path / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors cannot be read") as caught:
        weight_names(tmp_path)
    assert caught.value.remedy


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        read_tensors(tmp_path, ["a.weight"])
