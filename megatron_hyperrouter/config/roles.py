"""The purpose of a setting.  Each leaf of the tree has one role, and every list of settings is made from
roles.

A new setting needs no other entry: its role decides whether a checkpoint must agree with it, whether an
evaluation needs it, whether the other engine refuses it, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Role(Enum):
    """What changes when the setting changes."""

    SHAPE = "the shapes of the weights"
    FUNCTION = "what the weights compute"
    TOKENIZER = "what the token ids mean"
    INITIAL = "the initial weights"
    DATA = "which tokens are read"
    ORDER = "the order of the samples"
    BATCH = "the samples of one step"
    COURSE = "the course of training"
    SCHEDULE = "what changes from step to step"
    NOISE = "random draws during training"
    PRECISION = "the number format"
    ENGINE = "which engine trains"
    LAYOUT = "how the work is spread over the ranks"
    SHARDING = "how optimizer state and frozen weights are spread over the ranks"
    SPEED = "how the same numbers are computed"
    PORTION = "how much is read or computed at a time"
    UPKEEP = "evaluations and checkpoints during training"
    START = "where the run starts from"
    PLACE = "where files are"
    DISPLAY = "what is shown"


@dataclass(frozen=True)
class Only:
    """The setting belongs to one engine; the other one refuses it with this remedy.

    ``harmless``: it changes how fast the same numbers are computed, so the other engine warns.
    """

    engine: Literal["deepspeed", "megatron"]
    remedy: str = "leave out FLAG"
    harmless: str = ""  # what the other engine does instead


@dataclass(frozen=True)
class Quiet:
    """The value with which the setting does nothing, where that is not its default."""

    value: object


@dataclass(frozen=True)
class IsPath:
    """The text names a file or a folder: ``~`` and ``$VARIABLE`` in it are expanded."""

    metavar: str


FILE, FOLDER, PREFIX = IsPath("FILE"), IsPath("DIR"), IsPath("PREFIX")


@dataclass(frozen=True)
class Metavar:
    """The name of the value in ``--help``, where the type alone (``N``, ``X``, ``TEXT``) says too little."""

    words: str  # one word, or one for each value of a flag that takes a fixed number of them
