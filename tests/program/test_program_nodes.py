"""Two nodes on one machine: two ``deepspeed`` launchers, each with the hostfile and its own --node_rank,
train what one process trains.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from distributed import environment, free_port
from program.launched import PROGRAM, Record, Zygote, metrics
from program.settings import flags_of

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None,
        reason="no deepspeed launcher beside this Python",
    ),
]
NODES = ("127.0.0.1", "127.0.0.2")
# k grows from 1 to 3; Adam's epsilon keeps the rounding of gradients of almost nothing from becoming whole
# steps
SETTINGS = (
    "--router.name hyper --moe-router-topk 3 --topk-schedule linear --topk-start 1 --train-iters 4 --lr "
    "3e-3 --adam-eps 1e-4 "
    "--eval-interval 4 --save-interval 0"
).split()
LAYOUTS = {
    "deepspeed": "--expert-model-parallel-size 2 --zero-stage 1",
    "megatron": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1",
}
NUMBERS = {"train": ("lm_loss", "aux_loss", "grad_norm"), "eval": ("lm_loss", "perplexity", "bits_per_byte")}
TAKEN = ("EADDRINUSE", "ddress already in use")


def start_on_nodes(
    flags: list[str], folder: Path, port: int, *, timeout: float = 300
) -> tuple[list[int], str]:
    """One launcher for each node, at the same time; exit statuses and all that was said."""
    folder.mkdir()
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    log = folder / "said.txt"
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--hostfile",
        str(hostfile),
        "--no_ssh",
        "--num_nodes",
        str(len(NODES)),
    ]
    address = ["--num_gpus", "1", "--master_addr", NODES[0], "--master_port", str(port)]
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    started = []
    with log.open("w") as said:
        for rank in range(len(NODES)):
            command = [*launcher, "--node_rank", str(rank), *address, str(PROGRAM), *flags]
            started.append(
                subprocess.Popen(
                    command, cwd=folder, env=env, stdout=said, stderr=said, start_new_session=True
                )
            )
    try:
        statuses = [launched.wait(timeout) for launched in started]
    finally:
        for launched in started:
            if launched.poll() is None:
                os.killpg(launched.pid, signal.SIGKILL)
                launched.wait()
    return statuses, log.read_text(encoding="utf-8", errors="replace")


def train_on_nodes(flags: list[str], folder: Path) -> None:
    """To the end; once more, and aloud, where somebody took the port between its choice and its use."""
    statuses, said = start_on_nodes(flags, folder / "first", free_port())
    if any(statuses) and any(words in said for words in TAKEN):
        warnings.warn(f"the port was taken, second attempt:\n{said[-500:]}", stacklevel=2)
        statuses, said = start_on_nodes(flags, folder / "second", free_port())
    assert statuses == [0] * len(NODES), said[-4000:]


@pytest.fixture(scope="module")
def alone(zygote: Zygote, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Metrics of one process on the DeepSpeed engine."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    zygote.run(flags_of(text, run_dir, layout=SETTINGS))
    return metrics(run_dir)


@pytest.mark.parametrize("engine", LAYOUTS)
def test_two_nodes_give_the_losses_of_one_process(
    alone: list[Record], text: Path, tmp_path: Path, engine: str
) -> None:
    flags = flags_of(text, tmp_path / "run", "--engine", engine, *LAYOUTS[engine].split(), layout=SETTINGS)
    train_on_nodes(flags, tmp_path)
    found = metrics(tmp_path / "run")
    assert [(line["step"], line.get("split"), line["topk"]) for line in found] == [
        (line["step"], line.get("split"), line["topk"]) for line in alone
    ]
    assert {line["topk"] for line in found if "split" not in line} == {1, 2, 3} and len(
        found
    ) == 6  # of 4 steps and 2 evaluations
    for one, other in zip(found, alone, strict=True):
        for name in NUMBERS["eval" if "split" in one else "train"]:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
