"""Likely causes of a difference between two runs: the most common faults of a distributed trainer, and how
they look.

These are guesses: the table of ``verify.differences`` shows that something is wrong, this module suggests
where to look first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, is_expert
from megatron_hyperrouter.verify.differences import Evidence, gradients


class RatioFit(NamedTuple):
    """How well ``factor`` x the reference's gradients fits a parameter's gradients: the remaining
    difference, relative to the largest gradient.
    """

    factor: float
    rest: float

    def wrong(self, tolerance: float) -> bool:
        """Not the reference's own gradients."""
        return abs(self.factor - 1) > tolerance or self.rest > tolerance

    def scaled(self, tolerance: float) -> bool:
        """A multiple of the reference's gradients, and not once."""
        return abs(self.factor - 1) > tolerance >= self.rest


def causes(found: Evidence, reference: Evidence, *, sizes: Mapping[str, int], tolerance: float) -> list[str]:
    """One sentence for each known fault that the differences resemble.

    ``sizes``: name of a parallel size (``EP``) -> ranks.  ``tolerance``: relative, of gradients that are the
    same.
    """
    return [
        *_frozen(found, reference),
        *_aux_loss(found, reference, sizes, tolerance),
        *_gradients(found, reference, sizes, tolerance),
    ]


def _frozen(found: Evidence, reference: Evidence) -> Iterator[str]:
    expected = {name: digest for rank in reference.routers for name, digest in rank.items()}
    guilty = [
        rank
        for rank, held in enumerate(found.routers)
        if any(expected.get(name) != digest for name, digest in held.items())
    ]
    if guilty:
        who = (
            "all ranks"
            if len(guilty) == len(found.routers) > 1
            else f"{'ranks' if len(guilty) > 1 else 'rank'} {', '.join(map(str, guilty))}"
        )
        yield (
            f"the frozen weights of the router (such as the hypernetwork) on {who} differ from those of the "
            "one-process run; perhaps the seeds differ, or the weights were not loaded"
        )


def _aux_loss(
    found: Evidence, reference: Evidence, sizes: Mapping[str, int], tolerance: float
) -> Iterator[str]:
    factors = [
        one["aux_loss"] / other["aux_loss"]
        for one, other in zip(found.steps, reference.steps, strict=True)
        if other["aux_loss"]
    ]
    if factors and abs(factors[0] - 1) > tolerance and max(factors) - min(factors) <= tolerance * factors[0]:
        yield f"the auxiliary loss is {_times(factors[0], sizes, tolerance)} that of the one-process run"


def _gradients(
    found: Evidence, reference: Evidence, sizes: Mapping[str, int], tolerance: float
) -> Iterator[str]:
    fits = {
        name: _fit(difference, expected, scale)
        for name, difference, expected, scale in gradients(found, reference)
    }
    wrong = {name for name, fit in fits.items() if fit.wrong(tolerance)}
    experts = {name for name in fits if is_expert(name)}
    # A fault in the last layers changes little else in its own step; experts without tokens have no gradient
    # to scale
    factors = [fits[name].factor for name in experts if fits[name].scaled(tolerance)]
    if factors and wrong <= experts and max(factors) - min(factors) <= tolerance * factors[0]:
        yield (
            "only the gradients of experts differ: they are "
            f"{_times(factors[0], sizes, tolerance)} those of the one-process run"
        )
    elif wrong == {WORD_EMBEDDINGS}:
        yield (
            "only the gradient of the embedding differs; perhaps it is not summed over all pipeline stages "
            "or ranks"
        )
    elif wrong and wrong == set(fits):
        every = [fit.factor for fit in fits.values()]
        if max(every) - min(every) <= tolerance * every[0]:
            yield f"all gradients are {_times(every[0], sizes, tolerance)} those of the one-process run"


def _fit(difference: Tensor, expected: Tensor, scale: float) -> RatioFit:
    square = float(expected.square().sum())
    off = float((difference * expected).sum()) / square if square else 0.0  # least squares
    return RatioFit(1 + off, float((difference - off * expected).abs().max()) / scale if scale else 0.0)


def _times(factor: float, sizes: Mapping[str, int], tolerance: float) -> str:
    """``2 times (EP = 2)``."""
    near = [
        f"{name} = {size}"
        for name, size in sizes.items()
        if size > 1 and abs(factor - size) <= tolerance * size
    ]
    near += [
        f"1 / {name}, where {name} = {size}"
        for name, size in sizes.items()
        if size > 1 and abs(factor * size - 1) <= tolerance
    ]
    return f"{factor:.4g} times" + (f" ({' or '.join(near)})" if near else "")
