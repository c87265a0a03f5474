"""A real Slurm of two nodes on this machine: munge, a controller and two daemons, in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
KillWait=5
MinJobAge=300
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.2 NodeHostname={host} Port={ports[2]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why Slurm cannot run here; empty if it can, after an installation if necessary."""
    if os.geteuid() != 0:
        return "Slurm's daemons need the rights of root"
    if absent() and not _may_install():
        return f"no {absent()[0]} here, and not a container in which Debian's packages may be installed"
    if absent() and (why := _install()):
        return f"Debian's Slurm cannot be installed: {why}"
    return ""


def absent() -> list[str]:
    """Programs that are not here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _may_install() -> bool:
    """Installing is allowed in a container and on a CI machine."""
    container = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "CI" in os.environ
    return os.geteuid() == 0 and container and shutil.which("apt-get") is not None


def _install() -> str:
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    said = ""
    for command in (install, ["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=150)
        except subprocess.TimeoutExpired:
            return f"{command[1]} takes too long"
        said = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == 0 and not absent():
            return ""
    return said or "unknown"


@dataclass
class Slurm:
    """The running cluster."""

    root: Path
    env: dict[str, str]

    def run(
        self,
        *command: object,
        check: bool = True,
        timeout: float = 60,
        folder: Path | None = None,
        **more: str,
    ) -> str:
        """Run a command as a user; returns its output."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.env | more,
            cwd=folder or self.root,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in self.root.glob("*.log")
        )


@contextlib.contextmanager
def slurm_of_two_nodes(root: Path, ports: list[int], env: dict[str, str]) -> Iterator[Slurm]:
    """Start the daemons; they end with the block, with every job."""
    root.mkdir(mode=0o755, parents=True)
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    names = {"host": socket.gethostname(), "root": root, "ports": ports, "cpus": os.cpu_count() or 1}
    (root / "slurm.conf").write_text(_CONFIG.format(**names, user=getpass.getuser()).lstrip())
    cluster = Slurm(
        root, env | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{env['PATH']}:/usr/sbin:/sbin"}
    )
    munge = ["munged", "-F", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
    munge += [
        f"--pid-file={root}/munge.pid",
        f"--log-file={root}/munged.log",
        f"--seed-file={root}/munge.seed",
    ]
    commands = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    started = []
    try:
        for command in commands:
            with (root / f"{command[0]}-{len(started)}.log").open("w") as log:
                started.append(
                    subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log, start_new_session=True)
                )
            time.sleep(0.5 if command is munge else 0.0)
        _wait_for_nodes(cluster)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.run("scancel", "--partition=main", "--signal=KILL", "--full", check=False)
            cluster.run("scancel", "--partition=main", check=False)
            time.sleep(1.0)
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for_nodes(cluster: Slurm) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        states = cluster.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
        if states == ["idle", "idle"]:
            return
        time.sleep(0.3)
    raise AssertionError(f"the nodes do not come up:\n{cluster.logs()}")
