"""The process and its launcher: how it joins the other ranks, and on which device it computes."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import constants, distributed_c10d

from megatron_hyperrouter import console
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.model.parallel import dropout_states, expert_rank, set_dropout_states
from megatron_hyperrouter.processes import ROUND

_PATIENCE = timedelta(hours=2)  # with the slowest rank; an index that takes longer must be built in advance


def single_rank_without_launcher() -> None:
    """Makes plain ``python program.py`` a job with one rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def join_world(host_backend: str, *, timeout: timedelta | None = None) -> None:
    """Initialise torch.distributed once every rank has arrived.

    Until then each rank reads its data separately.  It may have to build an index, or wait for the process
    that builds it.  torch waits for the slowest rank only as long as for a collective: 10 minutes with
    NCCL, else 30.  ``timeout``: time limit of collectives; None: torch's default.
    """
    if timeout is None:
        timeout = (
            constants.default_pg_nccl_timeout if host_backend == "nccl" else None
        ) or constants.default_pg_timeout
    begin = time.monotonic()
    try:
        with console.waiting_for_ranks(int(os.environ.get("WORLD_SIZE", "1"))):
            store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
            if ROUND in os.environ:  # torchrun's store has the keys of earlier attempts, too
                store = dist.PrefixStore(os.environ[ROUND], store)
            store.set_timeout(_PATIENCE)  # NCCL meets there at the first collective
            dist.init_process_group(host_backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        if "EADDRINUSE" in str(error):
            remedy = "choose another port with --master-port of torchrun, or --master_port of deepspeed"
            port = os.environ["MASTER_PORT"]
            raise HyperRouterError(
                f"port {port} (MASTER_PORT) is already in use by another program", remedy=remedy
            ) from error
        if time.monotonic() - begin < _PATIENCE.total_seconds():
            raise
        remedy = (
            "read the messages of the other ranks; if a rank is still building an index, build the index "
            "with mhr index before you start the run"
        )
        raise HyperRouterError(
            f"some ranks have not connected within {_PATIENCE.total_seconds() / 3600:g} hours: {error}",
            remedy=remedy,
        ) from error
    distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


def backend() -> str:
    """torch.distributed's backend on this machine; on GPUs it also selects this rank's GPU."""
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "nccl"


def device() -> torch.device:
    """The device on which this rank computes."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def patience() -> float:
    """Seconds that a collective waits for other ranks by torch's default."""
    usual = constants.default_pg_nccl_timeout if torch.cuda.is_available() else None
    return (usual or constants.default_pg_timeout).total_seconds()


def wait_at_most(seconds: float) -> None:
    """Set the time limit of every collective of every process group, including those of others."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def peak_memory(where: torch.device) -> int:
    """Largest number of bytes that this process has used: of its GPU if it has one, else of the machine."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def first_expert(config: RunConfig) -> int:
    """The number of this rank's first expert of a layer."""
    return expert_rank() * (config.model.num_experts // config.parallel.expert_model_parallel_size)


def random_states() -> dict[str, Any]:
    """The generators that a training step of this process draws from."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "tracker": _copied(dropout_states())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["tracker"]:  # empty if megatron-core's tracker has no seed
        set_dropout_states(_copied(states["tracker"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _copied(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """megatron-core's tracker changes its tensors in place."""
    return {name: state.clone() for name, state in states.items()}
