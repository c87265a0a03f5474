"""What ranks exchange before their process groups exist."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistStoreError, HashStore
from train.loop_runs import change

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.commands.training import together as start_together
from megatron_hyperrouter.commands.training.together import agree_on_settings, decide_together
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.guard import meeting
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming import together


def on_ranks(work: Callable[[Meeting], object], ranks: int = 3) -> list[object]:
    """What ``work`` returned on each rank, or the exception that it raised."""
    store, answers = HashStore(), [object()] * ranks

    def one(rank: int) -> None:
        try:
            answers[rank] = work(Meeting(rank, ranks, store))
        except Exception as error:  # noqa: BLE001 - handed to the test
            answers[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=f"rank {rank}") for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return answers


def test_rank_0_decides() -> None:
    assert on_ranks(lambda meeting: meeting.decided("what", f"rank {meeting.rank}")) == ["rank 0"] * 3
    assert Meeting(0, 1).decided("what", "mine") == "mine"


def test_the_first_difference_is_known_to_all() -> None:
    assert on_ranks(lambda meeting: meeting.difference("same", {"a": 1})) == [""] * 3
    found = on_ranks(lambda meeting: meeting.difference("other", {"a": 1, "b": meeting.rank // 2}))
    assert len(set(found)) == 1
    assert "rank 2 on " in str(found[0]) and "has b = 1, but rank 0 has b" not in str(found[0])
    assert "has b = 1, but rank 0 has 0" in str(found[0])


def test_other_settings_are_refused_on_all_ranks(tmp_path: Path) -> None:
    def work(meeting: Meeting) -> None:
        lr = ["1e-3", "1e-3", "5e-2"][meeting.rank]
        flags = ["--data-path", f"/disk{meeting.rank}/text", "--run-dir", str(tmp_path), "--lr", lr]
        agree_on_settings(parse(flags, routers=ROUTERS), meeting)

    for answer in on_ranks(work):
        assert isinstance(answer, ConfigError) and answer.exit_status == 2
        assert "rank 2 on " in str(answer) and "has --lr = 0.05, but rank 0 has 0.001" in str(answer)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    from fakes import Alone

    folders = CheckpointFolders(tmp_path / "run" / "checkpoints", Alone())
    for step in (2, 4):
        folders.save(step, lambda folder: (folder / "a").write_bytes(b"a"), {})
    return folders.root


def test_all_ranks_load_what_rank_0_sees(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the file system shows another ``latest`` to rank 1."""
    config = parse(
        ["--data-path", "text", "--run-dir", str(root.parent), "--load", str(root.parent)], routers=ROUTERS
    )

    def work(meeting: Meeting) -> object:
        if meeting.rank:
            return decide_together(change(config, "checkpoint", load="stale"), meeting).folder
        return decide_together(config, meeting).folder

    assert on_ranks(work) == [root / "step_0000004"] * 3
    monkeypatch.setattr(together, "_PATIENCE", 0.1)
    read = together.read_manifest

    def blind(folder: Path) -> dict[str, object]:
        if threading.current_thread().name == "rank 1":
            raise CheckpointError("no such file")
        return read(folder)

    monkeypatch.setattr(together, "read_manifest", blind)
    for answer in on_ranks(work):
        assert isinstance(answer, CheckpointError) and "the ranks do not see the same checkpoint" in str(
            answer
        )
        assert "rank 1 on " in str(answer)


@pytest.mark.parametrize("ranks_that_know", [{"rank 0", "rank 1", "rank 2"}, {"rank 2"}, set()])
def test_a_restart_that_rank_0_does_not_know_of(
    root: Path, monkeypatch: pytest.MonkeyPatch, ranks_that_know: set[str]
) -> None:
    """torchrun: a node whose own ranks have not failed counts no restart."""
    monkeypatch.setattr(
        start_together, "is_restarted", lambda _: threading.current_thread().name in ranks_that_know
    )
    config = parse(["--data-path", "text", "--run-dir", str(root.parent)], routers=ROUTERS)
    wanted = root / "step_0000004" if ranks_that_know else None
    assert on_ranks(lambda meeting: decide_together(config, meeting).folder) == [wanted] * 3


def test_what_rank_0_refuses_no_other_rank_waits_for(tmp_path: Path) -> None:
    config = parse(["--data-path", "text", "--load", str(tmp_path / "nowhere")], routers=ROUTERS)
    for answer in on_ranks(lambda meeting: decide_together(config, meeting)):
        assert isinstance(answer, CheckpointError) and "the folder has no finished checkpoint" in str(answer)


def test_a_name_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_NAME", 0.0)
    meeting.wait_for_name("127.0.0.1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR = node7\.invalid: cannot be resolved on "):
        meeting.wait_for_name("node7.invalid")
    for hosts in (",".join(f"node{number:03}" for number in range(10)), "node7..cluster"):
        with pytest.raises(ConfigError, match=rf"MASTER_ADDR = {hosts}: must be one host name or address"):
            meeting.wait_for_name(hosts)


def test_a_store_that_an_earlier_attempt_has_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun keeps it: what the ranks said then does not count, also where one of them had not come."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(meeting, "_POLL", 0.01)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv(meeting.ROUND, raising=False)

    def attempt(ranks: range, word: str) -> dict[int, str]:
        heard: dict[int, str] = {}

        def one(rank: int) -> None:
            with contextlib.suppress(DistStoreError):  # nobody answers a rank that is alone
                own = meeting.of_this_attempt(store, rank, 3, timedelta(seconds=20))
                heard[rank] = Meeting(rank, 3, own).decided("start", f"{word} of {rank}")

        store.set_timeout(timedelta(seconds=20 if len(ranks) == 3 else 0.3))
        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in ranks]
        for thread in reversed(threads):  # rank 0 comes last
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(25)
            assert not thread.is_alive()  # one that waits in C++ while Python ends would abort the process
        return heard

    assert attempt(range(3), "first") == dict.fromkeys(range(3), "first of 0")
    assert attempt(range(2, 3), "lost") == {}  # one rank alone has come, and was killed
    assert attempt(range(3), "third") == dict.fromkeys(range(3), "third of 0")
