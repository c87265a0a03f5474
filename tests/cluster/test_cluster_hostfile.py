"""``examples/cluster.sh``: what it refuses by name, and a real start on two nodes by pdsh and ssh."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import REPOSITORY, environment, free_port
from program.launched import metrics

from megatron_hyperrouter.guard.events import read_events

SCRIPT = REPOSITORY / "examples" / "cluster.sh"


def start(folder: Path, hostfile: str, *words: object, timeout: float = 60, **env: str) -> tuple[int, str]:
    """Exit status, and all output."""
    (folder / "hosts").write_text(hostfile)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "hosts"), *map(str, words)],
        env=environment(PATH=path, VIRTUAL_ENV=sys.prefix, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def stand_in(folder: Path, name: str, script: str) -> None:
    """A stand-in that PATH finds before the real program."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("hostfile", "said"),
    [
        ("node1 slots=8\nnode2 slot=8\n", "line 2: 'node2 slot=8' must be the name of a machine"),
        ("node1 slots=8\n\n# one more\nnode1 slots=8\n", "line 4: node1 is listed twice"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' must be"),
        ("# nothing\n", "lists no machine"),
    ],
)
def test_a_wrong_hostfile(tmp_path: Path, hostfile: str, said: str) -> None:
    status, output = start(tmp_path, hostfile)
    assert status == 2 and said in output and output.count("error:") == 1 and "remedy:" in output, output


def test_no_hostfile(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and f"{tmp_path}/no does not exist" in done.stderr


TWO = "node1 slots=1 max_slots=8  # comment\nnode2 slots=1\nnode3 slots=1"


def test_machines_that_ssh_does_not_reach(tmp_path: Path) -> None:
    """The message names every machine that is not reached, and nothing is started."""
    stand_in(tmp_path, "pdsh", "exit 0")
    stand_in(tmp_path, "ssh", 'case "$*" in *node1*) exit 0;; *) exit 255;; esac')
    stand_in(tmp_path, "deepspeed", "echo started")
    status, output = start(tmp_path, TWO)
    assert status == 2 and "started" not in output
    assert "node2" in output and "node3" in output and "node1" not in output


@pytest.mark.parametrize(
    ("hostfile", "asked", "said"),
    [
        (TWO, "--exclude node7", "--exclude node7: node7 is not in"),
        (TWO, "--include=node1@node8:0", "--include node1@node8:0: node8 is not in"),
        (TWO, "-e node1@node2@node3", "leaves no machine"),
        (TWO, "--num_gpus 2 --include node1", "--include node1 and --num_gpus are both given"),
        (TWO, "--exclude node2 --num_nodes=1", "--exclude node2 and --num_nodes are both given"),
        (
            TWO,
            "--include node1:9",
            "--include node1:9: node1 has no slot 9\n  remedy: use its slots from 0 to 0",
        ),
        (
            "node1 slots=8",
            "-e node1:0,08",
            "-e node1:0,08: node1 has no slot 08\n  remedy: use its slots from 0 to 7",
        ),
        (TWO, "--include node1:x", "--include node1:x: 'node1:x' must be a machine and its slots"),
        (TWO, "--include=node1:", "--include node1:: 'node1:' must be a machine and its slots"),
        (TWO, "-i node1 -e node2:0", "-i node1 and -e are both given\n  remedy: keep one of the two"),
        ("node2 slots=1", "", "without a HOSTFILE"),
        (TWO, "--exclude node1 --launcher openmpi", "ssh cannot reach node2 without a password"),
    ],
)
def test_what_the_launcher_would_answer_with_a_traceback(
    tmp_path: Path, hostfile: str, asked: str, said: str
) -> None:
    stand_in(tmp_path, "pdsh", "exit 0")
    stand_in(tmp_path, "ssh", 'case "$*" in *node1*) exit 0;; *) exit 255;; esac')
    stand_in(tmp_path, "deepspeed", "echo started")
    status, output = start(tmp_path, hostfile, "--", *asked.split())
    assert status == 2 and said in output and output.count("error:") == 1, output
    assert "remedy:" in output and "started" not in output


def test_a_hostfile_may_have_blanks_and_comments(tmp_path: Path) -> None:
    stand_in(tmp_path, "ssh", "exit 0")
    stand_in(tmp_path, "deepspeed", 'echo "started $*"')
    status, output = start(tmp_path, "# all\n\n  \tnode1  slots=2 # the only one\r\n")
    assert status == 0 and "started" in output, output


@pytest.mark.parametrize("asked", ["--exclude node2@node3", "--include node1:0", "--launcher openmpi"])
def test_machines_that_are_left_out_need_not_answer(tmp_path: Path, asked: str) -> None:
    """Flags after -- go to the launcher, the others to the program."""
    stand_in(tmp_path, "pdsh", "exit 0")
    stand_in(tmp_path, "ssh", 'case "$*" in *node1*) exit 0;; *) exit 255;; esac')
    stand_in(tmp_path, "deepspeed", 'echo "started $*"')
    status, output = start(tmp_path, TWO, "--lr", "1e-3", "--", *asked.split())
    assert status == 0, output
    launcher, program = output.split("started ")[1].split("pretrain_gpt_hyperrouter.py")
    assert asked in launcher and "--lr 1e-3" in program and asked not in program
    assert "--run-dir runs/cluster --load runs/cluster" in program


def test_another_run_folder_is_not_continued_from_runs_cluster(tmp_path: Path) -> None:
    stand_in(tmp_path, "ssh", "exit 0")
    stand_in(tmp_path, "deepspeed", 'echo "started $*"')
    _, output = start(tmp_path, "node1 slots=2", "--run-dir", "runs/b")
    assert "--run-dir runs/b --load runs/b" in output and "--load runs/cluster" not in output


def test_pdsh_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "realpath", "dirname", "cat", "mkdir"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    (tmp_path / "hosts").write_text(TWO)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "hosts")],
        env={"PATH": str(tmp_path / "bin"), "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "pdsh is not installed" in done.stderr and "--launcher" in done.stderr


@contextlib.contextmanager
def private_sshd(folder: Path) -> Iterator[str]:
    """An ssh server of our own on all loopback addresses; returns the options that reach it."""
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    for name in ("host", "user"):
        subprocess.run([*keygen, "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    port = free_port()
    settings = {
        "Port": port,
        "ListenAddress": "0.0.0.0",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": folder / "sshd.pid",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([str(sshd), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    time.sleep(0.5)
    try:
        yield (
            f"-p {port} -i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR"
        )
    finally:
        server.terminate()
        server.wait(10)


def absent() -> str:
    names = [
        name for name in ("pdsh", "ssh", "sshd") if shutil.which(name, path="/usr/sbin:/usr/bin:/bin") is None
    ]
    return f"no {names[0]} on this machine" if names else ""


@pytest.mark.processes
@pytest.mark.skipif(bool(absent()), reason=absent())
def test_two_nodes_by_pdsh_and_ssh(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny = "--config examples/quickstart.yaml --mock-data --tokenizer-type NullTokenizer --vocab-size 64 "
    tiny += "--train-iters 2 --lr-warmup-iters 0 --seq-length 32 --eval-interval 0 --num-layers 1"
    with private_sshd(tmp_path) as options:
        stand_in(tmp_path, "ssh", f'exec {shutil.which("ssh")} {options} "$@"')
        status, output = start(
            tmp_path,
            "# two addresses of this machine\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n",
            *tiny.split(),
            *["--run-dir", run_dir, "--load", run_dir],
            *["--", "--master_addr", "127.0.0.1", "--master_port", free_port()],
            timeout=280,
        )
    assert status == 0, output[-4000:]
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
    assert read_events(run_dir / "events.jsonl")[0]["world_size"] == 2
