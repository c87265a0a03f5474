"""The ranks of an examination: they exchange facts through the launcher's store, which works even if
collectives do not.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.guard.meeting import of_this_attempt, wait_for_name

PATIENCE = timedelta(seconds=120)  # for the slowest rank
_ASKED = 4  # requests for the time by each rank; the first answer is late if the ranks before it are not done
Value = TypeVar("Value")


class Ranks:
    """This rank among all; every method is called by all of them, in the same order."""

    def __init__(self, rank: int, size: int, store: Any = None) -> None:
        """``store``: a ``torch.distributed`` store; None for the only rank."""
        self.rank, self.size, self.store = rank, size, store

    @classmethod
    def of_this_process(cls) -> Ranks:
        """The ranks that the environment describes; HostError if they cannot reach each other."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1)
        rank, place = os.environ["RANK"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        wait_for_name(os.environ["MASTER_ADDR"])
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            return cls.at_store(store, int(rank), size)
        except (dist.DistStoreError, dist.DistNetworkError, OSError, RuntimeError) as error:
            raise HostError(
                (
                    f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {place}, or not all "
                    f"{size} ranks joined within {PATIENCE.seconds} s: {str(error).splitlines()[0]}"
                ),
                remedy="check the host name, the firewall and the messages of the other ranks",
            ) from error

    @classmethod
    def at_store(cls, store: Any, rank: int, size: int) -> Ranks:
        """The ranks that meet at a launcher's store; keys of an earlier attempt are ignored."""
        store.set_timeout(PATIENCE)
        return cls(rank, size, dist.PrefixStore("doctor", of_this_attempt(store, rank, size, PATIENCE)))

    def gather(self, topic: str, value: Value) -> list[Value]:
        """On rank 0, the values of all ranks; elsewhere an empty list."""
        if self.store is None:
            return [value]
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        return [json.loads(self._get(f"{topic}/{rank}", rank)) for rank in range(self.size)]

    def tell(self, topic: str, value: Value) -> Value:
        """Rank 0's value, on all ranks."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        told: Value = json.loads(self._get(topic, 0))
        return told

    def meet(self, topic: str) -> None:
        """Wait until all ranks have joined."""
        self.gather(f"{topic}/here", True)
        self.tell(f"{topic}/all", True)

    def leave(self) -> None:
        """Leave together: rank 0, whose process may run the store, leaves last."""
        self.meet("end")
        self.gather("left", True)

    def clock_offset(self) -> tuple[float, float]:
        """Seconds by which this rank's clock is ahead of rank 0's, and the largest error of that number: half
        the time of the quickest answer.
        """
        found = [(0.0, 0.0)] if self.rank == 0 else []
        for rank, number in itertools.product(range(1, self.size), range(_ASKED)):
            topic = f"clock/{rank}/{number}"
            if self.rank == 0:
                self._get(f"{topic}/asked", rank)
                self.store.set(f"{topic}/told", repr(time.time()))
            elif self.rank == rank:
                begun = time.time()
                self.store.set(f"{topic}/asked", "?")
                told = float(self._get(f"{topic}/told", 0))
                ended = time.time()
                found.append(((begun + ended) / 2 - told, (ended - begun) / 2))
        return min(found, key=lambda each: each[1])

    def _get(self, topic: str, rank: int) -> bytes:
        try:
            found: bytes = self.store.get(topic)
        except (dist.DistStoreError, RuntimeError) as error:
            raise HostError(
                f"rank {rank} did not answer within {PATIENCE.seconds} s (step: {topic})",
                remedy="read the messages of that rank, and check its machine",
            ) from error
        return found
