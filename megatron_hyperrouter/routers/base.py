"""What a router is: its result, its registry, and the steps that every method shares.

Legend: ``T`` tokens on this rank, ``D`` hidden size, ``E`` experts of the whole model, ``K`` active
experts. Words: *logits* are raw scores ``_TE``; *weights* multiply expert outputs ``_TK``; *experts* are
chosen ids ``_TK``; *load* is the number of tokens of each expert ``_E``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from annotated_types import Gt
from torch import Tensor, nn

from megatron_hyperrouter.config.kinds import Count
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.balance import switch_loss, z_loss
from megatron_hyperrouter.ops.linear import float32_maths
from megatron_hyperrouter.ops.topk import Groups, best_experts, topk_softmax, whole

ROUTERS: dict[str, type[Router]] = {}


class Routing(NamedTuple):
    """The decision of a router for the tokens of one micro-batch on one rank."""

    logits_TE: Tensor  # float32
    weights_TK: Tensor  # float32; a row sums to 1 unless the method says otherwise
    experts_TK: Tensor  # int64 ids of experts in the whole model
    losses: dict[str, Tensor]  # name -> scalar, already multiplied by its coefficient


class ExpertBank(Protocol):
    """The only access of routers to experts, which may be on other ranks; each engine implements it."""

    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """``score`` (``[..., D]`` to ``[...]``) of every expert's output for every token of this rank:
        float32, no gradient.

        Collective over the ranks that share the experts.  Outputs stay on the ranks that compute them;
        only scores are sent.
        """


class DataRanks(Protocol):
    """The data-parallel ranks that divide a router's frozen part.  Each of them runs the same passes in the
    same order, and the engine sums the gradients of a router's parameters over them.
    """

    rank: int
    size: int

    def gather(self, part: Tensor) -> Tensor:
        """The tensors of all ranks, stacked rank by rank (collective)."""

    def sum_of_own(self, parts: Tensor) -> Tensor:
        """The sum of what all ranks have for this one; ``parts[r]`` is for rank r (collective)."""


class Tokens(NamedTuple):
    """What an engine knows about the tokens of a micro-batch in addition to their vectors, in the order of
    ``x_TD``.
    """

    ids_T: Tensor  # int64, ids of the vocabulary
    # int64, sample * seq_length + position, counted over the global batch: the same on every layout
    places_T: Tensor
    seq_length: int
    sequences: int | None = None  # in the micro-batch; None: to be read from the places


class RunFacts(NamedTuple):
    """What a router may know about the run, beyond its own layer."""

    num_layers: int = 1  # of the whole model
    train_iters: int = 1000  # optimizer steps of the run
    vocab_size: int = 256  # token ids
    data_ranks: DataRanks | None = None  # those that divide a frozen part; None: this rank has all of it


class Pass(NamedTuple):
    """One pass of a micro-batch through a router."""

    step: int  # completed optimizer steps
    k: int
    # the module's mode, so that the first pass of activation checkpointing (no gradients) and the second
    # agree
    training: bool
    tokens: Tokens | None = None
    experts: ExpertBank | None = None


class StepCounts(NamedTuple):
    """Counts of one layer's router in an optimizer step: sums over the global batch, the same on every
    rank.
    """

    step: int  # completed optimizer steps, this one included
    tokens: float
    load_E: Tensor  # float64 routes to each expert
    extra: Tensor  # float64 sums of :meth:`Router.extra_counts`


class Router(nn.Module):
    """A router for one layer: the base class of all routers.  It needs no process group, GPU or engine.

    To write your own router, derive a class: ``class Mine(Router, name="mine")``.  Its constructor creates
    the parameters and then calls ``self.reset()``.  ``forward`` must not change any state, so that
    activation checkpointing may repeat it.
    """

    name: ClassVar[str]
    needs_experts: ClassVar[bool] = (
        False  # True: ``refine`` consults an ExpertBank, or ``combine`` the experts' outputs
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the method; each becomes ``--router.OPTION``.  Every router has the options in this
        class.
        """

        num_groups: Annotated[
            Count | None,
            "Split the experts into N groups of equal size; each token chooses its experts from "
            "--router.group-topk of these groups; default: no groups",
        ] = None
        group_topk: Annotated[
            Count | None,
            "With --router.num-groups: number of groups from which each token chooses its experts",
        ] = None
        scaling_factor: Annotated[
            float,
            Gt(0.0),
            "Multiply the routing weights of the chosen experts by X (DeepSeek-V2, DeepSeek-V3)",
        ] = 1.0
        lr_mult: Annotated[
            float,
            Gt(0.0),
            Role.COURSE,
            "Multiply the learning rate of the router's trainable parameters by X",
        ] = 1.0

        def initial_logit_std(self, hidden_size: int) -> float | None:
            """Standard deviation of the logits at the start, for inputs of unit variance; None: not known."""
            std: float | None = getattr(self, "init_std", None)
            return None if std is None else std * math.sqrt(hidden_size)

        @property
        def groups(self) -> Groups | None:
            """The groups that limit a token's choice; None: a token may choose any expert."""
            if self.num_groups is None or self.group_topk is None or self.group_topk >= self.num_groups:
                return None
            return Groups(self.num_groups, self.group_topk)

        def largest_topk(self, num_experts: int) -> int:
            """Largest number of experts that a token can have."""
            groups = self.groups
            return num_experts if groups is None else groups.chosen * (num_experts // groups.total)

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """Problems of these options for a model of this size, in addition to the rules on each value.

            A method with more rules yields these as well: ``yield from super().problems(...)``.
            """
            if (self.num_groups is None) != (self.group_topk is None):
                given, other = (
                    ("num_groups", "group_topk") if self.group_topk is None else ("group_topk", "num_groups")
                )
                flag, needed = (f"--router.{name.replace('_', '-')}" for name in (given, other))
                yield Problem(
                    flag, getattr(self, given), f"needs {needed}", (f"add {needed}, or leave out both")
                )
            elif self.num_groups is not None and self.group_topk is not None:
                if num_experts % self.num_groups:
                    rule = f"must divide --num-experts = {num_experts}"
                    remedy = f"use a divisor of {num_experts}"
                    yield Problem("--router.num-groups", self.num_groups, rule, remedy)
                if self.group_topk > self.num_groups:
                    rule = f"must be at most --router.num-groups = {self.num_groups}"
                    remedy = f"use at most {self.num_groups}"
                    yield Problem("--router.group-topk", self.group_topk, rule, remedy)

        def unused(
            self, used: Mapping[str, tuple[str, tuple[str, ...]]], present: Mapping[str, str]
        ) -> Iterator[Problem]:
            """Options that were set without an effect.  ``used``: for each option, the other option that
            decides, and its values with which there is an effect; ``present``: values of the other options.
            """
            for name, (option, values) in used.items():
                value = getattr(self, name)
                if present[option] not in values and value != getattr(type(self), name):
                    rule = f"has no effect with --router.{option} {present[option]}"
                    remedy = f"leave it out, or use --router.{option} {' or '.join(values)}"
                    yield Problem(f"--router.{name.replace('_', '-')}", value, rule, remedy)

        def warnings(self, *, topk: int) -> Iterator[str]:
            """Warnings about these options for a run whose smallest k is ``topk``."""
            return iter(())

        def lost(self, *, num_layers: int, aux_loss_coeff: float) -> Iterator[str]:
            """Warnings about options that have no effect in a run with these settings."""
            return iter(())

        def stage(self, step: int, train_iters: int) -> int:
            """The stage of training (1, 2, ...) after ``step`` steps.  A new stage may change the loads."""
            return 1

        def variant(self, step: int, layers: Sequence[int], **run: int) -> str:
            """Why the step after ``step`` completed ones differs from most others by design; empty if it
            does not.
            """
            return ""

        def unserved(self) -> Iterator[str]:
            """The options that have no effect, or another effect, if the caller does not pass ``tokens``
            or does not call :meth:`Router.end_step`.
            """
            return iter(())

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:  # an abstract family
            return
        if other := ROUTERS.get(name):
            raise TypeError(
                f"the router name {name} is used by both {other.__qualname__} and {cls.__qualname__}"
            )
        cls.name = name
        ROUTERS[name] = cls

    def __init__(
        self,
        config: Config,
        *,
        hidden_size: int,
        num_experts: int,
        topk: int | Callable[[int], int],
        layer_number: int = 1,
        seed: int = 1234,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        facts: RunFacts | None = None,
    ) -> None:
        """``topk``: k, or k as a function of completed steps; ``layer_number`` counts from 1."""
        super().__init__()
        self.facts = facts or RunFacts()
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.topk = topk
        self.layer_number = layer_number
        self.seed = seed
        self.aux_loss_coeff = aux_loss_coeff
        self.z_loss_coeff = z_loss_coeff
        # An engine that spreads one micro-batch over several ranks sets these: the sum over them (no
        # gradient), and all their rows one after the other, whose gradient is this rank's rows of the
        # gradient.
        self.over_shards: Callable[[Tensor], Tensor] | None = None
        self.gather_shards: Callable[[Tensor], Tensor] | None = None
        self._held = False

    # ------------------------------------------------------------------ the method itself: override these
    def view(self, x_TD: Tensor, now: Pass) -> Tensor:
        """Return the input that the router uses instead of ``x_TD``; a method can add noise here."""
        return x_TD

    @abstractmethod
    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits ``_TE`` in float32: a score of each token for each expert."""

    def choose(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return ``(weights_TK, experts_TK)``: by default, the experts with the k largest logits and the
        softmax over these logits.
        """
        return topk_softmax(logits_TE, k, self.config.groups)

    def best(self, scores_TE: Tensor, k: int) -> Tensor:
        """Ids ``_TK`` of the k largest scores among the experts that the groups allow."""
        return best_experts(scores_TE, k, self.config.groups)

    def scaled(self, weights_TK: Tensor) -> Tensor:
        """``weights_TK`` times ``scaling_factor``; nothing changes the weights after this."""
        factor = self.config.scaling_factor
        return weights_TK if factor == 1.0 else weights_TK * factor

    def balance_losses(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> dict[str, Tensor]:
        """Return the losses ``aux`` and ``z``, multiplied by their coefficients; none with coefficient 0."""
        losses: dict[str, Tensor] = {}
        if self.aux_loss_coeff:
            losses["aux"] = switch_loss(
                logits_TE.softmax(-1), experts_TK, self.over_shards, coefficient=self.aux_loss_coeff
            )
        if self.z_loss_coeff:
            losses["z"] = z_loss(logits_TE, self.over_shards, coefficient=self.z_loss_coeff)
        return losses

    @property
    def plain_losses(self) -> dict[str, float]:
        """Coefficients of the losses that are exactly ``switch_loss`` of the softmax (``aux``) or
        ``z_loss`` (``z``) of the micro-batch.  An engine does not have to compute these again.
        """
        return {}

    def refine(self, first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        """Return a changed decision, for a method that uses more than its logits."""
        return first

    def wants_outputs(self, now: Pass) -> bool:
        """Return True if this pass ends with ``combine``.  The answer must not depend on the tokens, because
        all ranks must agree.
        """
        return False

    def combine(self, routing: Routing, x_TD: Tensor, outputs_TKD: Tensor, now: Pass) -> Routing:
        """Return the decision with weights and further losses that depend on the unweighted outputs of the
        chosen experts, which have gradients.  The chosen experts must stay the same.
        """
        return routing

    # --------------------------------------------------------------------------------- counts over a step
    @property
    def num_extra_counts(self) -> int:
        """Number of values that ``extra_counts`` returns; 0: the method counts nothing."""
        return 0

    def extra_counts(self, routing: Routing) -> Tensor:
        """Return what the method counts, summed over this rank's tokens: float64 ``[num_extra_counts]``."""
        raise NotImplementedError

    def end_step(self, counts: StepCounts) -> None:
        """Use the counts of a step: engines call this after the optimizer step, with the same counts on every
        rank.  A router changes its buffers only here.
        """

    # ----------------------------------------------------------------------------- what all routers share
    def topk_at(self, step: int) -> int:
        """Return k after ``step`` completed optimizer steps."""
        return self.topk(step) if callable(self.topk) else self.topk

    def at(
        self,
        *,
        step: int = 0,
        topk: int | None = None,
        experts: ExpertBank | None = None,
        tokens: Tokens | None = None,
    ) -> Pass:
        """The pass that :meth:`forward` makes of these arguments; raises ValueError unless 1 <= k <= E."""
        k = whole(self.topk_at(step) if topk is None else topk)
        most = self.config.largest_topk(self.num_experts)
        if not 1 <= k <= most:
            name = "num_experts" if most == self.num_experts else "the number of experts in group_topk groups"
            raise ValueError(f"topk = {k}: must be from 1 to {name} = {most}")
        return Pass(step, k, self.training, tokens, experts)

    def forward(
        self,
        x_TD: Tensor,
        *,
        step: int = 0,
        topk: int | None = None,
        experts: ExpertBank | None = None,
        tokens: Tokens | None = None,
    ) -> Routing:
        """Choose experts and weights for the tokens ``x_TD``, in float32 for any dtype.  ``step``: number of
        completed optimizer steps; ``topk``: k, instead of the k of the schedule; ``experts``, ``tokens``:
        what some routers need, passed by engines and ``RouterSteps``.  Raises ValueError unless 1 <= k <= E
        and ``x_TD`` has the shape ``[T, D]``.
        """
        if x_TD.dim() != 2 or x_TD.size(1) != self.hidden_size:
            rule = f"must be [number of tokens, hidden_size = {self.hidden_size}]"
            remedy = "; use x.flatten(0, -2)" if x_TD.dim() > 2 else ""
            raise ValueError(f"x_TD has the shape {list(x_TD.shape)}: {rule}{remedy}")
        now = self.at(step=step, topk=topk, experts=experts, tokens=tokens)
        with float32_maths(x_TD.device):
            logits_TE = self.logits(self.view(x_TD, now))
            weights_TK, experts_TK = self.choose(logits_TE, now.k)
            first = Routing(
                logits_TE,
                self.scaled(weights_TK),
                experts_TK,
                {} if self._held and not now.training else self.balance_losses(logits_TE, experts_TK, now),
            )
            return self.refine(first, x_TD, now)

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """Return ``W_ED`` and ``b_E`` (or None) if the logits are ``W x + b``, in float32.  Otherwise, raise
        NotImplementedError.
        """
        raise NotImplementedError(f"router {self.name} is not a linear function of its input")

    def fold(self) -> Router:
        """Return a ``topk`` router that gives the same experts and weights.  For ``hyper``, it needs no
        hypernetwork.  Raises NotImplementedError if the router has no such equivalent.
        """
        with torch.no_grad():
            W_ED, b_E = self.linear()
        plain_class: Any = ROUTERS["topk"]
        plain = plain_class(
            plain_class.Config(bias=b_E is not None, **self._common_options(), **self.folded_options()),
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            topk=self.topk,
            layer_number=self.layer_number,
            seed=self.seed,
            aux_loss_coeff=self.aux_loss_coeff,
            z_loss_coeff=self.z_loss_coeff,
            facts=self.facts,
        ).to(W_ED.device, W_ED.dtype)
        assert isinstance(plain, Router)
        plain.train(self.training)
        state = {"weight_ED": W_ED, **self.folded_buffers()}
        plain.load_state_dict(state if b_E is None else state | {"bias_E": b_E})
        return plain

    def folded_buffers(self) -> dict[str, Tensor]:
        """Buffers of the ``topk`` router with the options of :meth:`folded_options`."""
        return {}

    def folded_options(self) -> dict[str, Any]:
        """Options of the ``topk`` router with which it chooses and weighs as this method does, beyond the
        options of every router; none: the softmax over the kept logits.
        """
        return {}

    def _common_options(self) -> dict[str, Any]:
        return {field.name: getattr(self.config, field.name) for field in fields(Router.Config)}

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Fill the trained parameters.  ``draw(name, shape)`` returns float32 numbers from N(0, 1) that
        depend only on the seed, the layer and the name.
        """
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Give the buffers their initial values; a method with buffers overrides this."""

    def reset(self) -> None:
        """Fill trained parameters from (seed, layer number), and buffers with their initial values, as the
        constructor does.  Call it after ``to_empty()``, which leaves both undefined.
        """
        prefix = f"router.{self.layer_number}."
        self.reset_parameters(lambda name, shape: keyed.normal(shape, seed=self.seed, name=prefix + name))
        self.reset_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Buffers move with the module but keep their dtype: a count in bfloat16 would stop growing."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, before[name].to(buffer.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy (deepcopy, pickle) shares nothing with other ranks: process groups cannot be copied."""
        alone = self.facts._replace(data_ranks=None)
        return {**self.__dict__, "over_shards": None, "gather_shards": None, "facts": alone, "_held": False}

    def hold(self, on: bool = True) -> None:
        """An engine's promises: it calls :meth:`begin_step` after each change of the weights, so that a
        router may keep what it computes from them, and reads no losses of passes that do not train.
        """
        self._held = on

    def begin_step(self) -> None:
        """The trained weights may have changed: an engine calls this after each optimizer step and each
        load.
        """

    def begin_backward(self, passes: int) -> None:
        """An engine's promise: this router will take part in ``passes`` backward passes before the next
        :meth:`end_backward`, so it may finish the gradient of its weights in the last of them.
        """

    def end_backward(self) -> None:
        """The step's backward passes are done.  Raises RuntimeError if some of those promised are missing."""


def uncompiled(method: Any) -> Any:
    """``torch.compiler.disable``, but only in compiled code, because it imports the compiler (1 s)."""

    @wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        disable: Any = torch.compiler.disable
        return (disable(method) if torch.compiler.is_compiling() else method)(*given, **named)

    return call
