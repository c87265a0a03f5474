"""A run that stops on one layout and continues on another equals a run that stayed, on both engines.

Each source trains three steps, saves, and takes three more; each target loads what was saved, takes the same
three steps, and then tells its gradients at the weights that were saved.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import relative
from program.launched import Zygote
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hyperrouter.checkpoint.optimizer import INDEX
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

WORKER = Path(__file__).with_name("layout_worker.py")
SAVED, LAST, PROBED = 3, 6, 3
NUMBERS = ("lm_loss", "aux_loss", "z_loss", "grad_norm", "entropy", "load")
TP2, EP2, PP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "expert", "pipeline"))
MEGATRON, DISTRIBUTED = "--engine megatron", "--engine megatron --use-distributed-optimizer"
SP, ETP1 = "--sequence-parallel", "--sequence-parallel --expert-tensor-parallel-size 1"
# name -> ranks, flags
LAYOUTS = {
    "ds 1 zero0": (1, "--zero-stage 0"),
    "ds 1": (1, ""),
    "ds ep2": (2, EP2),
    "ds ep2 zero2": (2, f"{EP2} --zero-stage 2"),
    "ds dp2 zero0": (2, "--zero-stage 0"),
    "ds pp2": (2, PP2),
    "ds tp2": (2, TP2),
    "ds tp2 ep2 etp1": (2, f"{TP2} {EP2} {ETP1}"),
    "ds tp2 ep2": (4, f"{TP2} {EP2}"),
    "ds pp2 ep2": (4, f"{PP2} {EP2}"),
    "m 1": (1, MEGATRON),
    "m 1 dist": (1, DISTRIBUTED),
    "m dp2": (2, MEGATRON),
    "m dp2 dist": (2, DISTRIBUTED),
    "m ep2 dist": (2, f"{DISTRIBUTED} {EP2}"),
    "m pp2 vpp2": (2, f"{MEGATRON} {PP2} --virtual-pipeline-model-parallel-size 2"),
    "m pp2 dist": (2, f"{DISTRIBUTED} {PP2}"),
    "m cp2 dist": (2, f"{DISTRIBUTED} --context-parallel-size 2"),
    "m tp2 etp1": (2, f"{MEGATRON} {TP2} {ETP1}"),
    "m tp2 ep2 dist": (4, f"{DISTRIBUTED} {TP2} {EP2} {SP}"),
    "m tp2 pp2": (4, f"{MEGATRON} {TP2} {PP2} {SP}"),
    "ds ep2 grouped": (2, f"{EP2} --moe-grouped-gemm"),
    "m ep2 grouped": (2, f"{DISTRIBUTED} {EP2} --moe-grouped-gemm"),
}
# Options that bring what the routers remember into the few steps of a test.
SETTINGS = {
    "hyper": "--router.name hyper",
    "bf16": "--router.name hyper --bf16",
    "stablemoe": "--router.name stablemoe --router.stage1-steps 2 --moe-router-topk 2",
    "competesmoe": "--router.name competesmoe --router.rate 0.6 --router.warm-up 0 --moe-router-topk 2 "
    "--router.max-competing 1 --router.router-coeff 0.5",
    "simsmoe": "--router.name simsmoe --router.frequency 0.15 --router.threshold 0 --moe-router-topk 2 "
    "--router.similarity-coeff 0.1",
}


class At(NamedTuple):
    """Settings, and the layout of the ranks."""

    settings: str
    layout: str

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def flags(self) -> list[str]:
        return ["--num-layers", "4", *SETTINGS[self.settings].split(), *LAYOUTS[self.layout][1].split()]

    def folder(self, root: Path) -> Path:
        return root / f"{self.settings}-{self.layout}".replace(" ", "_")


class Told(NamedTuple):
    """What one run told, and the folder of its weights; ``read``: bytes read / bytes held."""

    steps: list[dict[str, Any]]
    read: float
    folder: Path


Key = tuple[At, At | str]  # source, target; or what else was done with what the source had saved
STAYED, CONTROL = "stayed", "weights alone"


def run_moves(zygote: Zygote, root: Path, moves: list[Key], damages: dict[str, Damage] | None = None) -> Runs:
    """The sources of all moves first, and then every move and every damaged copy of the first source."""
    sources = list(dict.fromkeys(source for source, _ in moves))
    first = [((source, STAYED), _case(source, steps=LAST, save_at=SAVED)) for source in sources]
    for (source, _), case in first:
        case["folder"] = str(source.folder(root))
    found = _run(zygote, root / "sources", first)
    second: list[tuple[Key, dict[str, Any]]] = []
    for number, (source, target) in enumerate(moves):
        saved, layout = str(source.folder(root)), target if isinstance(target, At) else At("hyper", "m 1")
        case = _case(layout, first=SAVED, steps=LAST - SAVED, folder=f"{root}/moved-{number}")
        if target == CONTROL:
            case["load_weights"] = saved
        else:
            case |= {"load": saved, "probe": {"start": saved, "step": PROBED, "whole": True}}
        second.append(((source, target), case))
    for name, damage in (damages or {}).items():
        copy = root / name.replace(" ", "_")
        shutil.copytree(sources[0].folder(root), copy)
        damage(copy)
        case = _case(At(sources[0].settings, "m 1"), load=str(copy), refused=True, folder=str(copy))
        second.append(((sources[0], name), case))
    return found | _run(zygote, root / "targets", second)


Runs = dict[Key, Told]
Damage = Callable[[Path], None]


def _case(at: At, **more: Any) -> dict[str, Any]:
    return {"ranks": at.ranks, "flags": at.flags, **more}


def _run(zygote: Zygote, root: Path, cases: list[tuple[Key, dict[str, Any]]]) -> Runs:
    found = {}
    for ranks in sorted({case["ranks"] for _, case in cases}):
        wave = [(key, case) for key, case in cases if case["ranks"] == ranks]
        task = {"cases": [case for _, case in wave]}
        answers = run_ranks(zygote, WORKER, task, ranks=ranks, folder=root / f"ranks{ranks}", timeout=1800)
        for (key, case), answer in zip(wave, answers, strict=True):
            found[key] = Told(answer["steps"], answer.get("read") or 0.0, Path(case["folder"]))
    return found


def differences(runs: Runs, source: At, target: At | str) -> dict[str, float]:
    """The largest relative difference of each number from the run that stayed."""
    stayed, moved = runs[source, STAYED], runs[source, target]
    steps = list(zip(moved.steps, stayed.steps[SAVED:], strict=True))
    worst = {number: max(relative(one[number], other[number]) for one, other in steps) for number in NUMBERS}
    if (moved.folder / "probed").exists() and (own := runs.get((source, source))) is not None:
        worst["gradients"] = max(_gradient_differences(moved, own, stayed.folder))
    return worst


def _gradient_differences(moved: Told, own: Told, start: Path) -> Iterator[float]:
    """For each parameter, relative to the largest gradient of it; a bias to that of its matrix."""
    names = weight_names(own.folder / "probed")
    before, found, wanted = (
        {name: tensor.double() for name, tensor in read_tensors(folder, names).items()}
        for folder in (start, moved.folder / "probed", own.folder / "probed")
    )
    for name, tensor in before.items():
        size = (tensor - wanted[name]).abs().max()
        if size > 0:
            yield float((found[name] - wanted[name]).abs().max() / size)


# ------------------------------------------------------------------------------------------------------------
# what can be wrong with a checkpoint
def _experts(folder: Path, end: str) -> tuple[Path, dict[str, Tensor], list[str]]:
    path = folder / "optimizer-00000.safetensors"
    tensors = load_file(path)
    return path, tensors, sorted(key for key in tensors if "local_experts" in key and key.endswith(end))


def flip_a_bit(folder: Path) -> None:
    path, tensors, (key, *_) = _experts(folder, "#exp_avg")
    tensors[key].view(-1).view(torch.int32)[3] ^= 1
    save_file(tensors, path)


def flip_a_bit_of_a_weight(folder: Path) -> None:
    path = folder / "weights-00000.safetensors"
    tensors = load_file(path)
    key = min(key for key in tensors if "local_experts" in key)
    tensors[key].view(-1).view(torch.int32)[3] ^= 1
    save_file(tensors, path)


def exchange_numbers(folder: Path) -> None:
    path, tensors, (key, *_) = _experts(folder, "#exp_avg")
    flat = tensors[key].view(-1)
    flat[[1, 2]] = flat[[2, 1]]
    save_file(tensors, path)


def exchange_experts(folder: Path) -> None:
    path, tensors, keys = _experts(folder, "#exp_avg")
    one = keys[0]
    other = next(
        key for key in keys[1:] if key[-25:] == one[-25:] and tensors[key].shape == tensors[one].shape
    )
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, path)


def exchange_moments(folder: Path) -> None:
    path, tensors, (key, *_) = _experts(folder, "#exp_avg")
    tensors[key], tensors[f"{key}_sq"] = tensors[f"{key}_sq"], tensors[key]
    save_file(tensors, path)


def leave_out_an_expert(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index[min(name for name in index if "local_experts" in name)]["boxes"] = []
    (folder / INDEX).write_text(json.dumps(index))


def leave_out_a_file(folder: Path) -> None:
    (folder / "optimizer-00001.safetensors").unlink()


EXPERT = r"decoder\.layers\.\d+\.mlp\.experts\.local_experts\.\d+\.linear_fc\d\.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "one bit of a moment": (flip_a_bit, rf"exp_avg of {EXPERT} has changed since the checkpoint was saved"),
    "one bit of a weight": (
        flip_a_bit_of_a_weight,
        rf"weight of {EXPERT} has changed since the checkpoint was saved",
    ),
    "two numbers exchanged": (
        exchange_numbers,
        rf"exp_avg of {EXPERT} has changed since the checkpoint was saved",
    ),
    "two experts exchanged": (
        exchange_experts,
        rf"exp_avg of {EXPERT} has changed since the checkpoint was saved",
    ),
    "two moments exchanged": (
        exchange_moments,
        rf"exp_avg(_sq)? of {EXPERT} has changed since the checkpoint was saved",
    ),
    "an expert left out": (leave_out_an_expert, rf"{EXPERT}: \d+ of \d+ values are missing"),
    "a file left out": (leave_out_a_file, r"optimizer-00001\.safetensors cannot be read"),
}

# ------------------------------------------------------------------------------------------------------------
# the tests
SOURCES = [At("hyper", "m tp2 ep2 dist"), At("hyper", "ds tp2 ep2")]
TARGETS = [
    *(source.layout for source in SOURCES),
    *("ds 1 zero0", "ds pp2 ep2", "ds ep2 zero2", "m pp2 vpp2", "m cp2 dist", "m tp2 pp2"),
]
GROUPED = [At("hyper", "ds ep2 grouped"), At("hyper", "m ep2 grouped")]
MATRIX: list[Key] = [
    *((source, At("hyper", target)) for source in SOURCES for target in TARGETS),
    # One parameter has the matrices of several experts.
    *zip(SOURCES, GROUPED, strict=True),
    *((source, target) for source in GROUPED for target in (source, At("hyper", "m 1 dist"))),
]
ROUTERS: list[Key] = [
    (At(name, source), At(name, target))
    for name, source, target in (
        ("stablemoe", "ds ep2 zero2", "m dp2 dist"),
        ("stablemoe", "ds dp2 zero0", "ds ep2"),
        ("competesmoe", "ds ep2", "m dp2 dist"),
        ("simsmoe", "m ep2 dist", "ds dp2 zero0"),
    )
]
BF16 = [At("bf16", "m ep2 dist"), At("bf16", "ds ep2")]
MIXED: list[Key] = [
    *((source, target) for source in BF16 for target in BF16),
    (BF16[0], At("hyper", "ds ep2")),
    (BF16[1], At("hyper", "m dp2 dist")),
    (At("hyper", "ds ep2 zero2"), BF16[0]),
]


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    moves: list[Key] = [*MATRIX, (SOURCES[0], CONTROL), *ROUTERS, *MIXED]
    damages = {name: damage for name, (damage, _) in DAMAGES.items()}
    return run_moves(zygote, tmp_path_factory.mktemp("moves"), moves, damages)


def _id(value: object) -> str:
    return " ".join(value) if isinstance(value, At) else str(value)


@pytest.mark.parametrize(("source", "target"), MATRIX, ids=_id)
def test_every_layout_continues_the_run(
    runs: Runs, source: At, target: At, record_property: Callable[[str, object], None]
) -> None:
    worst = differences(runs, source, target)
    record_property("differences", worst)
    assert set(worst) == {*NUMBERS, "gradients"}
    allowed = 0.0 if source == target else 1e-5
    assert all(value <= allowed for value in worst.values()), worst


def test_the_moments_count(runs: Runs) -> None:
    """What the table would show if a move lost them."""
    worst = differences(runs, SOURCES[0], CONTROL)
    assert worst["lm_loss"] > 1e-3 and worst["grad_norm"] > 1e-3, worst


@pytest.mark.parametrize(("source", "target"), ROUTERS, ids=_id)
def test_what_routers_remember_moves(runs: Runs, source: At, target: At) -> None:
    worst = differences(runs, source, target)
    assert all(value <= 1e-5 for value in worst.values()), worst


@pytest.mark.parametrize(("source", "target"), MIXED, ids=_id)
def test_bfloat16_moves_as_far_as_layouts_differ(runs: Runs, source: At, target: At) -> None:
    worst = differences(runs, source, target)
    if source == target:
        assert not any(worst.values()), worst
        return
    # What rounding makes of two layouts where nothing moves, in the steps before the save.
    one, other = (runs[at, STAYED].steps[:SAVED] for at in BF16)
    apart = max(relative(step["lm_loss"], wanted["lm_loss"]) for step, wanted in zip(one, other, strict=True))
    assert worst["lm_loss"] <= max(2 * apart, 2e-4) and worst["grad_norm"] <= 1e-2, (worst, apart)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(runs: Runs, damage: str) -> None:
    (told,) = runs[SOURCES[0], damage].steps
    pattern = DAMAGES[damage][1]
    assert isinstance(told["refused"], str), f"it was loaded, {told['refused']} of its share"
    assert re.search(pattern, told["refused"]), told["refused"]


def test_every_rank_reads_its_share(runs: Runs) -> None:
    shares = {
        (source, target): told.read
        for (source, target), told in runs.items()
        if isinstance(target, At) and target.settings == source.settings  # else the numbers have other sizes
    }
    assert shares and all(0.9 <= share <= 1.1 for share in shares.values()), shares


@pytest.mark.parametrize("source", SOURCES, ids=_id)
def test_every_rank_writes_its_share(runs: Runs, source: At) -> None:
    folder = runs[source, STAYED].folder
    for pattern in ("weights-*", "optimizer-*"):
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        assert len(sizes) == source.ranks and max(sizes) <= 1.25 * sum(sizes) / source.ranks, (pattern, sizes)


EVERY: list[Key] = [
    (At("hyper", source), At("hyper", target))
    for source in ("m tp2 ep2 dist", "ds tp2 ep2", "ds ep2 zero2", "m pp2 vpp2")
    for target in list(LAYOUTS)[:21]
]


@pytest.mark.by_hand
def test_all_moves(zygote: Zygote, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """84 of them: pytest -m by_hand."""
    found = run_moves(zygote, tmp_path, EVERY)
    worst = {
        f"{_id(one)} -> {_id(other)}": differences(found, one, other)
        for one, other in EVERY
        if isinstance(other, At)
    }
    record_property("differences", worst)
    (tmp_path / "differences.json").write_text(json.dumps(worst, indent=1))
    assert len(worst) == 84
    for (source, target), told in zip(EVERY, worst.values(), strict=True):
        allowed = 0.0 if source == target else 1e-5
        assert all(value <= allowed for value in told.values()), (source, target, told)
