"""What ``examples/cluster/slurm.sh`` asks of Slurm, with stand-ins for its commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distributed import REPOSITORY, environment

SCRIPT = REPOSITORY / "examples" / "cluster" / "slurm.sh"


def asked(folder: Path, *words: object, srun: str = "", **env: str) -> list[str]:
    """The command lines of ``srun``; ``srun``: what else it does."""
    (folder / "bin").mkdir()
    for name, script in {
        "srun": f'echo "srun $*"\n{srun}',
        "scontrol": "echo n1",
        "nvidia-smi": "exit 9",
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    known = environment(PATH=path, VIRTUAL_ENV=sys.prefix, SLURM_SUBMIT_DIR=str(REPOSITORY), **job)
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)], env=known | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("srun ")]


def test_a_rank_for_each_gpu_with_its_share_of_the_cores(tmp_path: Path) -> None:
    (line,) = asked(tmp_path, "--lr", "1e-3", SLURM_GPUS_ON_NODE="8")
    assert "--nodes 2 --kill-on-bad-exit=1 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 12 python" in line
    assert (
        "--run-dir runs/cluster --load runs/cluster --engine megatron --config examples/cluster.yaml" in line
    )
    assert line.endswith("--lr 1e-3")


@pytest.mark.parametrize(
    "text",
    [
        *("run_dir: runs/mine", 'run_dir: "runs/mine"', "run_dir: 'runs/mine' # here"),
        *("run-dir: runs/mine", "save: runs/mine"),
    ],
)
def test_the_run_folder_is_that_of_the_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.yaml").write_text(f"num_layers: 2\n{text}\n")
    (line,) = asked(tmp_path, "--config", tmp_path / "my.yaml")
    assert "--run-dir runs/mine --load runs/mine" in line and line.count("--config") == 1
    assert "--ntasks 2 --ntasks-per-node 1 --cpus-per-task 96" in line and "--engine" not in line


@pytest.mark.parametrize(
    "words", [["--run_dir", "r/a_b"], ["--run_dir=r/a_b"], ["--save", "r/a_b"], ["--save=r/a_b"]]
)
def test_other_spellings_of_the_run_folder(tmp_path: Path, words: list[str]) -> None:
    (line,) = asked(tmp_path, *words, "--mock_data")
    assert "--run-dir r/a_b --load r/a_b" in line and "--tokenizer-type NullTokenizer" in line


def test_a_new_run_begins_with_the_weights_that_its_settings_name(tmp_path: Path) -> None:
    """Once it has checkpoints, it continues them."""
    (tmp_path / "my.yaml").write_text(f"run_dir: {tmp_path}/run\nload: runs/base\nfinetune: true\n")
    (line,) = asked(tmp_path, "--config", tmp_path / "my.yaml")
    assert "--run-dir" in line and "--load" not in line
    (tmp_path / "run/checkpoints/step_0000001").mkdir(parents=True)
    (tmp_path / "again").mkdir()
    (line,) = asked(tmp_path / "again", "--config", tmp_path / "my.yaml")
    assert f"--run-dir {tmp_path}/run --load {tmp_path}/run" in line
    # with a container, the host of the script may have no Python
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "python").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "none" / "python").chmod(0o755)
    (tmp_path / "third").mkdir()
    path = f"{tmp_path / 'third' / 'bin'}:{tmp_path / 'none'}:/usr/bin:/bin"
    (line,) = asked(tmp_path / "third", "--config", tmp_path / "my.yaml", PATH=path)
    assert f"--run-dir {tmp_path}/run --load {tmp_path}/run" in line


def test_a_run_folder_with_a_variable_is_found(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("run_dir: $HOME/run\nload: runs/base\n")
    (tmp_path / "run/checkpoints/step_0000001").mkdir(parents=True)
    (line,) = asked(tmp_path, "--config", tmp_path / "my.yaml", HOME=str(tmp_path))
    assert "--load $HOME/run" in line


def test_the_settings_are_in_the_home_folder(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("run_dir: runs/mine\n")
    (line,) = asked(tmp_path, "--config=~/my.yaml", HOME=str(tmp_path))
    assert "--run-dir runs/mine --load runs/mine" in line and line.endswith(" --config=~/my.yaml")


def test_a_variable_that_the_shell_did_not_replace(tmp_path: Path) -> None:
    """The program would find the file, and the script another run folder."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config=$HOME/my.yaml"],
        env=environment(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(REPOSITORY), VIRTUAL_ENV=sys.prefix),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "error: --config = $HOME/my.yaml contains a variable" in done.stderr
    assert done.stdout == ""


def test_torchrun_meets_under_a_name_of_each_attempt(tmp_path: Path) -> None:
    (line,) = asked(
        tmp_path,
        LAUNCHER="torchrun",
        SLURM_GPUS_ON_NODE="4",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_RESTART_COUNT="3",
    )
    assert "--ntasks 2 --ntasks-per-node 1 --cpus-per-task 96 torchrun --nnodes 2 --nproc-per-node 4" in line
    assert "--rdzv-endpoint n1:20007 --rdzv-id 7-3" in line


def test_a_container(tmp_path: Path) -> None:
    failed = 'case "$*" in *pretrain*) exit 1;; esac'
    first, second = asked(tmp_path, CONTAINER_IMAGE="hyperrouter.sqsh", srun=failed)
    container = f"--container-image hyperrouter.sqsh --container-mounts {REPOSITORY}:{REPOSITORY}"
    assert container in first and "pretrain_gpt_hyperrouter.py" in first
    # whether to start again is asked there as well: the machine itself may not have the libraries
    assert container in second and "--ntasks 1 " in second
    assert second.endswith("tools/status.py runs/cluster --after-exit 1")


BY_SRUN = """srun: error: n1: task 0: Exited with exit code 3
srun: error: n2: tasks 1-3: Terminated
"""
BY_TORCHRUN = """  exitcode  : -15 (pid: 7)
Root Cause (first observed failure):
  exitcode  : 3 (pid: 8)
srun: error: n1: task 0: Exited with exit code 1
"""


@pytest.mark.parametrize(("launcher", "said"), [("srun", BY_SRUN), ("torchrun", BY_TORCHRUN)])
def test_the_status_of_the_rank_that_refused_counts(tmp_path: Path, launcher: str, said: str) -> None:
    """And not that of the ranks that the launcher has ended."""
    (tmp_path / "said").write_text(said)
    failed = f'case "$*" in *pretrain*) cat {tmp_path}/said >&2; exit 143;; esac'
    more = {"LAUNCHER": launcher, "SLURM_JOB_NODELIST": "n1", "CONTAINER_IMAGE": "x.sqsh"}
    *_, question = asked(tmp_path, srun=failed, **more)
    assert question.endswith("tools/status.py runs/cluster --after-exit 3")
