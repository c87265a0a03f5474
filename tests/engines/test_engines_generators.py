"""Random generators continue on their layout and are seeded anew on another; state files that can run
code are loaded only where they are trusted.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.saved import generators
from megatron_hyperrouter.engines.saved.format1 import read_state
from megatron_hyperrouter.errors import CheckpointError


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Where the rank stands in its layout."""
    told = {"pipeline": 0, "data": 0}
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: told["pipeline"])
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda **_: told["data"])
    yield told


def drawn() -> list[float]:
    return [float(torch.rand(())), float(torch.nn.functional.dropout(torch.ones(64)).sum())]


def written(folder: Path, config: RunConfig) -> None:
    (folder / generators.file_of(3)).write_text(generators.later_text(config, world_size=4)())


def restored(folder: Path, config: RunConfig, *, world_size: int = 4, step: int = 5) -> bool:
    return generators.restore(folder, 3, config, world_size=world_size, step=step)


def test_they_continue_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    drawn()
    written(tmp_path, RunConfig())
    expected = drawn()
    drawn()
    assert restored(tmp_path, RunConfig())
    assert drawn() == expected


def test_another_layout_seeds_them_by_seed_step_and_place(tmp_path: Path, place: dict[str, int]) -> None:
    config = RunConfig()
    written(tmp_path, config)
    moved = replace(config, parallel=replace(config.parallel, pipeline_model_parallel_size=2))
    seen = set()
    for seed, step, stage, data in ((1, 5, 0, 0), (2, 5, 0, 0), (1, 6, 0, 0), (1, 5, 1, 0), (1, 5, 0, 1)):
        place.update(pipeline=stage, data=data)
        asked = replace(moved, train=replace(config.train, seed=seed))
        assert not restored(tmp_path, asked, step=step)
        first = float(torch.rand(()))
        torch.rand(100)
        assert not restored(tmp_path, asked, step=step)
        assert float(torch.rand(())) == first  # the same start draws the same
        seen.add(first)
    assert len(seen) == 5
    assert not restored(tmp_path, config, world_size=8)
    assert not generators.restore(tmp_path, 9, config, world_size=4, step=5)  # a rank that was not there


@pytest.mark.parametrize("text", ["", "[]", '{"layout": null', "{}"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / generators.file_of(3)).write_text(text)
    with pytest.raises(CheckpointError, match=r"random-00003\.json cannot be read"):
        restored(tmp_path, RunConfig())


class Code:
    """What a crafted state file can hold."""

    def __reduce__(self) -> object:
        return os.mkdir, (str(Code.mark),)

    mark = Path()


class TestFormat1:
    def test_runs_no_code(self, tmp_path: Path) -> None:
        Code.mark = tmp_path / "ran"
        torch.save({"optimizer": Code(), "random": {}}, tmp_path / "state-00000.pt")
        with pytest.raises(CheckpointError, match="has no checksums") as caught:
            read_state(tmp_path, 0, ranks=1, trusted=False)
        assert "--trust-checkpoint" in caught.value.remedy and not Code.mark.exists()
        with pytest.raises(CheckpointError, match="lists the experts separately") as caught:
            read_state(tmp_path, 0, ranks=1, trusted=True, stacked=True)
        assert "--no-moe-grouped-gemm" in caught.value.remedy and not Code.mark.exists()
        with pytest.raises(
            CheckpointError, match=r"contains code that does not belong in an optimizer state: .*mkdir"
        ):
            read_state(tmp_path, 0, ranks=1, trusted=True)
        assert not Code.mark.exists()
        torch.load(tmp_path / "state-00000.pt", weights_only=False)
        assert Code.mark.exists()  # so the file is one that shows it

    def test_weights_alone_are_no_checkpoint_to_continue(self, tmp_path: Path) -> None:
        """As ``mhr average`` and ``mhr import-hf`` write them."""
        for trusted in (False, True):
            with pytest.raises(CheckpointError, match="has weights but no optimizer state") as caught:
                read_state(tmp_path, 0, ranks=1, trusted=trusted, stacked=True)
            assert "--finetune" in caught.value.remedy

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x80\x02.",
            b"\x80\x02h\x05.",
            b"\x80\x02cnumpy\nndarray\n)R.",
            b"(S'ls'\nios\nsystem\n.",
            b"\x80\x02K\x05.",
        ],
        ids=["empty", "no value", "unknown memo", "wrong arguments", "unknown opcode", "a number"],
    )
    def test_a_damaged_pickle_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "state-00000.pt"
        torch.save({}, path)
        with zipfile.ZipFile(path) as saved:
            parts = {name: saved.read(name) for name in saved.namelist()}
        with zipfile.ZipFile(path, "w") as damaged:
            for name, part in parts.items():
                damaged.writestr(name, content if name.endswith("data.pkl") else part)
        said = r"state-00000\.pt (cannot be read: [A-Z]\w+Error(: \S[^\n]*)?\n|has no optimizer)"
        with pytest.raises(CheckpointError, match=said):
            read_state(tmp_path, 0, ranks=1, trusted=True)

    def test_reads_what_the_hosts_wrote(self, tmp_path: Path) -> None:
        """NumPy's arrays and DeepSpeed's classes, which are not tensors."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        written = {
            "zero_stage": ZeroStageEnum.gradients,
            "loss_scaler": LossScaler(scale=1.0),
            "keys": np.arange(4, dtype=np.uint32),
        }
        torch.save({"optimizer": written, "random": {}}, tmp_path / "state-00000.pt")
        read = read_state(tmp_path, 0, ranks=1, trusted=True)["optimizer"]
        assert read["zero_stage"] is ZeroStageEnum.gradients and read["loss_scaler"].cur_scale == 1.0
        assert read["keys"].tolist() == [0, 1, 2, 3]

    def test_of_another_number_of_ranks(self, tmp_path: Path) -> None:
        torch.save({"optimizer": {}, "random": {}}, tmp_path / "state-00000.pt")
        with pytest.raises(CheckpointError, match="was written by 1 ranks, but this run has 2") as caught:
            read_state(tmp_path, 0, ranks=2, trusted=True)
        assert "--finetune" in caught.value.remedy

    @pytest.mark.parametrize("content", [b"", b"no state at all", b"PK\x03\x04 cut"])
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "state-00000.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state-00000\.pt is damaged and cannot be read"):
            read_state(tmp_path, 0, ranks=1, trusted=True)

    def test_generators_of_it_continue(self, tmp_path: Path) -> None:
        states = {"torch": torch.get_rng_state(), "tracker": {}}
        torch.save({"optimizer": {}, "random": states}, tmp_path / "state-00000.pt")
        expected = drawn()
        drawn()
        generators.set_format_1(read_state(tmp_path, 0, ranks=1, trusted=True)["random"])
        assert drawn() == expected
