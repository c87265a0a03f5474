"""What counts as a fault, given facts that this machine cannot produce: GPUs, many machines."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import distributed as dist

from megatron_hyperrouter.compat.versions import TESTED
from megatron_hyperrouter.doctor import machine, network
from megatron_hyperrouter.doctor.judge import first_ranks, judge, names_of
from megatron_hyperrouter.doctor.ranks import Ranks
from megatron_hyperrouter.processes import ROUND

SOUND: dict[str, Any] = {
    "host": "a",
    "resolves": "10.0.0.1",
    "versions": {"python": "3.11.7", **{name: version for name, (_, version) in TESTED.items()}},
    "extension": "",
    "extras": {"transformer_engine": "2.9", "apex": "0.1", "flash_attn": "2.8"},
    "patches": {"megatron-core": ["keep_adam_step"], "deepspeed": []},
    "cores": 96,
    "open_files": 65536,
    "shm": 64 << 30,
    "gpu": "H100",
    "gpus": 8,
    "gpu_faults": [],
    "rate": 700e12,
    "offset": 0.0,
    "offset_error": 0.001,
}


def levels(*changes: dict[str, Any]) -> dict[str, str]:
    """Level of each check, for ranks two to a machine."""
    facts = [SOUND | {"host": "abcdefgh"[rank // 2 % 8]} | change for rank, change in enumerate(changes)]
    return {found.check: found.level for found in judge(facts, names_of(facts)) if found.level != "ok"}


def test_sound_machines() -> None:
    assert levels(*[{}] * 8) == {}
    facts = [SOUND | {"host": host} for host in "aabb"]
    assert first_ranks(facts) == [0, 2] and names_of(facts)[3] == "rank 3 on b"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rate": 600e12}, {"speed": "fault"}),
        ({"rate": 650e12}, {"speed": "note"}),
        ({"rate": 690e12}, {}),
        ({"gpu": ""}, {"devices": "fault"}),
        ({"gpu": "A100"}, {"devices": "note"}),
        ({"gpu_faults": ["GPU 3 has 2 uncorrected memory errors"]}, {"GPU": "fault"}),
        ({"shm": 64 << 20}, {"/dev/shm": "fault"}),  # what a container has that nobody has told
        ({"cores": 1}, {"cores": "fault"}),  # Slurm without --cpus-per-task
        ({"resolves": "127.0.1.1"}, {"host names": "fault"}),
        ({"resolves": ""}, {"host names": "fault"}),
        ({"offset": -3.0}, {"clock": "fault"}),
        ({"offset": 0.5}, {}),
        ({"offset": 3.0, "offset_error": 2.5}, {}),  # rank 0 was slow to answer
        ({"versions": SOUND["versions"] | {"torch": "2.12.0"}}, {"versions": "fault"}),
    ],
)
def test_one_rank_of_eight(change: dict[str, Any], found: dict[str, str]) -> None:
    assert levels(*[{}] * 5, change, {}, {}) == found


def test_all_alike() -> None:
    assert levels(*[{"versions": SOUND["versions"] | {"deepspeed": "0.20.0"}}] * 2) == {"versions": "note"}
    assert levels(*[{"versions": SOUND["versions"] | {"deepspeed": "none"}}] * 2) == {"versions": "fault"}
    assert levels(*[{"extras": {"transformer_engine": None, "apex": None}}] * 2) == {"extras": "note"}
    without = {"gpu": "", "gpus": 0, "extras": {"transformer_engine": None}}
    assert levels(*[without] * 2) == {}
    assert levels(*[without | {"cores": 1}] * 2) == {"cores": "note"}
    # gloo connects each rank to all others
    assert levels(*[{"open_files": 1024, "host": str(rank)} for rank in range(300)]) == {
        "open files": "fault"
    }


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ports_of_machines_with_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "::1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        ranks = [Ranks(rank, 2, store) for rank in range(2)]
        first, _ = pool.map(network.examine_ports, ranks, [["a", "b"]] * 2)
    assert [(found.check, found.level) for found in first] == [("ports", "ok")]


def test_a_slow_pair() -> None:
    names = [f"rank {rank}" for rank in range(8)]
    numbers = {"all_reduce": 1e9, "all_to_all": 1e9}
    rates = {(a, a ^ 1 << bit): 1e9 for bit in range(3) for a in range(8) if not a & 1 << bit}
    assert len(rates) == 12 and network._judge(rates, names, numbers, "cpu").level == "ok"
    slow = network._judge(rates | {(2, 6): 0.05e9}, names, numbers, "cpu")
    assert slow.level == "fault" and "slow: 0.05 GB/s between rank 2 and rank 6" in slow.text
    assert network._judge({(0, 1): 1e9, (2, 3): 1e6}, names, numbers, "cpu").level == "ok"  # none is usual


def test_a_rate_comes_from_many_tries_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tries but one are interrupted for longer than the whole measurement should take."""
    monkeypatch.setattr(machine, "_MATMUL_SECONDS", 0.01)
    clock, calls = [0.0], itertools.count()

    def now() -> float:
        clock[0] += 0.001 if next(calls) in (30, 31) else 1.0  # one of the two is the end of a try
        return clock[0]

    monkeypatch.setattr(machine.time, "perf_counter", now)
    assert machine.matmul_rate() == pytest.approx(2 * 384**3 / 0.001, rel=1e-6)


def test_a_clock_is_compared_by_the_quickest_answer() -> None:
    """The first answer comes late, which looks like a wrong clock; later answers show that it is right."""
    store = dist.HashStore()

    class Slow(dist.Store):
        """Rank 0's view of the store."""

        def get(self, key: str) -> bytes:
            if key.endswith("/0/asked"):
                time.sleep(0.5)
            return store.get(key)

        def set(self, key: str, value: str) -> None:
            store.set(key, value)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(Ranks(0, 2, Slow()).clock_offset)
        offset, error = threads.submit(Ranks(1, 2, store).clock_offset).result()
        assert first.result() == (0.0, 0.0)
    assert error < 0.2 and abs(offset) <= error


def test_a_second_attempt_does_not_meet_what_the_first_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun --max-restarts keeps its store, with every key of the attempt before."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv(ROUND, "")
    store = dist.HashStore()

    def told(rank: int, attempt: str) -> list[str]:
        ranks = Ranks.at_store(store, rank, 2)
        if rank:
            time.sleep(0.3)  # rank 0 asks first
        return ranks.gather("facts", f"{attempt} of rank {rank}")

    for attempt in ("first", "second"):
        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(told, rank, attempt) for rank in range(2)]
            assert found[0].result() == [f"{attempt} of rank 0", f"{attempt} of rank 1"]
