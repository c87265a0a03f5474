"""Which rank this process is: sets RANK, WORLD_SIZE and the other variables from a launcher's or
scheduler's environment.

deepspeed and torchrun set them. ``srun`` and ``mpirun`` start tasks whose number is in other variables.
Without this file, each task would take itself for the only rank, and all would write to one run folder.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from megatron_hyperrouter.errors import ConfigError, Problem

_LAUNCH = "start the program with torchrun or deepspeed, which set these variables, or set them correctly"
_PORTS = range(15000, 35000)  # from which tasks of a scheduler choose one by the number of their job

_OTHERS = (  # the launcher, and its variables for rank, size, local rank and local size
    (
        "mpirun_rsh",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", ""),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)


@dataclass(frozen=True)
class _Tasks:
    """The tasks of a scheduler: the program that started them, and the numbers of this task."""

    starter: str
    rank: str
    size: str
    local_rank: str
    address: str  # of rank 0; empty if it is not known
    job: str  # the same for all tasks, and for no others at that time


def adopt_ranks(environ: MutableMapping[str, str] | None = None) -> None:
    """Make the environment say which rank this is, or that it is the only one.

    Tasks of ``srun`` and ``mpirun`` get RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    ConfigError if the environment has only some of these variables, or contradicts itself.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RANK") is None and environ.get("WORLD_SIZE") is None:
        # Inside a Slurm job, mpirun may start its daemons with srun: their numbers are then there as well.
        tasks = _open_mpi(environ) or _slurm(environ) or _other(environ)
        if tasks is None or tasks.size == "1":
            return
        _serve(tasks, environ)
    if problems := _problems(environ):
        raise ConfigError(problems)


def _serve(tasks: _Tasks, environ: MutableMapping[str, str]) -> None:
    address = environ.get("MASTER_ADDR") or tasks.address
    if not address:
        rule = (
            f"must be set, because this is task {tasks.rank} of {tasks.size} of {tasks.starter}, "
            "and the host of task 0 is unknown"
        )
        remedy = "set MASTER_ADDR to that host, or start the program with torchrun or deepspeed"
        raise ConfigError([Problem("MASTER_ADDR", "", rule, remedy)])
    port = _PORTS[zlib.crc32(tasks.job.encode()) % len(_PORTS)] if tasks.job else 29500
    environ.update(RANK=tasks.rank, WORLD_SIZE=tasks.size, LOCAL_RANK=tasks.local_rank, MASTER_ADDR=address)
    environ.setdefault("MASTER_PORT", str(port))


def _slurm(environ: MutableMapping[str, str]) -> _Tasks | None:
    """A task of ``srun``. A batch script also has SLURM_NTASKS; it is not a task, and its number is 0."""
    rank = environ.get("SLURM_PROCID")
    size = environ.get("SLURM_STEP_NUM_TASKS") or (
        environ.get("SLURM_NTASKS") if rank not in (None, "0") else None
    )
    _refuse_half(("SLURM_PROCID", rank), ("SLURM_STEP_NUM_TASKS", size))
    if rank is None or size is None:
        return None
    one_node = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")
    nodes = (
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
        or environ.get("SLURM_NODELIST")
    )
    return _Tasks(
        starter="srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS)",
        rank=rank,
        size=size,
        local_rank=environ.get("SLURM_LOCALID", ""),
        address="127.0.0.1" if one_node == "1" else first_host(nodes or ""),
        job=f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}",
    )


def _open_mpi(environ: MutableMapping[str, str]) -> _Tasks | None:
    rank, size = environ.get("OMPI_COMM_WORLD_RANK"), environ.get("OMPI_COMM_WORLD_SIZE")
    _refuse_half(("OMPI_COMM_WORLD_RANK", rank), ("OMPI_COMM_WORLD_SIZE", size))
    if rank is None or size is None:
        return None
    return _Tasks(
        starter="mpirun (OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE)",
        rank=rank,
        size=size,
        local_rank=environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""),
        address="127.0.0.1" if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size else "",
        job=environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or "",
    )


def _other(environ: MutableMapping[str, str]) -> _Tasks | None:
    """A task of a launcher that says no more than these numbers."""
    for starter, rank, size, local_rank, local_size in _OTHERS:
        _refuse_half((rank, environ.get(rank)), (size, environ.get(size)))
        if rank in environ and size in environ:
            return _Tasks(
                starter=f"{starter} ({rank}, {size})",
                rank=environ[rank],
                size=environ[size],
                local_rank=environ.get(local_rank, ""),
                address="127.0.0.1" if environ.get(local_size) == environ[size] else "",
                job="",
            )
    return None


def _refuse_half(rank: tuple[str, str | None], size: tuple[str, str | None]) -> None:
    """ConfigError if this is one of several tasks, and its number or the number of tasks is missing.

    ``rank``, ``size``: name and value of the two variables.  Without a number, or as number 0, a process may
    be no task at all: a batch script, for example.
    """
    for (missing, value), (name, known), alone in ((rank, size, "1"), (size, rank, "0")):
        if value is None and known not in (None, alone):
            raise ConfigError([Problem(missing, "", f"must be set, because {name} = {known}", _LAUNCH)])


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``node[07-09,12],gpu3`` gives ``node07``."""
    found = re.match(r"([^\[,]*)(?:\[([^\]]*)\]([^,\[]*))?", nodes.strip())
    if found is None:
        return ""
    prefix, inside, suffix = found.groups()
    return prefix if inside is None else f"{prefix}{re.split('[-,]', inside)[0]}{suffix}"


def _problems(environ: MutableMapping[str, str]) -> list[Problem]:
    problems: list[Problem] = []

    def number(name: str, least: int, most: int | None = None) -> int | None:
        text = environ.get(name)
        if text is None:
            problems.append(
                Problem(name, "", "must be set, because other launcher variables are set", _LAUNCH)
            )
            return None
        if (
            not re.fullmatch(r"\d{1,9}", text.strip())
            or int(text) < least
            or (most is not None and int(text) > most)
        ):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            problems.append(Problem(name, text, f"must be an integer {limits}", _LAUNCH))
            return None
        return int(text)

    size = number("WORLD_SIZE", 1)
    rank = number("RANK", 0)
    if size is not None and rank is not None and rank >= size:
        problems.append(Problem("RANK", rank, f"must be less than WORLD_SIZE = {size}", _LAUNCH))
    if size == 1 and environ.get("LOCAL_RANK") is None:
        environ["LOCAL_RANK"] = "0"
    number("LOCAL_RANK", 0)
    if size != 1 and not environ.get("MASTER_ADDR"):
        problems.append(
            Problem("MASTER_ADDR", "", "must be set, because other launcher variables are set", _LAUNCH)
        )
    if size != 1 or environ.get("MASTER_PORT") is not None:
        number("MASTER_PORT", 1, 65535)
    return problems
