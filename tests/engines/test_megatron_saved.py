"""The Megatron engine saves the optimizer's newest weights, wherever they are stored at that moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from program.launched import Zygote
from safetensors import safe_open

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("layout_worker.py")
SPLIT = "--engine megatron --use-distributed-optimizer"
PLAIN = f"{SPLIT} --no-overlap-grad-reduce"


@pytest.mark.parametrize("experts", [1, 2])
def test_tensor_parallel_ranks_share_the_writing(tmp_path: Path, zygote: Zygote, experts: int) -> None:
    """Each tensor is in one file, and no rank writes much more than the other."""
    flags = (
        "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel "
        f"--expert-tensor-parallel-size {experts}"
    )
    case = {"flags": flags.split(), "steps": 0, "folder": str(tmp_path)}
    run_ranks(zygote, WORKER, {"cases": [case]}, ranks=2, folder=tmp_path / "ranks")
    names, sizes = [], []
    for path in sorted(tmp_path.glob("weights-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118 - no mapping
    assert len(names) == len(set(names)) and len(sizes) == 2
    if experts == 2:  # else a rank has experts that the other has not
        assert min(sizes) > max(sizes) / 3


def test_overlapping_gathers_leave_no_stale_weights(tmp_path: Path, zygote: Zygote) -> None:
    """The last step's weights are gathered in the next forward pass, which a checkpoint must not wait for."""
    folders = [tmp_path / "plain", tmp_path / "overlapped"]
    cases = [
        {"flags": flags.split(), "steps": 2, "folder": str(folder), "resume": True}
        for flags, folder in zip((PLAIN, f"{SPLIT} --ddp-bucket-size 500"), folders, strict=True)
    ]
    answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=tmp_path / "ranks")
    names = sorted(weight_names(folders[0]))
    assert names and names == sorted(weight_names(folders[1]))
    plain, overlapped = (read_tensors(folder, names) for folder in folders)
    for name in names:
        torch.testing.assert_close(overlapped[name], plain[name], rtol=0, atol=1e-7, msg=name)
    losses = [[step["lm_loss"] for step in answer["steps"]] for answer in answers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[1][2:4] == losses[1][4:]  # two more steps, and the same two from the checkpoint


def test_a_run_continues_with_and_without_overlap_bit_for_bit(tmp_path: Path, zygote: Zygote) -> None:
    flags = {"overlapped": SPLIT, "plain": PLAIN}
    first = [
        {"flags": each.split(), "steps": 4, "save_at": 2, "folder": str(tmp_path / name)}
        for name, each in flags.items()
    ]
    then = [
        {"flags": flags[other].split(), "first": 2, "steps": 2, "load": str(tmp_path / name)}
        for name, other in (("overlapped", "plain"), ("plain", "overlapped"))
    ]
    answers = run_ranks(zygote, WORKER, {"cases": first + then}, ranks=2, folder=tmp_path / "ranks")
    stayed, *others = (answer["steps"][-2:] for answer in answers)
    assert all(other == stayed for other in others)


def test_the_norm_of_all_weights_is_that_of_the_newest(tmp_path: Path, zygote: Zygote) -> None:
    """It is told at once, while the weights of the last step are still spread over the ranks."""
    more = "--log-params-norm --ddp-bucket-size 500"
    cases = [{"flags": f"{flags} {more}".split(), "steps": 2} for flags in (PLAIN, SPLIT)]
    plain, overlapped = (
        [step["params_norm"] for step in answer["steps"]]
        for answer in run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=tmp_path)
    )
    assert plain[0] != plain[1]
    assert overlapped == pytest.approx(plain, rel=1e-9)
