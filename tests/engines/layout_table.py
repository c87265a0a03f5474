"""Runs a table of layouts, each in a few steps on the same tokens, and tells how far each is from one
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

WORKER = Path(__file__).with_name("layout_worker.py")
THREE = ("topk", "smoe_dropout", "hyper")
# k = 1, 2, 4 of 4 experts; Adam's epsilon keeps rounding noise in tiny gradients from becoming whole steps.
COMMON = (
    "--moe-router-topk 4 --topk-start 1 --topk-schedule multistep --topk-schedule-steps 3 --adam-eps 1e-4"
).split()
STEPS = 3
PROBED = 1  # gradients are told with the k of this step, 2
NUMBERS = ("lm_loss", "aux_loss", "z_loss", "grad_norm", "entropy", "load")
# Relative, but for weights: those move by up to 3e-3 in each step.  Gradients of a parameter are relative to
# the largest of them.
TOLERANCES = {**dict.fromkeys(NUMBERS, 1e-5), "gradients": 1e-5, "weights": 1e-6, "evaluations": 1e-5}


class Layout(NamedTuple):
    """Ranks, and the flags that lay the run out over them; ``settings``: other flags, which its reference has
    as well.
    """

    ranks: int
    flags: str = ""
    settings: str = ""


class Run(NamedTuple):
    """What a run told, and its folders: weights after the steps, and after one more that tells gradients."""

    told: dict[str, Any]
    weights: Path
    probed: Path


class Table(NamedTuple):
    """Runs by (router, name), and what each has to equal: one process of DeepSpeed, by (router, settings)."""

    layouts: dict[str, Layout]
    runs: dict[tuple[str, str], Run]
    references: dict[tuple[str, str], Run]

    def differences(self, router: str, name: str) -> dict[str, tuple[float, str]]:
        """number -> (largest difference from the reference, where)."""
        worst: dict[str, tuple[float, str]] = {}
        for number, value, where in _differences(
            self.runs[router, name], self.references[router, self.layouts[name].settings]
        ):
            if number not in worst or not value <= worst[number][0]:  # not a number is the worst of all
                worst[number] = value, where
        return worst


def run_table(
    zygote: Zygote, layouts: dict[str, Layout], routers: Iterable[str], root: Path, *, worker: Path = WORKER
) -> Table:
    """Every router in every layout; all that need as many ranks run in one start of those ranks.

    A router is its name, and after it flags of its own.
    """
    routers = list(routers)
    references = {
        (router, settings): f"{root}/reference-{place}-{number}"
        for place, router in enumerate(routers)
        for number, settings in enumerate(dict.fromkeys(layout.settings for layout in layouts.values()))
    }
    cases: list[tuple[int, dict[str, Any]]] = [
        (1, case_of(router, Layout(1, "", settings), folder, start=folder))
        for (router, settings), folder in references.items()
    ]
    keys = [(router, name) for router in routers for name in layouts]
    for router, name in keys:
        layout = layouts[name]
        folder = f"{root}/{len(cases)}"
        cases.append(
            (layout.ranks, case_of(router, layout, folder, start=references[router, layout.settings]))
        )
    told: dict[int, Run] = {}
    for ranks in sorted({ranks for ranks, _ in cases}):  # the references come first
        numbers = [number for number, (needed, _) in enumerate(cases) if needed == ranks]
        task = {"cases": [cases[number][1] for number in numbers]}
        answers = run_ranks(zygote, worker, task, ranks=ranks, folder=root / f"ranks{ranks}", timeout=900)
        for number, answer in zip(numbers, answers, strict=True):
            folder = Path(cases[number][1]["folder"])
            told[number] = Run(answer, folder, folder / "probed")
    runs = [told[number] for number in range(len(cases))]
    return Table(
        layouts,
        dict(zip(keys, runs[len(references) :], strict=True)),
        dict(zip(references, runs, strict=False)),
    )


def same_runs(layouts: dict[str, Layout], routers: Iterable[str] = THREE) -> tuple[Any, Callable[..., None]]:
    """A module's fixture ``table`` of every router in every layout, and the test that each of them is the run
    of one process.
    """
    routers = list(routers)

    @pytest.fixture(scope="module", name="table")
    def fixture(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
        return run_table(zygote, layouts, routers, tmp_path_factory.mktemp("layouts"))

    @pytest.mark.parametrize("layout", layouts)
    @pytest.mark.parametrize("router", routers)
    def test(table: Table, router: str, layout: str, record_property: Callable[[str, object], None]) -> None:
        assert_same_run(table, router, layout, record_property)

    return fixture, test


def case_of(router: str, layout: Layout, folder: str, *, start: str) -> dict[str, Any]:
    """``start``: weights at which gradients are told, the same for all that are compared."""
    return {
        "flags": ["--router.name", *router.split(), *COMMON, *layout.settings.split(), *layout.flags.split()],
        "steps": STEPS,
        "folder": folder,
        "topk_eval": [1, 3],
        "probe": {"start": start, "step": PROBED},
    }


def assert_same_run(table: Table, router: str, name: str, record: Any) -> None:
    """Everything within its tolerance; ``record``: pytest's ``record_property``, for tables made of a JUnit
    file.
    """
    found = table.differences(router, name)
    record("differences", {number: value for number, (value, _) in found.items()})
    assert set(found) == set(TOLERANCES)
    beyond = {number: told for number, told in found.items() if not told[0] <= TOLERANCES[number]}
    assert beyond == {}, beyond


def gradients(run: Run, start: Path) -> dict[str, torch.Tensor]:
    """Global name -> SCALE times the clipped gradient at the weights in ``start``, float64."""
    names = sorted(weight_names(run.probed))
    after, before = read_tensors(run.probed, names), read_tensors(start, names)
    return {
        name: before[name].double() - after[name].double()
        for name in names
        if before[name].is_floating_point()
    }


def _differences(found: Run, expected: Run) -> Iterator[tuple[str, float, str]]:
    for step, (one, other) in enumerate(zip(found.told["steps"], expected.told["steps"], strict=True)):
        for number in NUMBERS:
            yield number, relative(one[number], other[number]), f"step {step}"
    # Each data-parallel rank evaluates micro-batches of its own, and all of them together the same tokens.
    for topk, loss in expected.told["evaluations"].items():
        yield "evaluations", relative(found.told["evaluations"][topk], loss), f"k = {topk}"
    names = weight_names(expected.weights)
    assert weight_names(found.weights) == names
    weights, others = read_tensors(found.weights, names), read_tensors(expected.weights, names)
    for name in names:
        yield "weights", float((weights[name].double() - others[name].double()).abs().max()), name
    own, wanted = gradients(found, expected.weights), gradients(expected, expected.weights)
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # A bias is one column of its layer's affine map: tokens may cancel in it to a thousandth of the
        # others, their rounding does not.
        scale = wanted[name.removesuffix("bias") + "weight"] if name.endswith(".bias") else gradient
        yield "gradients", float((own[name] - gradient).abs().max() / scale.abs().max()), name


def relative(found: float | list[float], expected: float | list[float]) -> float:
    if isinstance(found, list) and isinstance(expected, list):
        return max(relative(one, other) for one, other in zip(found, expected, strict=True))
    assert isinstance(found, float | int) and isinstance(expected, float | int)
    return 0.0 if found == expected else abs(found - expected) / abs(expected) if expected else math.inf
