"""safetensors files written and read tensor by tensor, compared with the library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hyperrouter.checkpoint.streams import TensorReader, TensorToWrite, shards, write_shard
from megatron_hyperrouter.errors import CheckpointError

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(7).bfloat16(),
    "c.bias": torch.arange(4),
    "empty": torch.zeros(0, 6),
    "hash": torch.arange(32, dtype=torch.uint8),
}


def planned() -> list[TensorToWrite]:
    return [TensorToWrite(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    digests = write_shard(path, planned(), iter(TENSORS.values()))
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        expected = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert digests[name] == expected


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    reader = TensorReader([tmp_path / "x.safetensors"])
    assert reader.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor) and reader.read(name).dtype == tensor.dtype
        assert reader.meta(name).shape == tensor.shape


def test_one_digest_does_not_depend_on_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    parts = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({name: TENSORS[name] for name in ("c.bias", "hash")}, parts[0])
    save_file({name: TENSORS[name] for name in ("a.weight", "b.weight", "empty")}, parts[1])
    whole = TensorReader([tmp_path / "whole.safetensors"]).digest()
    assert whole == TensorReader(parts).digest()
    save_file({name: TENSORS[name] + 1 for name in ("c.bias", "hash")}, parts[0])
    assert whole != TensorReader(parts).digest()


def test_shards_are_cut_by_size() -> None:
    parts = shards([TensorToWrite(str(n), torch.float32, (n,)) for n in (10, 20, 30, 100, 1)], 130)
    assert [[each.name for each in part] for part in parts] == [["10", "20"], ["30"], ["100"], ["1"]]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_users_mode(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_shard(tmp_path / "x.safetensors", planned(), iter(TENSORS.values()))
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_shard(path, planned(), iter(TENSORS.values()))
    for content in (b"", path.read_bytes()[:30], path.read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            TensorReader([path])
