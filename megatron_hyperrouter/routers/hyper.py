"""HyperRouter: a frozen hypernetwork generates the router from a trained embedding (arXiv 2312.07035).

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``S`` size of the embedding, ``H`` hypernetwork
width, ``P`` generated numbers: E*(D+1) with a bias, else E*D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.ops.hypernet import active_units, generate, transposed
from megatron_hyperrouter.ops.linear import float32_linear
from megatron_hyperrouter.routers.base import float32_maths, no_gradient_at_k1
from megatron_hyperrouter.routers.choice import ChoosingRouter
from megatron_hyperrouter.routers.frozen import FrozenRouter, Recipe

_ONE_FOR_ALL_FROM = 1 << 18  # experts x hidden size


@dataclass(frozen=True)
class HypernetRecipe(Recipe):
    """The frozen layers of a hypernetwork; their biases are zero."""

    num_experts: int
    hidden_size: int
    embedding_size: int
    width: int
    bias: bool
    init: str
    logit_std: float | None = None

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """``(w1_HS, b1_H, w2_HP, b2_P)``.  The columns for the router's bias are drawn from a separate
        stream, so W does not depend on ``bias``.

        W2 is stored in column-major order.  Products with it and with its transpose then take a quarter of
        the time (on a CPU).
        """
        H, E, D = self.width, self.num_experts, self.hidden_size
        w1_std, w2_std = self.stds()
        w1_HS = self.normal("w1", (H, self.embedding_size), w1_std, device)
        w2_HED = self.normal("w2", (H, E, D), w2_std, device)
        if self.bias:
            w2_HED = torch.cat((w2_HED, self.normal("w2_bias", (H, E, 1), w2_std, device)), 2)
        w2_HP = w2_HED.view(H, -1)
        return w1_HS, w1_HS.new_zeros(H), w2_HP, w1_HS.new_zeros(w2_HP.size(1))

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
    keeps the promise of :meth:`hold`, it generates once per optimizer step, and the backward pass to the
    embedding runs once per micro-batch.
    """

    config: Config
    anchor_ED: Tensor  # float32; there with anchor
    _held: bool
    _stale: bool
    _generated: Generated | None

    @dataclass(frozen=True, kw_only=True)
    class Config(ChoosingRouter.Config):
        """The published method has ``bias`` on and ``init`` = ``paper``."""

        hypernet_width: Annotated[Count, "Number of hidden units of the hypernetwork"] = 256
        embedding_size: Annotated[
            Count | None, "Size of the trained embedding of each layer; default: --hidden-size"
        ] = None
        per_expert_embedding: Annotated[
            bool,
            bool,
            (
                "Train one embedding for each expert instead of one for each layer; it generates the "
                "router weights of that expert"
            ),
        ] = False
        bias: Annotated[bool, "Generate a bias vector as well as the weights"] = False
        init: Annotated[
            Literal["width", "paper"],
            "Initial weights of the hypernetwork. width: scaled so that logits have unit standard "
            "deviation; paper: drawn from N(0, 0.02^2)",
        ] = "width"
        seed: Annotated[Natural | None, "Random seed of the frozen hypernetwork; default: --seed"] = None
        anchor: Annotated[
            bool, "Add a fixed matrix that reproduces an imported model's router exactly (set by import-hf)"
        ] = False
        shared: Annotated[
            Literal["layer", "model"] | None,
            "Hypernetworks of the model. layer: one for each layer; model: one for all layers, with "
            "one embedding for each layer; default: model if experts x hidden size exceeds 2^18, "
            "else layer",
        ] = None

        def chosen_by_size(self, *, hidden_size: int, num_experts: int) -> dict[str, str]:
            """Values of unset options that depend on the size of the model."""
            return {"shared": "model" if num_experts * hidden_size > _ONE_FOR_ALL_FROM else "layer"}

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
        self.freeze(recipe)
        if config.anchor:
            self.register_buffer("anchor_ED", torch.zeros(self.num_experts, self.hidden_size))
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
        if torch.is_grad_enabled():
            w1_HS, _, w2_HP, _ = self.frozen_tensors(device)
            W_ED, b_E = _Reuse.apply(self._embedding(), W_ED, b_E, active, w1_HS, w2_HP)  # type: ignore[no-untyped-call]
        return W_ED, b_E

    def hold(self, on: bool = True) -> None:
        """Generate once per step: from now on the caller must call :meth:`begin_step` after each change of
        the embedding.
        """
        self._held = on
        self._generated = None
        self._stale = True

    def begin_step(self) -> None:
        """Discard the generated router; the next forward pass generates it again, after an engine has
        gathered the weights.
        """
        self._stale = True

    def _embedding(self) -> Tensor:
        """``_S``, or ``_ES`` with one for each expert."""
        embedding_S = self.embedding_S.float()
        return embedding_S.view(self.num_experts, -1) if self.config.per_expert_embedding else embedding_S

    def _generate(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        w1_HS, b1_H, w2_HP, b2_P = self.frozen_tensors(embedding.device)
        W_ED, b_E = generate(embedding, w1_HS, b1_H, w2_HP.t(), b2_P, self.num_experts, bias=self.config.bias)
        return (W_ED + self.anchor_ED if self.config.anchor else W_ED), b_E

    def anchor_at(self, given_ED: Tensor) -> None:
        """Make the generated router ``given_ED`` at the present embedding: the second layer's bias b2 is then
        ``vec(given) - W2 relu(W1 e)``, frozen as the layers are, and the embedding alone still learns.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperRouter:
        self.begin_step()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.begin_step()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy (deepcopy, pickle) generates the matrix in every forward pass, because no engine calls
        its :meth:`begin_step`.
        """
        return {**super().__getstate__(), "_held": False, "_generated": None, "_stale": True}


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
