"""The network between ranks: open ports, and the bandwidth of the collectives that training uses."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_hyperrouter import console
from megatron_hyperrouter.doctor.finding import Finding, fault, first_of, ok
from megatron_hyperrouter.doctor.ranks import Ranks

_ANSWER = 5.0  # seconds
_LIMIT = timedelta(seconds=60)
_TRIES = 3
_MORE_ROUNDS = 3  # before a pair is called slow: other work on its machines may have disturbed it
_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_FEW_PAIRS = 4  # fewer pairs than this have no typical speed
_SLOW = {"cpu": 0.1, "cuda": 0.5}  # of the median; processes of one CPU machine disturb each other


def examine_ports(ranks: Ranks, names: Sequence[str]) -> list[Finding]:
    """Each rank connects to the next one, on a port that the system chooses (collective)."""
    if ranks.size == 1:
        return _loopback()
    address = _own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server(("", 0), family=family) as server:
        own = (address, server.getsockname()[1])
        places = ranks.tell("ports/all", ranks.gather("ports", own))
        answer = _connect(*places[(ranks.rank + 1) % ranks.size])
        told = ranks.gather("ports/answers", answer)
        ranks.meet("ports/done")
    closed = [
        f"{names[rank]} cannot reach {names[after]} at {places[after][0]}:{places[after][1]} ({why})"
        for rank, why in enumerate(told)
        if why and (after := (rank + 1) % ranks.size) >= 0
    ]
    if closed:
        remedy = (
            "open all TCP ports between the machines of a job, or set MASTER_ADDR to an address on a "
            "network that connects them"
        )
        return [fault("ports", first_of(closed), remedy)]
    return [ok("ports", f"each of the {ranks.size} ranks can reach the next rank")] if ranks.rank == 0 else []


def examine_collectives(ranks: Ranks, names: Sequence[str]) -> tuple[list[Finding], dict[str, Any]]:
    """All-reduce and all-to-all of all ranks, and an exchange of each pair of a hypercube (collective)."""
    if ranks.size == 1:
        return [], {}
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    numbers: dict[str, Any] = {}
    pairs: dict[tuple[int, int], float] = {}
    why, left_alone = "", False
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", ranks.store),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=_LIMIT,
        )
        numbers, pairs = _measure(ranks.rank, ranks.size, device)
    except (RuntimeError, ValueError) as error:  # what gloo and NCCL raise
        why, left_alone = str(error).splitlines()[0], console.left_alone(error)
    finally:
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            dist.destroy_process_group()
    told = ranks.gather("collectives", (why, left_alone))
    if ranks.rank:
        return [], {}
    broken = [
        (alone, f"{names[rank]} reports: {reason}") for rank, (reason, alone) in enumerate(told) if reason
    ]
    if broken:  # a rank that was left alone does not know why
        first = first_of([text for _, text in sorted(broken, key=lambda each: each[0])])
        remedy = (
            "check that the firewall allows connections between these machines, or set "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME (NCCL_DEBUG=INFO shows more)"
        )
        return [fault("collectives", f"ranks cannot exchange tensors; {first}", remedy)], {}
    return [_judge(pairs, names, numbers, device.type)], numbers


def _measure(
    rank: int, size: int, device: torch.device
) -> tuple[dict[str, Any], dict[tuple[int, int], float]]:
    """Bandwidths in bytes a second, of all ranks together and of each pair; the same on all ranks."""
    count = _BYTES[device.type] // 4 // size * size
    x, y = torch.ones(count, device=device), torch.empty(count, device=device)
    share = (size - 1) / size
    numbers: dict[str, Any] = {
        "all_reduce": 2 * share * 4 * count / _time(lambda: dist.all_reduce(x), device),
        "all_to_all": share * 4 * count / _time(lambda: dist.all_to_all_single(y, x), device),
    }
    best = _rates_of_pairs(rank, size, x, y)
    for _ in range(_MORE_ROUNDS):
        if not _slow_pairs(_named(best), device.type):
            break
        best = torch.maximum(best, _rates_of_pairs(rank, size, x, y))
    return numbers, _named(best)


def _rates_of_pairs(rank: int, size: int, x: Tensor, y: Tensor) -> Tensor:
    """Bytes a second of rank r with rank r ^ 2^s at [s, r], where r is the lower one; else 0."""
    bits = (size - 1).bit_length()
    rates = torch.zeros(bits, size, dtype=torch.float64, device=x.device)
    for bit in range(bits):
        other = rank ^ (1 << bit)
        partner = other if other < size else None
        seconds = _time(partial(_exchange, x, y, partner), x.device, alone=True)
        if partner is not None and rank < partner:
            rates[bit, rank] = 4 * x.numel() / seconds
    dist.all_reduce(rates)
    return rates


def _named(rates: Tensor) -> dict[tuple[int, int], float]:
    """By the two ranks."""
    return {
        (rank, rank ^ (1 << bit)): rate
        for bit, row in enumerate(rates.tolist())
        for rank, rate in enumerate(row)
        if rate
    }


def _slow_pairs(rates: Mapping[tuple[int, int], float], kind: str) -> list[tuple[int, int]]:
    """The slow pairs, slowest first; none if there are too few pairs to tell what is usual."""
    if len(rates) < _FEW_PAIRS:
        return []
    limit = _SLOW[kind] * statistics.median(rates.values())
    return sorted((pair for pair in rates if rates[pair] < limit), key=lambda pair: rates[pair])


def _exchange(x: Tensor, y: Tensor, partner: int | None) -> None:
    if partner is not None:
        both = [dist.P2POp(dist.isend, x, partner), dist.P2POp(dist.irecv, y, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()


def _time(act: Callable[[], object], device: torch.device, *, alone: bool = False) -> float:
    """Seconds of the best of a few tries: of the slowest rank, or of this rank if ``alone``."""
    best = float("inf")
    for number in range(1 + _TRIES):
        dist.barrier()
        begun = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun) if number else best  # the first one connects
    slowest = torch.tensor([best], device=device)
    if not alone:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _judge(
    rates: Mapping[tuple[int, int], float], names: Sequence[str], numbers: dict[str, Any], kind: str
) -> Finding:
    numbers["pair"] = statistics.median(rates.values())
    text = (
        f"all-reduce {numbers['all_reduce'] / 1e9:,.2f} GB/s, all-to-all "
        f"{numbers['all_to_all'] / 1e9:,.2f} GB/s, between two ranks {numbers['pair'] / 1e9:,.2f} "
        "GB/s (median over pairs)"
    )
    slow = [
        f"{rates[a, b] / 1e9:,.2f} GB/s between {names[a]} and {names[b]}"
        for a, b in _slow_pairs(rates, kind)
    ]
    if slow:
        remedy = "check the cable, switch port and network card of these machines"
        return fault("collectives", f"{text}; too slow: {first_of(slow)}", remedy)
    return ok("collectives", text)


def _connect(host: str, port: int) -> str:
    """Why the address cannot be reached; empty if it can."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _own_address() -> str:
    """The address that this machine uses to reach rank 0's machine; no packet is sent."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
    return address


def _loopback() -> list[Finding]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        why = _connect("127.0.0.1", server.getsockname()[1])
    if why:
        return [
            fault(
                "ports",
                f"this machine cannot connect to its own address 127.0.0.1: {why}",
                "allow connections to 127.0.0.1 in the firewall",
            )
        ]
    return [ok("ports", "this machine can connect to its own address 127.0.0.1")]
