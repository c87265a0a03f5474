"""Whether a run is the same on another layout or engine: the names of layouts, and the differences between
two runs.

Nothing is trained here: each run has left its results in a folder (see :class:`Evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError, Problem

SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "zero": "zero_stage",
}
ONE_PROCESS: dict[str, object] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
}
STEP_NUMBERS = ("lm_loss", "aux_loss", "grad_norm")
# Gradients are measured by a first step of Adam.  Its epsilon is so large that gradients are not normalised:
# weight -= SCALE x gradient.  SCALE is so large that rounding to the precision of the weight does not matter.
SCALE = 2.0**20
DROWNING_EPSILON = 1e6
# gradients of a parameter that are all smaller than this share of the largest are compared with that share
GRADIENT_FLOOR = 1e-3
ROUNDED_SHARE = 1e-2  # of a weight, that is added to the path of its steps: float32 rounds it to 1e-5 of this


@dataclass(frozen=True)
class Tolerances:
    """Largest allowed relative differences. Those of weights are relative to the largest change that Adam can
    have made plus a hundredth of the weight.
    """

    numbers: float = 1e-5
    gradients: float = 1e-5
    weights: float = 1e-4


BFLOAT16_UNIT = 2.0**-7  # the step from 1 to the next number
# smallest and largest tolerance: if a part of a gradient is missing, the difference exceeds both
BFLOAT16_GRADIENTS = (
    2.0**-4,
    2.0**-2,
)


@dataclass(frozen=True)
class Layout:
    """How ``text`` (``tp=2,ep=2``) lays a run out: settings by flat name, ranks, and the fault to seed, if
    any.
    """

    text: str
    overrides: dict[str, object]
    ranks: int
    data_size: int  # ranks that read different samples
    stages: int
    fault: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)  # EP -> 2


@dataclass(frozen=True)
class Evidence:
    """The results of a run: ``steps``, a dictionary of numbers for each; ``routers``, for each rank
    {router: digest of its frozen part}.

    ``before`` and ``after`` are folders of weights around the step that measures gradients, ``last`` those
    after all ``steps``.
    """

    steps: Sequence[dict[str, float]]
    routers: Sequence[dict[str, str]]
    before: Path
    after: Path
    last: Path


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one number, and where it was seen."""

    number: str
    value: float
    tolerance: float
    where: str

    @property
    def ok(self) -> bool:
        """Within the tolerance; NaN is not."""
        return self.value <= self.tolerance


def in_bfloat16(rounding: Sequence[Difference]) -> Tolerances:
    """``rounding``: how the bfloat16 reference differs from the same run in float32.

    Both sides of a comparison are roundings of that float32 run, each in another order.  If bfloat16
    changes numbers by d, two such runs differ by at most 2 d.  Gradients of one expert change by more if
    rounded weights send it another token; layouts share those weights, so they stay within d (in a tiny
    GPT: 0.03 of 0.3 to 0.4).  A quarter still reveals a gradient that lacks a part, for any d.  Weights
    say little, because Adam takes a whole step for the sign of a gradient, even if the gradient is only
    rounding.
    """
    found = {difference.number: difference.value for difference in rounding}
    least, most = BFLOAT16_GRADIENTS
    return Tolerances(
        numbers=max(BFLOAT16_UNIT, 2 * max(found[number] for number in STEP_NUMBERS)),
        gradients=min(max(least, found["gradients"]), most),
        weights=1.5,  # of 2, a whole path in the wrong direction
    )


def parse_layout(text: str) -> Layout:
    """``tp=2,ep=2``: short names, ``dp``, or flat names of settings; raises ConfigError.

    As few ranks as the sizes need; TP brings sequence parallelism along, which experts need on both engines.
    """
    sizes: dict[str, int] = {}
    overrides: dict[str, object] = dict(ONE_PROCESS)
    fault = ""
    for word in filter(None, text.replace(" ", "").split(",")):
        key, equals, value = word.partition("=")
        if key == "fault":
            fault = value
        elif key in SHORT or key == "dp":
            least = 0 if key == "zero" else 1
            if not value.isdecimal() or int(value) < least:
                raise _bad_layout(
                    text, f"the value in {word} must be an integer of at least {least}, as in {key}=2"
                )
            if key in sizes:
                raise _bad_layout(text, f"{key} must have one value")
            sizes[key] = int(value)
            if key != "dp":
                overrides[SHORT[key]] = int(value)
        elif equals:
            overrides[key.replace("-", "_").lstrip("_")] = _typed(value)
        else:
            raise _bad_layout(
                text, f"{word} is not a size; use dp, {', '.join(SHORT)}, or a setting in the form name=value"
            )
    tensor, stages, context = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("cp", 1)
    if tensor > 1:
        overrides["sequence_parallel"] = True
    experts = sizes.get("ep", 1) * sizes.get("etp", tensor)
    ranks = stages * math.lcm(tensor * context * sizes.get("dp", 1), experts)
    data_size = ranks // (tensor * stages * context)
    named = {"TP": tensor, "PP": stages, "CP": context, "EP": sizes.get("ep", 1), "DP": data_size}
    return Layout(text or "1 process", overrides, ranks, data_size, stages, fault, named)


def _typed(value: str) -> object:
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    return words[value.lower()] if value.lower() in words else int(value) if value.isdecimal() else value


def _bad_layout(text: str, rule: str) -> ConfigError:
    return ConfigError([Problem("--layouts", text, rule, "write, for example, tp=2,ep=2 or pp=2,vpp=2")])


def samples_for(layouts: Sequence[Layout], micro_batch_size: int) -> int:
    """Samples of a global batch that all layouts can share: two micro-batches on each rank, or one for each
    stage.
    """
    return micro_batch_size * math.lcm(*(layout.data_size * math.lcm(2, layout.stages) for layout in layouts))


def compare(
    found: Evidence, reference: Evidence, *, config: RunConfig, allowed: Tolerances
) -> list[Difference]:
    """All differences of two runs, the largest of each number."""
    told = [_steps(number, found, reference, allowed.numbers) for number in STEP_NUMBERS]
    told_gradients = ((name, difference, scale) for name, difference, _, scale in gradients(found, reference))
    path = config.optimizer.lr * len(reference.steps)
    # A step that is small compared with its weight is rounded with the weight
    weights = (
        (name, one - other, path + ROUNDED_SHARE * float(other.abs().max()))
        for name, one, other in _pairs(found.last, reference.last)
    )
    return [
        *told,
        _worst("gradients", told_gradients, allowed.gradients),
        _worst("weights", weights, allowed.weights),
        _frozen_parts(found, reference),
    ]


def _steps(number: str, found: Evidence, reference: Evidence, tolerance: float) -> Difference:
    worst = Difference(number, 0.0, tolerance, "")
    for step, (one, other) in enumerate(zip(found.steps, reference.steps, strict=True), start=1):
        difference = abs(one[number] - other[number])
        value = difference / abs(other[number]) if difference and other[number] else difference
        if not value <= worst.value:  # not a number is the worst of all
            worst = Difference(
                number, value, tolerance, f"step {step}: {one[number]:.7g} instead of {other[number]:.7g}"
            )
    return worst


def gradients(found: Evidence, reference: Evidence) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(parameter, difference, the reference's gradients, what a difference is relative to), all of them times
    SCALE.
    """
    largest = 0.0
    for _, after, before in _pairs(reference.after, reference.before):
        largest = max(largest, float((before - after).abs().max()))
    steps = zip(_pairs(found.after, found.before), _pairs(reference.after, reference.before), strict=True)
    for (name, after, before), (_, reference_after, reference_before) in steps:
        expected = reference_before - reference_after
        yield (
            name,
            (before - after) - expected,
            expected,
            max(float(expected.abs().max()), GRADIENT_FLOOR * largest),
        )


def _worst(number: str, differences: Iterator[tuple[str, Tensor, float]], tolerance: float) -> Difference:
    """``differences``: (parameter, difference, what it is relative to)."""
    worst = Difference(number, 0.0, tolerance, "")
    for name, difference, scale in differences:
        largest = float(difference.abs().max())
        value = largest / scale if largest and scale else largest
        if not value <= worst.value:
            worst = Difference(number, value, tolerance, name)
    return worst


def _frozen_parts(found: Evidence, reference: Evidence) -> Difference:
    """How many ranks have another frozen part than the reference has."""
    expected = {name: digest for rank in reference.routers for name, digest in rank.items()}
    guilty = [
        f"rank {rank} has a different {name.rstrip('.')}"
        for rank, held in enumerate(found.routers)
        for name, digest in held.items()
        if expected.get(name) != digest
    ]
    ranks = {line.split(" has ")[0] for line in guilty}
    return Difference(
        "frozen parts",
        float(len(ranks)),
        0.0,
        "; ".join(guilty[:3]) + (f"; {len(guilty) - 3} more" if len(guilty) > 3 else ""),
    )


def _pairs(folder: Path, other: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor in ``folder``, tensor in ``other``) of all trained weights, one at a time, in float64."""
    names = sorted(weight_names(other))
    if weight_names(folder) != set(names):
        missing = sorted(weight_names(folder) ^ set(names))
        raise ValueError(f"{folder} and {other} have different parameters: {', '.join(missing[:5])}")
    for name in names:
        one, two = read_tensors(folder, [name])[name], read_tensors(other, [name])[name]
        if one.is_floating_point():  # not the seeds and hashes of routers
            yield name, one.double(), two.double()


def evidence(folder: Path, told: dict[str, Any]) -> Evidence:
    """The results of a worker, and the weights that it left in ``folder``."""
    return Evidence(told["steps"], told["routers"], folder / "before", folder / "after", folder / "last")


def check_names(layouts: Sequence[Layout]) -> None:
    """ConfigError for unknown names: an unknown fault would look like one that was not found, and a
    misspelt setting like one that is ruled out.
    """
    from megatron_hyperrouter.config.leaves import tree_leaves
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.verify.faults import FAULTS

    problems = []
    for layout in layouts:
        if layout.fault and layout.fault not in FAULTS:
            problems.append(
                Problem(
                    "--layouts",
                    layout.text,
                    f"{layout.fault} is not a fault",
                    (f"use one of the faults {', '.join(FAULTS)}"),
                )
            )
        for name in layout.overrides:
            if name not in tree_leaves() and not name.startswith("router."):
                remedy = "use tp, pp, vpp, cp, ep, etp, dp or zero, or a setting of mhr train"
                problems.append(Problem("--layouts", layout.text, f"{name} is not a setting", remedy))
    if problems:
        raise ConfigError(problems)
