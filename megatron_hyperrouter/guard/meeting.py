"""Communication of the ranks before their process groups exist: rank 0's decisions, and whether all ranks
got the same settings.

They use the launcher's own store. No rank waits in a collective, because a rank may be building an index
file.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.processes import ROUND

_PATIENCE = timedelta(hours=2)  # with the slowest rank
_POLL = 0.1  # seconds
_NAME = 30.0  # seconds until the name of a machine is known


class Meeting:
    """One rank among ``world_size``; every method is called by all of them."""

    def __init__(self, rank: int, world_size: int, store: Any = None) -> None:
        """``store``: a ``torch.distributed`` store; None for the only rank."""
        self.rank, self.world_size, self._store = rank, world_size, store
        self.hosts = [socket.gethostname()]  # of all ranks, each once; whole on rank 0 after a comparison

    @classmethod
    def of_this_process(cls) -> Meeting:
        """The ranks that the environment describes."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(0, 1)
        wait_for_name(os.environ["MASTER_ADDR"])
        with console.waiting_for_ranks(world_size):
            store, rank, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
            store.set_timeout(_PATIENCE)
            store = of_this_attempt(store, rank, world_size, _PATIENCE)
        return cls(rank, world_size, dist.PrefixStore("start", store))

    def decided(self, topic: str, word: str) -> str:
        """The value of rank 0, on all ranks; the values of the others are ignored."""
        if self._store is None:
            return word
        if self.rank == 0:
            self._store.set(topic, word)
            return word
        with console.waiting_for_ranks(self.world_size):
            return str(self._store.get(topic).decode())

    def difference(self, topic: str, facts: Mapping[str, object]) -> str:
        """The first fact that is not the same on all ranks, in words; empty if all are."""
        if self._store is None:
            return ""
        own = json.dumps({name: str(value) for name, value in facts.items()})
        self._store.set(f"{topic}/{self.rank}", json.dumps({"host": socket.gethostname(), "facts": own}))
        return self.decided(f"{topic}/found", self._found(topic, json.loads(own)) if self.rank == 0 else "")

    def _found(self, topic: str, ours: Mapping[str, str]) -> str:
        for rank in range(1, self.world_size):
            with console.waiting_for_ranks(self.world_size):
                told = json.loads(self._store.get(f"{topic}/{rank}"))
            if told["host"] not in self.hosts:
                self.hosts.append(told["host"])
            theirs = json.loads(told["facts"])
            for name in [*ours, *theirs]:
                if ours.get(name) != theirs.get(name):
                    return (
                        f"rank {rank} on {told['host']} has {name} = {theirs.get(name, 'none')}, "
                        f"but rank 0 has {ours.get(name, 'none')}"
                    )
        return ""


def wait_for_name(host: str) -> None:
    """Wait until this machine can resolve the host name of rank 0; ConfigError if it never can.

    A cluster may publish the name of a machine some seconds after it has started it.
    """
    end = time.monotonic() + _NAME
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > end:
                rule = f"cannot be resolved on {socket.gethostname()} ({error.strerror or error})"
                remedy = (
                    "set MASTER_ADDR to the address of rank 0, or correct DNS or /etc/hosts on this machine"
                )
                raise ConfigError([Problem("MASTER_ADDR", host, rule, remedy)]) from error
        except UnicodeError as error:  # a part of it is empty or too long, as in a list of hosts
            rule, remedy = "must be one host name or address", "set MASTER_ADDR to the address of rank 0"
            raise ConfigError([Problem("MASTER_ADDR", host, rule, remedy)]) from error
        time.sleep(1.0)


def of_this_attempt(store: Any, rank: int, world_size: int, patience: timedelta) -> Any:
    """The part of the launcher's store to which no earlier attempt has written.

    When torchrun restarts the ranks, it keeps its store with every key of the previous attempt, and each
    node counts restarts separately.  So rank 0 chooses a random name for this attempt.  Each rank asks for
    it with a random word of its own, and rank 0 answers each word.  Words of an earlier attempt are never
    asked for again, so they do no harm.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if rank:
        word = secrets.token_hex(8)
        store.set(f"round/asked/{rank}", word)
        name = store.get(f"round/told/{word}").decode()
        store.set(f"round/{name}/{rank}", "here")
    else:
        name = secrets.token_hex(8)
        _tell_name(store, name, set(range(1, world_size)), patience)
    os.environ[ROUND] = f"round/{name}"
    return dist.PrefixStore(f"round/{name}", store)


def _tell_name(store: Any, name: str, missing: set[int], patience: timedelta) -> None:
    told: dict[int, bytes] = {}
    end = time.monotonic() + patience.total_seconds()
    while missing:
        for rank in sorted(missing):
            word = store.get(f"round/asked/{rank}")
            if told.get(rank) != word:
                store.set(f"round/told/{word.decode()}", name)
                told[rank] = word
        missing -= {rank for rank in missing if store.check([f"round/{name}/{rank}"])}
        if missing and time.monotonic() > end:
            raise dist.DistStoreError(f"rank {min(missing)} has not joined")
        time.sleep(_POLL if missing else 0.0)
