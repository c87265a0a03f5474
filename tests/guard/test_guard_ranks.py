"""The rank of a process, from the environment variables of launchers and schedulers."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.guard.ranks import adopt_ranks, first_host

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    environ = dict(environ)
    adopt_ranks(environ)
    return environ


def test_no_launcher_and_one_task() -> None:
    for environ in ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}):
        assert adopted(environ) == environ


def test_a_batch_script_is_no_task() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
    assert adopted(batch) == batch


def test_a_single_task_needs_no_second_variable() -> None:
    for environ in ({"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_PROCID": "0"}):
        assert adopted(environ) == environ


def test_launchers_are_left_alone() -> None:
    assert adopted(TORCHRUN) == TORCHRUN
    assert adopted(SLURM | TORCHRUN) == SLURM | TORCHRUN


def test_tasks_of_srun() -> None:
    found = [adopted(SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert [each["RANK"] for each in found] == ["0", "1", "2", "3"]
    assert {each["WORLD_SIZE"] for each in found} == {"4"} and found[3]["LOCAL_RANK"] == "1"
    assert {each["MASTER_ADDR"] for each in found} == {"gpu07"}
    (port,) = {each["MASTER_PORT"] for each in found}
    assert 15000 <= int(port) < 35000
    assert adopted(SLURM | {"SLURM_JOB_ID": "8"})["MASTER_PORT"] != port
    assert adopted(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


def test_tasks_of_mpirun() -> None:
    found = adopted(MPI)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert found["MASTER_ADDR"] == "127.0.0.1"


def test_tasks_of_mpirun_whose_daemon_is_a_task_of_srun() -> None:
    daemon = {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert adopted(daemon | MPI)["RANK"] == "1" and adopted(daemon | MPI)["WORLD_SIZE"] == "2"


@pytest.mark.parametrize("prefix", ["MV2_COMM_WORLD", "JSM_NAMESPACE"])
def test_tasks_of_other_launchers(prefix: str) -> None:
    numbers = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environ = {f"{prefix}_{name}": value for name, value in numbers.items()}
    if prefix == "JSM_NAMESPACE":
        with pytest.raises(ConfigError, match=r"MASTER_ADDR: must be set.*task 1 of 2 of jsrun"):
            adopted(environ)
        environ["MASTER_ADDR"] = "127.0.0.1"
    found = adopted(environ)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert found["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "task 3 of 4 of srun"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "task 1 of 2 of mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID: must be set, because SLURM_STEP_NUM_TASKS = 2"),
        ({"SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS: must be set, because SLURM_PROCID = 3"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK: must be set"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE: must be set"),
        ({"PMI_SIZE": "2"}, "PMI_RANK: must be set"),
        ({"PMI_RANK": "1"}, "PMI_SIZE: must be set"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "MV2_COMM_WORLD_SIZE: must be set"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "RANK"}, "RANK: must be set"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "WORLD_SIZE"}, "WORLD_SIZE: must be set"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "MASTER_ADDR"}, "MASTER_ADDR: must be set"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "MASTER_PORT"}, "MASTER_PORT: must be set"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "LOCAL_RANK"}, "LOCAL_RANK: must be set"),
        (TORCHRUN | {"RANK": "one"}, "RANK = one: must be an integer at least 0"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE = many"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT = 99999: must be an integer from 1 to 65535"),
        (TORCHRUN | {"RANK": "2"}, "RANK = 2: must be less than WORLD_SIZE = 2"),
    ],
)
def test_half_an_environment_is_a_message(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adopt_ranks(dict(environ))
    assert words in str(caught.value) and caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[07-09,12],gpu3", "node07"),
        ("a[2,4]x", "a2x"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
