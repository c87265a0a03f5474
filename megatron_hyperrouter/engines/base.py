"""What the training loop needs from an engine; each host implements it in a separate room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

GIVE_UP = 1 << 20  # as an answer of ``stop``: more than all ranks together that ask to stop after the step
Batch = tuple[Tensor, Tensor]  # tokens_BS, labels_BS: int64, labels are the tokens shifted by one


@dataclass(frozen=True)
class RankPlace:
    """The position of this process among all ranks."""

    rank: int
    world_size: int
    data_rank: int  # among the ranks that read different samples
    data_size: int

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes metrics."""
        return self.rank == 0


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step, the same on every rank, already reduced over the global batch."""

    lm_loss: float  # nats per token
    # load-balancing loss before its coefficient, mean over layers and micro-batches (1 when uniform)
    aux_loss: float
    z_loss: float  # router z-loss before its coefficient, mean over layers and micro-batches
    grad_norm: float  # before clipping
    layers: Mapping[str, tuple[float, ...]]  # by name, of each MoE layer: engines.statistics.LAYER_METRICS
    stop: bool  # some rank was asked to stop
    peak_memory: int  # bytes, the largest of the ranks
    data_waits: tuple[float, ...] = ()  # seconds in which each rank waited for its batches
    # seconds that each rank took for a piece of work that is the same on all ranks; 0: not known
    compute_times: tuple[float, ...] = ()
    seconds: float = 0.0  # since the step before, by the clock of rank 0; 0 in the first one
    moe_layers: tuple[int, ...] | None = None  # their numbers in the model, from 1; None: all layers
    params_norm: float | None = None  # of all trained parameters; None: not asked for
    num_zeros: int | None = None  # of the gradient; None: not asked for, or not known
    applied: bool = True  # False: the step was left out, and the weights are as before
    give_up: bool = False  # some rank asks to leave this step out and to stop


@dataclass(frozen=True)
class EvalResult:
    """Sums over the tokens of an evaluation, the same on every rank."""

    loss_sum: float  # nats
    tokens: int
    target_bytes: int  # UTF-8 bytes of the target tokens; 0 if the tokenizer does not know them


class Staged(Protocol):
    """A checkpoint of one rank that was copied but not yet written; a thread may write it."""

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files; returns those that the checkpoint keeps."""
        ...

    def join(self, folder: Path) -> None:
        """Finish the folder; the main rank calls it after all ranks have written."""
        ...


@dataclass(frozen=True)
class OwnPart:
    """One rank's results for its own micro-batches in a step that was run twice."""

    rank: int
    host: str
    device: str
    losses: tuple[float, float]  # nats, summed over its tokens, of the first run and of the second
    bad_gradient: str  # of the second run: the first weight with a gradient that is not finite; or ""


@dataclass(frozen=True)
class Deviation:
    """A weight, or a part of one, whose bits differ between ranks that should have the same bits."""

    name: str  # global
    ranks: tuple[tuple[int, str], ...]  # (rank, host) of those that deviate
    others: tuple[tuple[int, str], ...]  # (rank, host) of those that agree with each other
    sure: bool  # False if it is one against one: either may be wrong


class Engine(Protocol):
    """A host that trains the model; ``step`` counts completed optimizer steps."""

    place: RankPlace
    patience: float  # seconds that a collective waits for other ranks unless wait_at_most says otherwise

    def topk_at(self, step: int) -> int:
        """Active experts k after ``step`` completed steps: the k with which step ``step + 1`` trains."""
        ...

    def train_step(
        self,
        batches: Iterator[Batch],
        *,
        step: int,
        learning_rate: float,
        stop: Callable[[], int] = lambda: False,
        accept: Callable[[StepResult], bool] = lambda result: True,
        detailed: bool = True,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches of the global batch.

        ``stop`` is called when the rank has done its work.  It returns whether the run should stop after
        this step, or, with ``GIVE_UP``, before the weights change; ``accept`` then decides.  ``accept`` is
        called before the optimizer.  If it returns False (on all ranks), weights, optimizer and random
        state stay as they were before the step.  ``detailed`` (the same on all ranks): whether the result
        has the layer metrics of ``engines.statistics.DETAILS``.
        """
        ...

    def again(self) -> tuple[StepResult, list[OwnPart]]:
        """Run the last step's micro-batches once more in the same way, without an update (collective);
        also returns the results of each rank.  Call it after a step that was not accepted.
        """
        ...

    def leave_out(self, step: int, stop: Callable[[], int]) -> bool:
        """Skip step ``step + 1`` (collective); returns whether some rank was asked to stop."""
        ...

    def evaluate(
        self, batches: Iterator[Batch], *, topk: int, token_bytes_V: Tensor | None = None
    ) -> EvalResult:
        """Loss of this rank's batches with ``topk`` active experts, summed over all ranks; changes
        nothing.

        Every rank has the same number of batches.  ``token_bytes_V``: number of UTF-8 bytes of each token
        id.
        """
        ...

    @property
    def routers(self) -> Mapping[str, Any]:
        """The routers on this rank by the global name of their layer."""
        ...

    def logits(self, tokens_BS: Tensor, *, topk: int) -> Tensor:
        """Logits ``_BSV`` (padded vocabulary) of this rank's samples with ``topk`` active experts, which drop
        no token; changes nothing (collective).
        """
        ...

    def expert_similarity(self, tokens_BS: Tensor, *, topk: int) -> dict[int, float]:
        """Layer number -> mean linear CKA of neighbouring experts for these tokens, which are the same on
        every rank (collective). Changes nothing, and omits layers for which it is unknown.
        """
        ...

    def stage(self) -> Staged:
        """Copy what :meth:`save` writes to CPU memory, where the next steps do not change it.  Every rank
        calls it, and does not call it again before the copy is written.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and random state to ``folder``; every rank calls
        it.
        """
        ...

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """Read what :meth:`save` wrote."""
        ...

    def deviations(self) -> list[Deviation]:
        """The weights whose bits differ between the ranks that have them (collective)."""
        ...

    def set_aux_loss_coeff(self, value: float) -> None:
        """Set the coefficient of the routers' load-balancing loss from the next step on."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights of the model, by global name, the same on any layout (collective)."""
        ...

    def wait_at_most(self, seconds: float) -> None:
        """Set the time limit of every collective of every process group from now on."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one."""
        ...

    def first_word(self, word: str) -> str:
        """On all ranks, the word of the first rank that has one; empty if none has."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...
