"""Sizes of the models that ``step.py`` compares."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """The shape of a model and of its batch."""

    hidden: int = 256
    layers: int = 4
    experts: int = 16
    topk: int = 2
    width: int = 512  # of an expert
    heads: int = 4
    groups: int = 2  # key/value heads
    sequence: int = 256
    batch: int = 8
    vocabulary: int = 4096


CASES = {
    "few wide experts": Sizes(),
    "many small experts": Sizes(layers=2, experts=64, topk=8, width=128, batch=4),
}
TINY = {"tiny": Sizes(hidden=32, layers=1, experts=4, width=16, sequence=8, batch=2, vocabulary=64)}
