"""Judges the facts that all ranks have reported about their machines.  Everything here is a pure function
of those facts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from megatron_hyperrouter.compat.versions import TESTED, untested
from megatron_hyperrouter.doctor.finding import Finding, fault, first_of, note, ok
from megatron_hyperrouter.doctor.machine import Facts
from megatron_hyperrouter.terminal import counted

_INSTALL = "run on that machine: bash tools/setup_env.sh"
_SLOW_GPU, _USUAL_GPU, _SLOW_CPU = 0.9, 0.95, 0.5  # of the median rate
_MOST_SKEW = 1.0  # seconds
_OPEN_FILES, _OPEN_FILES_A_RANK = 1024, 4  # with gloo, each rank has a connection to every other rank
_SHM_A_RANK = 64 << 20  # bytes: NCCL's and the data loader's
EXTRAS = {
    "transformer_engine": "Transformer Engine (fused attention, norms and experts on the Megatron engine)",
    "apex": "apex (fused Adam and gradient norms on the Megatron engine)",
    "flash_attn": "flash-attn (attention kernels for Transformer Engine)",
}


def judge(facts: Sequence[Facts], names: Sequence[str]) -> list[Finding]:
    """All findings; ``facts``: the facts of each rank; ``names``: the ranks' names for messages."""
    first = facts[0]
    return [
        *_versions(facts, names),
        *_extension(facts, names),
        _patches(first),
        _extras(first),
        *_devices(facts, names),
        _rates(facts, names),
        *_limits(facts, names),
        _clock(facts, names),
    ]


def names_of(facts: Sequence[Facts]) -> list[str]:
    """``rank 3 on node2``."""
    return [f"rank {rank} on {each['host']}" for rank, each in enumerate(facts)]


def first_ranks(facts: Sequence[Facts]) -> list[int]:
    """The first rank of each machine."""
    seen: dict[str, int] = {}
    for rank, each in enumerate(facts):
        seen.setdefault(each["host"], rank)
    return list(seen.values())


def _versions(facts: Sequence[Facts], names: Sequence[str]) -> Iterator[Finding]:
    found: Mapping[str, str] = facts[0]["versions"]
    differences = [
        f"{names[rank]} has {_held(library, each['versions'].get(library, 'none'))}, "
        f"but {names[0]} has {_held(library, version)}"
        for rank, each in enumerate(facts)
        for library, version in found.items()
        if each["versions"].get(library) != version
    ]
    missing = [library for library in TESTED if found[library] == "none"]
    if differences:
        yield fault("versions", f"the ranks have different versions: {first_of(differences)}", _INSTALL)
    if missing:
        yield fault("versions", f"not installed: {', '.join(missing)}", _INSTALL)
    if differences or missing:
        return
    problems = [problem for library in TESTED if (problem := untested(library, found[library]))]
    shown = ", ".join(f"{library} {found[library]}" for library in ("python", *TESTED))
    yield note("versions", f"{shown}; {'; '.join(problems)}") if problems else ok("versions", shown)


def _held(library: str, version: str) -> str:
    return f"no {library}" if version == "none" else f"{library} {version}"


def _extension(facts: Sequence[Facts], names: Sequence[str]) -> Iterator[Finding]:
    missing = [f"{names[rank]} ({each['extension']})" for rank, each in enumerate(facts) if each["extension"]]
    if missing:
        text = (
            f"the C++ extension that builds data indices is missing for {first_of(missing)}; "
            "the slower NumPy code is used instead"
        )
        yield fault("extension", text, f"{_INSTALL} (this script needs a C++17 compiler)")
    else:
        yield ok("extension", "the C++ extension that builds data indices works")


def _patches(first: Facts) -> Finding:
    words = [
        f"{len(names)} in {host} ({', '.join(names)})" for host, names in first["patches"].items() if names
    ]
    return ok("patches", "this program patches no library" if not words else ", ".join(words))


def _extras(first: Facts) -> Finding:
    found = [f"{name} {version}" for name, version in first["extras"].items() if version]
    missing = [EXTRAS[name] for name, version in first["extras"].items() if not version]
    text = f"installed: {', '.join(found)}" if found else "no optional GPU library is installed"
    if not first["gpus"]:
        return ok("extras", f"{text}; this machine has no GPU, so runs on it do not use GPU libraries")
    if missing:
        absent = f"not installed: {', '.join(missing)}"
        return note("extras", f"{text}; {absent}" if found else absent)
    return ok("extras", text)


def _devices(facts: Sequence[Facts], names: Sequence[str]) -> Iterator[Finding]:
    kinds = Counter(each["gpu"] or "CPU" for each in facts)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if facts[0]["gpus"] and any(not each["gpu"] for each in facts):
        bare = [name for name, each in zip(names, facts, strict=True) if not each["gpu"]]
        yield fault("devices", f"there is no GPU for {first_of(bare)}", "start at most one rank per GPU")
    elif len(kinds) > 1:
        yield note("devices", f"the devices differ ({text}); the slowest device limits the speed of the run")
    else:
        yield ok("devices", text)
    broken = [f"{each['host']}: {word}" for each in facts for word in each["gpu_faults"]]
    if broken:
        yield fault("GPU", first_of(list(dict.fromkeys(broken))), "remove that machine from the job")
    ranks_of = Counter(each["host"] for each in facts)
    crowded = {each["host"]: each["cores"] for each in facts if ranks_of[each["host"]] > (each["cores"] or 1)}
    if crowded:
        host, cores = next(iter(crowded.items()))
        text = f"{ranks_of[host]} ranks on {host} share {cores} core{'' if cores == 1 else 's'}"
        remedy = (
            "with Slurm, set --cpus-per-task to the number of cores divided by the number of tasks per node"
        )
        yield fault("cores", text, remedy) if facts[0]["gpus"] else note("cores", text, remedy)


def _rates(facts: Sequence[Facts], names: Sequence[str]) -> Finding:
    rates = [each["rate"] for each in facts]
    usual = statistics.median(rates)
    gpu = bool(facts[0]["gpus"])
    who = "the median rank" if len(rates) > 1 else "this rank"
    text = f"{who} reaches {usual / 1e12:,.3g} TFLOP/s in matrix products"
    slow = [
        f"{names[rank]} reaches only {rate / usual:.0%} of that speed"
        for rank, rate in sorted(enumerate(rates), key=lambda pair: pair[1])
        if rate < (_USUAL_GPU if gpu else _SLOW_CPU) * usual
    ]
    if not slow:
        return ok("speed", text)
    if gpu and min(rates) > _SLOW_GPU * usual:
        return note("speed", f"{text}; {first_of(slow)}")
    remedy = "check that machine for other jobs, heat and power limits"
    return fault("speed", f"{text}; {first_of(slow)}", remedy)


def _limits(facts: Sequence[Facts], names: Sequence[str]) -> Iterator[Finding]:
    needed = max(_OPEN_FILES, _OPEN_FILES_A_RANK * len(facts))
    low = [
        f"{each['open_files']} for {names[rank]}"
        for rank, each in enumerate(facts)
        if 0 <= each["open_files"] < needed
    ]
    if low:
        yield fault(
            "open files",
            f"ulimit -n must be at least {needed}, but is {first_of(low)}",
            "run ulimit -n 65536 before you start the job",
        )
    else:
        yield ok("open files", f"ulimit -n is {facts[0]['open_files']}")
    ranks_of = Counter(each["host"] for each in facts)
    small = [
        f"{each['host']} has {each['shm'] / 2**20:,.0f} MiB free for "
        f"{counted(ranks_of[each['host']], 'rank')}"
        for each in facts
        if each["shm"] is not None and each["shm"] < _SHM_A_RANK * ranks_of[each["host"]]
    ]
    if small:
        remedy = (
            "give the container more shared memory (docker --shm-size 8g; "
            "Kubernetes: an emptyDir with medium Memory)"
        )
        yield fault(
            "/dev/shm",
            f"each rank needs {_SHM_A_RANK >> 20} MiB of shared memory, but "
            f"{first_of(list(dict.fromkeys(small)))}",
            remedy,
        )
    elif facts[0]["shm"] is not None:
        yield ok("/dev/shm", f"{facts[0]['shm'] / 1e9:,.1f} GB free")
    if len(ranks_of) > 1:
        lost = [
            f"{each['host']} ({'resolves to ' + each['resolves'] if each['resolves'] else 'is unknown'})"
            for each in facts
            if not each["resolves"] or each["resolves"].startswith("127.") or each["resolves"] == "::1"
        ]
        if lost:
            text = f"the host name of a machine does not resolve to its network address: {first_of(lost)}"
            remedy = (
                "correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network "
                "interface that connects the machines"
            )
            yield fault("host names", text, remedy)


def _clock(facts: Sequence[Facts], names: Sequence[str]) -> Finding:
    certain = [abs(each["offset"]) - each["offset_error"] for each in facts]
    worst = max(range(len(facts)), key=lambda rank: certain[rank])
    offset = facts[worst]["offset"]
    if certain[worst] > _MOST_SKEW:
        way = "ahead of" if offset > 0 else "behind"
        text = f"the clock of {names[worst]} is {abs(offset):.1f} s {way} that of {names[0]}"
        return fault("clock", text, "start chrony or ntpd on that machine")
    return ok("clock", f"all clocks agree to within {max(abs(each['offset']) for each in facts):.3f} s")
