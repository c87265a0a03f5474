"""Saving in the background: training does not wait, no file is incomplete, and all ranks know
of a failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import Alone, ThreadRanks

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find, read_meta, verify
from megatron_hyperrouter.checkpoint.writer import CheckpointWriter, Failure
from megatron_hyperrouter.errors import CheckpointError

RANKS = 3


class Files:
    """One file for each rank, and one for all; ``before``: what a rank's thread does first."""

    def __init__(self, rank: int, before: Callable[[], object] = lambda: None) -> None:
        self.rank, self.before = rank, before

    def write(self, folder: Path) -> list[Path]:
        self.before()
        path = folder / f"weights-{self.rank}"
        path.write_text(f"of rank {self.rank}")
        (folder / f"index-{self.rank}").write_text("a part")
        return [path]

    def join(self, folder: Path) -> None:
        parts = sorted(folder.glob("index-*"))
        (folder / "optimizer.json").write_text(" ".join(path.read_text() for path in parts))
        for path in parts:
            path.unlink()


def on_ranks(work: Callable[[ThreadRanks, CheckpointWriter], object], root: Path) -> list[object]:
    return ThreadRanks.run(RANKS, lambda ranks: work(ranks, CheckpointWriter(CheckpointFolders(root, ranks))))


def names(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "manifest.json"}


def test_the_files_are_those_of_a_save_that_waits(tmp_path: Path) -> None:
    def together(ranks: ThreadRanks) -> None:
        files = Files(ranks.place.rank)
        CheckpointFolders(tmp_path / "waits", ranks).save(10, files.write, {"a": 1}, join=files.join)

    ThreadRanks.run(RANKS, together)

    def behind(ranks: ThreadRanks, writer: CheckpointWriter) -> None:
        writer.start(10, Files(ranks.place.rank), {"a": 1})
        assert writer.settle() is None
        published = writer.published()
        assert [step for step, _ in published] == ([10] if ranks.place.rank == 0 else [])
        assert writer.published() == []

    assert on_ranks(behind, tmp_path / "behind") == [None] * RANKS
    one, other = find(tmp_path / "waits"), find(tmp_path / "behind")
    assert one is not None and other is not None and names(one) == names(other)
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    assert names(other)["optimizer.json"] == "a part a part a part" and read_meta(other) == {"a": 1}
    verify(other, Alone())


def test_training_goes_on_while_it_writes_and_a_kill_leaves_the_last_one(tmp_path: Path) -> None:
    held = threading.Event()

    def work(ranks: ThreadRanks, writer: CheckpointWriter) -> None:
        rank = ranks.place.rank
        writer.start(1, Files(rank), {})
        assert writer.settle() is None
        began = time.monotonic()
        writer.start(2, Files(rank, lambda: held.wait(10)), {})
        assert time.monotonic() - began < 5 and not writer.failed
        ranks.any_rank(False)  # a step that all ranks take
        assert find(tmp_path) == tmp_path / "step_0000001"  # what a kill would leave
        held.set()
        assert writer.settle() is None
        assert find(tmp_path) == tmp_path / "step_0000002"

    assert on_ranks(work, tmp_path) == [None] * RANKS


def full_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("bad", range(RANKS))
@pytest.mark.parametrize("mute", [False, True])
def test_a_rank_that_fails_fails_all(
    tmp_path: Path, bad: int, mute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mute``: its disk is so full that it cannot even write a message."""
    if mute:
        monkeypatch.setattr("megatron_hyperrouter.checkpoint.writer._FAILED", "no/such/folder/")

    def work(ranks: ThreadRanks, writer: CheckpointWriter) -> Failure | None:
        rank = ranks.place.rank
        writer.start(1, Files(rank), {})
        assert writer.settle() is None
        writer.start(2, Files(rank, full_disk if rank == bad else lambda: None), {})
        told = writer.settle()
        assert writer.settle() is None and not writer.failed
        return told

    for rank, told in enumerate(on_ranks(work, tmp_path)):
        assert isinstance(told, Failure) and not told.hopeless
        assert "No space left on device" in told.reason
        assert rank == bad or told.reason.startswith(f"rank {bad}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]


def test_an_error_of_ours_is_hopeless(tmp_path: Path) -> None:
    def lost() -> None:
        raise CheckpointError("a weight is not finite")

    def work(ranks: ThreadRanks, writer: CheckpointWriter) -> Failure | None:
        writer.start(2, Files(ranks.place.rank, lost if ranks.place.rank == 1 else lambda: None), {})
        return writer.settle()

    found = on_ranks(work, tmp_path)
    assert all(isinstance(told, Failure) and told.hopeless for told in found), found
    assert found[0] == Failure("rank 1: a weight is not finite", True)


def test_the_memory_of_one_save_is_not_given_to_the_next(tmp_path: Path) -> None:
    writer = CheckpointWriter(CheckpointFolders(tmp_path, Alone()))
    writer.start(1, Files(0), {})
    with pytest.raises(RuntimeError, match="has not finished"):
        writer.start(2, Files(0), {})
    assert writer.settle() is None


def test_the_end_of_a_broken_run_does_not_wait_for_ranks_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_hyperrouter.checkpoint.writer._LAST_WAIT", 0.2)

    class Lonely(Alone):
        place = ThreadRanks(0, threading.Barrier(1), [None, None]).place

    writer = CheckpointWriter(CheckpointFolders(tmp_path, Lonely()))
    writer.start(1, Files(0), {})
    writer.close()
    assert writer.failed and find(tmp_path) is None
