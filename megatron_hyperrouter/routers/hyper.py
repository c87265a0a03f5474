"""HyperRouter: a frozen hypernetwork generates the router from a trained embedding (arXiv 2312.07035).

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``S`` size of the embedding, ``H`` hypernetwork
width, ``P`` generated numbers: E*(D+1) with a bias, else E*D.  If ``G`` ranks divide the hypernetwork,
each generates ``C`` = D/G columns of W, and P is its part of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.hypernet import active_units, generate, transposed
from megatron_hyperrouter.ops.linear import float32_linear, float32_maths
from megatron_hyperrouter.routers.choice import ChoosingRouter, no_gradient_at_k1
from megatron_hyperrouter.routers.frozen import FrozenRouter, Recipe, frozen

_LARGE = 1 << 18  # experts x hidden size
_BLOCK = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class HypernetRecipe(Recipe):
    """The frozen layers of a hypernetwork, or one of several parts of them; their biases are zero."""

    num_experts: int
    hidden_size: int
    embedding_size: int
    width: int
    bias: bool
    init: str
    logit_std: float | None = None
    part: int = 0  # of ``parts`` equal ones: its columns of the router's weights, and the whole bias
    parts: int = 1

    def draw(self, device: torch.device) -> tuple[tuple[Tensor, ...], str]:
        """``(w1_HS, b1_H, w2_HP, b2_P)``.  The columns for the router's bias are drawn from a separate
        stream, so W does not depend on ``bias``.

        W2 is stored in column-major order.  Products with it and with its transpose then take a quarter of
        the time (on a CPU).  It is drawn a few hidden units at a time: the hash covers all of it, and only
        this part stays in memory.
        """
        H, E, D, C = self.width, self.num_experts, self.hidden_size, self.hidden_size // self.parts
        w1_std, w2_std = self.stds()
        w1_HS = self.normal("w1", (H, self.embedding_size), w1_std, device)
        w2_HEC = w1_HS.new_empty(H, E, C + self.bias)
        b1_H, b2_P = w1_HS.new_zeros(H), w1_HS.new_zeros(E * (C + self.bias))

        def whole() -> Iterator[Tensor]:
            yield from (w1_HS, b1_H)
            units = max(_BLOCK // (E * D), 1)
            for first in range(0, H, units):
                kept_HEC = w2_HEC[first : first + units]
                count = len(kept_HEC)
                block = self.normal("w2", (count, E, D), w2_std, device, start=first * E * D)
                kept_HEC[..., :C] = block[..., self.part * C : (self.part + 1) * C]
                if self.bias:
                    kept_HEC[..., C:] = self.normal("w2_bias", (count, E, 1), w2_std, device, start=first * E)
                    block = torch.cat((block, kept_HEC[..., C:]), 2)
                yield block
            yield w1_HS.new_zeros(E * (D + self.bias))

        digest = keyed.digest(whole())
        return (w1_HS, b1_H, w2_HEC.view(H, -1), b2_P), digest

    def stds(self) -> tuple[float, float]:
        """Standard deviations of both layers, given an embedding ~ N(0, 1).

        ``paper``: 0.02.  ``width``: a hidden unit's input is N(0, S std1^2), so std1 = S^-1/2 makes it N(0,
        1), and the ReLU leaves a mean square of 1/2; a generated number has variance H std2^2 / 2, and a
        logit that of D of them (and the bias) for x of unit variance: std2 = (2 / (H (D + bias)))^1/2 makes
        it 1.  ``logit_std`` then scales the second layer.
        """
        numbers = self.hidden_size + self.bias
        if self.init == "paper":
            first, second = 0.02, 0.02
        else:
            first, second = self.embedding_size**-0.5, math.sqrt(2.0 / (self.width * numbers))
        if self.logit_std is None:
            return first, second
        return first, second * self.logit_std / logit_std(
            first, second, self.embedding_size, self.width, numbers
        )


def logit_std(first: float, second: float, embedding_size: int, width: int, numbers: int) -> float:
    """Standard deviation of the logits, from those of the hypernetwork's layers, for an embedding and
    inputs of unit variance; ``numbers``: generated for each expert.
    """
    return first * second * math.sqrt(embedding_size * width * numbers / 2)


class Generated(NamedTuple):
    """A router generated from the current embedding, and what its gradient needs."""

    W_ED: Tensor
    b_E: Tensor | None
    active: Tensor  # hidden units, ``_H``; ``_EH`` with an embedding for each expert


class HyperRouter(ChoosingRouter, FrozenRouter, name="hyper"):
    """``logits = W x + b`` with ``(W, b)`` generated from a trained embedding by a frozen hypernetwork.

    By default it generates (W, b) in every forward pass, which is always correct.  With an engine that
    keeps the promise of :meth:`hold`, it generates once per optimizer step.  The backward pass to the
    embedding runs once per micro-batch, or once per optimizer step after :meth:`begin_backward`.
    """

    config: Config
    anchor_ED: Tensor  # float32; only with the option anchor
    _stale: bool
    _generated: Generated | None
    _promised: int | None  # backward passes of this step
    _left: int  # backward passes still to come in this step
    _sum: tuple[Tensor, Tensor | None] | None  # the gradients of (W, b) in earlier passes

    @dataclass(frozen=True, kw_only=True)
    class Config(ChoosingRouter.Config):
        """The published method has ``bias`` on and ``init`` = ``paper``."""

        hypernet_width: Annotated[Count, "Number of hidden units of the hypernetwork"] = 256
        embedding_size: Annotated[Count | None, "Size of each trained embedding; default: --hidden-size"] = (
            None
        )
        per_expert_embedding: Annotated[
            bool,
            bool,
            (
                "Train one embedding for each expert, not one for each layer; the hypernetwork "
                "generates the router weights of each expert from its embedding"
            ),
        ] = False
        bias: Annotated[bool, "Also generate a bias for each logit"] = False
        init: Annotated[
            Literal["width", "paper"],
            "Scale of the frozen random weights of the hypernetwork. width: the initial logits have "
            "unit standard deviation; paper: the weights have the standard deviation 0.02",
        ] = "width"
        seed: Annotated[Natural | None, "Random seed of the frozen hypernetwork; default: --seed"] = None
        anchor: Annotated[
            bool,
            "Add a fixed matrix to the generated matrix, so that training starts with the router of "
            "an imported model (mhr import-hf sets this option)",
        ] = False
        shared: Annotated[
            Literal["layer", "model"] | None,
            "Number of hypernetworks. layer: one for each layer; model: one for all layers (each "
            "layer keeps its own embedding); default: model if --num-experts x --hidden-size "
            "exceeds 2^18, else layer",
        ] = None

        def chosen_by_size(self, *, hidden_size: int, num_experts: int) -> dict[str, str]:
            """Values of unset options that depend on the size of the model."""
            large = self.is_large(hidden_size=hidden_size, num_experts=num_experts)
            return {"shared": "model" if large else "layer"}

        def is_large(self, *, hidden_size: int, num_experts: int) -> bool:
            """Whether the hypernetwork is a considerable part of a rank's memory."""
            return num_experts * hidden_size > _LARGE

        def warnings(self, *, topk: int) -> Iterator[str]:
            """At k = 1 the embedding does not learn if the weights of a token sum to 1."""
            return no_gradient_at_k1("hyper", topk) if self.sums_to_one else iter(())

        def initial_logit_std(self, hidden_size: int) -> float | None:
            """1 with ``width``; with ``paper`` it grows with the sizes."""
            if self.logit_std is not None or self.init == "width":
                return self.logit_std or 1.0
            size = self.embedding_size or hidden_size
            return logit_std(0.02, 0.02, size, self.hypernet_width, hidden_size + self.bias)

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        embedding_size = config.embedding_size or self.hidden_size
        recipe = HypernetRecipe(
            seed=self.seed if config.seed is None else config.seed,
            name="hypernet.model" if self._one_for_all() else f"hypernet.layer{self.layer_number}",
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            embedding_size=embedding_size,
            width=config.hypernet_width,
            bias=config.bias,
            init=config.init,
            logit_std=config.logit_std,
        )
        self._ranks = self.facts.data_ranks
        if self._ranks is not None:
            recipe = replace(recipe, part=self._ranks.rank, parts=self._ranks.size)
        self.freeze(recipe)
        if config.anchor:
            shape = (self.num_experts, self.hidden_size)
            self.register_buffer("anchor_ED", torch.empty(shape, dtype=torch.float32))
        # a vector, even with an embedding for each expert: weight decay leaves it alone
        count = self.num_experts if config.per_expert_embedding else 1
        self.embedding_S = nn.Parameter(torch.empty(count * embedding_size))
        self.hold(False)
        self.reset()

    def _one_for_all(self) -> bool:
        """Large hypernetworks need 4 H E D bytes on every rank, and H E D random numbers."""
        sizes = {"hidden_size": self.hidden_size, "num_experts": self.num_experts}
        return (self.config.shared or self.config.chosen_by_size(**sizes)["shared"]) == "model"

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """The embedding ~ N(0, 1)."""
        with torch.no_grad():
            self.embedding_S.copy_(draw("embedding_S", tuple(self.embedding_S.shape)))
        self.begin_step()

    def reset_buffers(self) -> None:
        """See :meth:`Router.reset_buffers`."""
        super().reset_buffers()
        if self.config.anchor:
            self.anchor_ED.zero_()

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x + b``."""
        return float32_linear(x_TD, *self.linear())

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The generated router; its gradient goes to the embedding."""
        device = self.embedding_S.device
        if not self._held:
            with float32_maths(device):
                return self._generate(self._embedding())
        if self._stale or self._generated is None:
            self._generated = self._regenerate()
            self._stale = False
        W_ED, b_E, active = self._generated
        if not torch.is_grad_enabled():
            return W_ED, b_E
        if self._promised is not None and not torch.compiler.is_compiling():
            return _ReuseInStep.apply(self._embedding(), W_ED, b_E, active, self)  # type: ignore[no-untyped-call, no-any-return]
        if self._ranks is not None:
            raise RuntimeError(
                "call begin_backward() first, because the ranks that share a hypernetwork run its "
                "backward pass together"
            )
        w1_HS, _, w2_HP, _ = self.frozen_tensors(device)
        return _Reuse.apply(self._embedding(), W_ED, b_E, active, w1_HS, w2_HP)  # type: ignore[no-untyped-call, no-any-return]

    def hold(self, on: bool = True) -> None:
        """Generate once per step: from now on the caller must call :meth:`begin_step` after each change of
        the embedding.
        """
        super().hold(on)
        self._generated = self._sum = self._promised = None
        self._stale = True

    def begin_step(self) -> None:
        """Discard the generated router; the next forward pass generates it again, after an engine has
        gathered the weights.
        """
        self._stale = True

    def begin_backward(self, passes: int) -> None:
        """See :meth:`Router.begin_backward`; :meth:`hold` must be on.  Raises RuntimeError in a pass beyond
        the promise.
        """
        self._promised = self._left = passes

    def end_backward(self) -> None:
        """See :meth:`Router.end_backward`; an embedding that is not trained has no backward pass."""
        promised, self._promised = self._promised, None
        if promised is not None and self._left not in (0, promised):
            passes = f"{promised - self._left} backward passes instead of {promised}"
            raise RuntimeError(f"the router of layer {self.layer_number} took part in {passes} in this step")

    def _embedding(self) -> Tensor:
        """``_S``, or ``_ES`` with one for each expert."""
        embedding_S = self.embedding_S.float()
        return embedding_S.view(self.num_experts, -1) if self.config.per_expert_embedding else embedding_S

    def _generate(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        w1_HS, b1_H, w2_HP, b2_P = self.frozen_tensors(embedding.device)
        W_ED, b_E = generate(embedding, w1_HS, b1_H, w2_HP.t(), b2_P, self.num_experts, bias=self.config.bias)
        if self._ranks is not None:
            if torch.is_grad_enabled():
                raise RuntimeError("call hold() first: weights that other ranks generate have no gradient")
            W_ED = _joined(self._ranks.gather(W_ED))
        return (W_ED + self.anchor_ED if self.config.anchor else W_ED), b_E

    def anchor_at(self, given_ED: Tensor) -> None:
        """Make the generated router equal ``given_ED`` for the current embedding.  In effect, this sets the
        second layer's bias b2 to ``vec(given) - W2 relu(W1 e)``.  The bias is frozen like the layers, so
        only the embedding still learns.
        """
        with torch.no_grad(), float32_maths(given_ED.device):
            self.anchor_ED.zero_()
            W_ED, _ = self._generate(self._embedding())
            self.anchor_ED.copy_(given_ED.float() - W_ED)
        self.begin_step()

    def _regenerate(self) -> Generated:
        """Generate outside any graph, and not as inference tensors, because training may follow an
        evaluation.
        """
        device = self.embedding_S.device
        w1_HS, b1_H, _, _ = self.frozen_tensors(device)
        old = self._generated
        with torch.inference_mode(False), torch.no_grad(), float32_maths(device):
            embedding = self._embedding().detach()
            W_ED, b_E = self._generate(embedding)
            new = Generated(W_ED, b_E, active_units(embedding, w1_HS, b1_H))
            if old is not None and old.W_ED.device == device:
                # In place: addresses stay for compiled graphs, and a backward pass that still waits for the
                # old weights raises.
                old.W_ED.copy_(new.W_ED)
                old.active.copy_(new.active)
                if old.b_E is not None and new.b_E is not None:
                    old.b_E.copy_(new.b_E)
                new = old
        return new

    def _embedding_gradient(self, grad_W_ED: Tensor, grad_b_E: Tensor | None, active: Tensor) -> Tensor:
        """The embedding's gradient in one backward pass: zero, except in the last pass of the step, which
        returns the gradient of all passes.

        If ranks divide the hypernetwork, each rank runs the backward pass of its columns for the gradients
        of all ranks.  The engine then sums the embedding's gradient over the ranks, which gives the same
        sum.
        """
        if self._promised is None or self._left == 0:
            promised = self._promised or 0
            raise RuntimeError(
                f"layer {self.layer_number}: the router ran more backward passes than the {promised} that "
                "begin_backward() announced"
            )
        if self._left < self._promised and self._sum is not None:
            total_W_ED, total_b_E = self._sum
            total_W_ED.add_(grad_W_ED)
            if total_b_E is not None and grad_b_E is not None:
                total_b_E.add_(grad_b_E)
            grad_W_ED, grad_b_E = self._sum
        elif self._promised > 1:
            self._sum = grad_W_ED.clone(), None if grad_b_E is None else grad_b_E.clone()
        self._left -= 1
        w1_HS, _, w2_HP, _ = self.frozen_tensors(grad_W_ED.device)
        if self._left:
            return grad_W_ED.new_zeros((*active.shape[:-1], w1_HS.size(1)))
        if self._ranks is not None:
            parts_GEC = grad_W_ED.view(self.num_experts, self._ranks.size, -1).transpose(0, 1)
            grad_W_ED = self._ranks.sum_of_own(parts_GEC)
        return transposed(grad_W_ED, grad_b_E, active, w1_HS, w2_HP.t())

    def frozen_digest(self, device: torch.device) -> str:
        """See :meth:`FrozenRouter.frozen_digest`."""
        ranks = self._ranks
        if ranks is None:
            return super().frozen_digest(device)
        w1_HS, b1_H, w2_HP, _ = self.frozen_tensors(device)
        C, bias = self.hidden_size // ranks.size, int(self.config.bias)

        def whole() -> Iterator[Tensor]:
            yield from (w1_HS, b1_H)
            for w2_P in w2_HP:
                own_EC = w2_P.view(self.num_experts, C + bias)
                yield torch.cat((_joined(ranks.gather(own_EC[:, :C].contiguous())), own_EC[:, C:]), 1)
            yield w1_HS.new_zeros(self.num_experts * (self.hidden_size + bias))

        return keyed.digest(whole())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperRouter:
        self.begin_step()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.begin_step()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy (deepcopy, pickle) generates the matrix in every forward pass, because no engine calls
        its :meth:`begin_step`, and has the whole hypernetwork.
        """
        own: dict[str, Any] = {
            "_generated": None,
            "_stale": True,
            "_sum": None,
            "_promised": None,
        }
        if self._ranks is not None:
            whole = replace(self.frozen.recipe, part=0, parts=1)  # type: ignore[call-arg]
            own |= {"_ranks": None, "frozen": frozen(whole, self.frozen.device)}
        return {**super().__getstate__(), **own}


def _joined(W_GEC: Tensor) -> Tensor:
    """``W_ED`` from the columns of each rank."""
    return W_GEC.transpose(0, 1).flatten(1)


class _Reuse(torch.autograd.Function):
    """Returns the generated router; its backward is the transposed pass through the hypernetwork."""

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        W_ED: Tensor,
        b_E: Tensor | None,
        active: Tensor,
        w1_HS: Tensor,
        w2_HP: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(active)
        # not saved tensors: hooks that offload activations would move them
        ctx.w1_HS, ctx.w2_HP = (
            w1_HS,
            w2_HP,
        )
        return W_ED.detach(), None if b_E is None else b_E.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_W_ED: Tensor, grad_b_E: Tensor | None) -> tuple[Tensor | None, ...]:
        (active,) = ctx.saved_tensors
        return (
            transposed(grad_W_ED, grad_b_E, active, ctx.w1_HS, ctx.w2_HP.t()),
            None,
            None,
            None,
            None,
            None,
        )


class _ReuseInStep(torch.autograd.Function):
    """Returns the generated router; its backward is :meth:`HyperRouter._embedding_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, W_ED: Tensor, b_E: Tensor | None, active: Tensor, router: HyperRouter
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(active)
        ctx.router = router
        return W_ED.detach(), None if b_E is None else b_E.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_W_ED: Tensor, grad_b_E: Tensor | None) -> tuple[Tensor | None, ...]:
        (active,) = ctx.saved_tensors
        return ctx.router._embedding_gradient(grad_W_ED, grad_b_E, active), None, None, None, None
