"""The routers' choices in a step, summed over micro-batches and ranks, and the metrics of each layer from
these sums.

To add a metric of each MoE layer, only change this file: its value in ``LAYER_METRICS``, and its sum in
``SUMS`` if the existing sums are not enough.  It appears as ``router/NAME/LAYER`` in the metrics.

Legend: ``L`` MoE layers, ``T`` tokens of a micro-batch on this rank, ``N`` tokens of a sample, ``D``
hidden size, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.ops.balance import load, switch_loss, z_loss
from megatron_hyperrouter.ops.similarity import linear_cka
from megatron_hyperrouter.routers.base import Pass, Router, Routing, StepCounts

_MOST_NUMBERS = 64  # tokens of a micro-batch, where padding makes them differ
DEAD_SHARE = 0.05  # of the mean load: an expert with less is dead


@dataclass(frozen=True)
class Seen:
    """One layer's decision for the tokens of a micro-batch on this rank."""

    logits_TE: Tensor
    probs_TE: Tensor  # softmax over all experts
    experts_TK: Tensor
    load_E: Tensor  # of this rank's tokens
    # of the micro-batch, where ranks share it, and this rank's share of its tokens: a float64 scalar
    whole_load_E: Tensor | None
    part: Tensor
    tokens: Tensor  # number of them, a float64 scalar
    losses: Mapping[str, Tensor]  # those of ``Router.plain_losses``, before their coefficients


@dataclass(frozen=True)
class Sum:
    """A number that adds up over tokens, micro-batches and ranks.

    ``per_expert``: one for each expert; ``detail``: left out of steps that show no details.
    """

    of: Callable[[Seen], Tensor]
    per_expert: bool = False
    detail: bool = False


def _aux(seen: Seen) -> Tensor:
    if "aux" in seen.losses:
        return seen.losses["aux"]
    whole_E = seen.whole_load_E
    over_shards = None if whole_E is None else lambda _: whole_E
    return switch_loss(seen.probs_TE, seen.experts_TK, over_shards, load_E=seen.load_E)


def _z(seen: Seen) -> Tensor:
    if "z" in seen.losses:
        return seen.losses["z"]
    mean = z_loss(seen.logits_TE)
    return mean if seen.whole_load_E is None else mean * seen.part


def _logit_variance(seen: Seen) -> Tensor:
    """Over experts, summed over tokens.  Layer norm computes it four times as fast as ``var``, if rows are
    short and there is no GPU.
    """
    size = seen.logits_TE.shape[-1:]
    _, _, inverse_std_T1 = torch.native_layer_norm(seen.logits_TE, size, None, None, 0.0)
    return inverse_std_T1.pow(-2).sum(dtype=torch.float64)


SUMS: Mapping[str, Sum] = MappingProxyType(
    {
        "load": Sum(lambda seen: seen.load_E, per_expert=True),
        "entropy": Sum(lambda seen: torch.special.entr(seen.probs_TE).sum(dtype=torch.float64)),
        "tokens": Sum(lambda seen: seen.tokens),
        "aux": Sum(_aux),
        "z": Sum(_z),
        "micro_batches": Sum(lambda seen: seen.part),
        # the details are last: the others are the first numbers of a row
        "probability": Sum(
            lambda seen: seen.probs_TE.sum(0, dtype=torch.float64), per_expert=True, detail=True
        ),
        "logit_variance": Sum(_logit_variance, detail=True),
    }
)

# From the sums of one step over all ranks (``_LE`` where per expert, else ``_L``) to a number of each layer.
LAYER_METRICS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = MappingProxyType(
    {
        # entropy of the softmax over all experts, mean over tokens, in nats
        "entropy": lambda sums: sums["entropy"] / sums["tokens"],
        "load_max_over_mean": lambda sums: sums["load"].amax(1) / sums["load"].mean(1),
        # experts with less than DEAD_SHARE of the mean load
        "dead_experts": lambda sums: (
            (sums["load"] < DEAD_SHARE * sums["load"].mean(1, keepdim=True)).double().sum(1)
        ),
        # the same as a share of all experts
        "dead_share": lambda sums: (
            (sums["load"] < DEAD_SHARE * sums["load"].mean(1, keepdim=True)).double().mean(1)
        ),
        # exp of the entropy of the loads, as a share of all experts: 1 when even, 1 / E when one has all
        "effective_experts": lambda sums: (
            torch.special.entr(sums["load"] / sums["load"].sum(1, keepdim=True)).sum(1).exp()
            / sums["load"].size(1)
        ),
        # standard deviation over experts of a token's logits, root mean square over tokens
        "logit_std": lambda sums: (sums["logit_variance"] / sums["tokens"]).sqrt(),
        # between token and expert, in nats: 0 if the router gives every token the same scores
        "mutual_information": lambda sums: (
            torch.special.entr(sums["probability"] / sums["tokens"].unsqueeze(1)).sum(1)
            - sums["entropy"] / sums["tokens"]
        ),
        # the losses before their coefficients, mean over micro-batches
        "aux": lambda sums: sums["aux"] / sums["micro_batches"],
        "z": lambda sums: sums["z"] / sums["micro_batches"],
    }
)
DETAILS = ("logit_std", "mutual_information")  # what the sums of the details are for


class RouterStatistics:
    """Sums over one step of the routers' choices, one row per layer, ready for a single all-reduce.

    A row contains the sums of ``SUMS``, and then the method's own counts.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._widths = [num_experts if each.per_expert else 1 for each in SUMS.values()]
        self.enabled = True
        self.detailed = True  # whether the current step needs DETAILS
        self._numbers: dict[int, Tensor] = {}
        self.make_room(0)

    def make_room(self, num_extra: int) -> None:
        """Add ``num_extra`` numbers per layer for what the router itself counts."""
        width = sum(self._widths) + num_extra
        # They move to the device of the routers with the first micro-batch.
        self.sums: Tensor = torch.zeros(self.num_layers, width, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def record(self, router: Router, routing: Routing, *, own: bool = True) -> None:
        """Add one micro-batch; the second forward pass of activation checkpointing is left out.  ``own``: the
        router's losses refer to these choices.

        Ranks that share the micro-batch (``router.over_shards``) each add their part of the means.
        """
        if not self.enabled or recomputing():
            return
        logits_TE, experts_TK = routing.logits_TE.detach(), routing.experts_TK
        if self.sums.device != logits_TE.device:
            self.sums = self.sums.to(logits_TE.device)
        load_E = load(experts_TK, self.num_experts)
        row = self.sums[router.layer_number - 1]
        whole_E, part, tokens = None, self._number(1), self._number(logits_TE.size(0))
        if router.over_shards is not None:
            whole_E = router.over_shards(load_E)
            part = load_E.sum(dtype=torch.float64) / whole_E.sum()
        plain = router.plain_losses.items() if own else ()
        losses = {name: routing.losses[name].detach() / by for name, by in plain if name in routing.losses}
        probs_TE = logits_TE.softmax(-1)
        seen = Seen(logits_TE, probs_TE, experts_TK, load_E, whole_E, part, tokens, losses)
        wanted = [each for each in SUMS.values() if self.detailed or not each.detail]
        values = torch.cat([each.of(seen).view(-1) for each in wanted])
        row[: len(values)].add_(values)
        if router.num_extra_counts:
            row[sum(self._widths) :].add_(router.extra_counts(routing))

    def _number(self, value: int) -> Tensor:
        """A float64 scalar on the device of the sums, made once, because each layer of a micro-batch needs
        the same.

        It is filled there: copying a number to a GPU would make the host wait.
        """
        if value not in self._numbers or self._numbers[value].device != self.sums.device:
            if len(self._numbers) > _MOST_NUMBERS:
                self._numbers.clear()
            self._numbers[value] = self.sums.new_full((), value)
        return self._numbers[value]

    def take(self) -> Tensor:
        """Return the sums so far, and start again from 0."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def summary(self, sums: Tensor) -> dict[str, list[float]]:
        """Each of ``LAYER_METRICS``, one number per MoE layer, from sums over all ranks; without details,
        not ``DETAILS``.
        """
        named = self._named(sums[self.routed(sums)])
        return {
            name: value(named).tolist()
            for name, value in LAYER_METRICS.items()
            if self.detailed or name not in DETAILS
        }

    def counts(self, sums: Tensor, layer_number: int, *, step: int, tokens: int, replicas: int) -> StepCounts:
        """The counts of one layer, from sums over all ranks; ``tokens``: tokens of the global batch, each
        counted by ``replicas`` ranks.
        """
        row = sums[layer_number - 1] / replicas
        return StepCounts(step, float(tokens), row[: self.num_experts], row[sum(self._widths) :])

    def routed(self, sums: Tensor) -> Tensor:
        """Indices of the layers that have routed tokens, from sums over all ranks: dense layers have not."""
        return self.tokens_L(sums).nonzero().flatten()

    def tokens_L(self, sums: Tensor) -> Tensor:
        """Number of tokens that each layer has processed, from sums over all ranks; replicas count each
        time.
        """
        return self._named(sums)["tokens"]

    def _named(self, sums: Tensor) -> dict[str, Tensor]:
        columns = sums[:, : sum(self._widths)].split(self._widths, 1)
        return {
            name: column if each.per_expert else column.squeeze(1)
            for (name, each), column in zip(SUMS.items(), columns, strict=True)
        }


def recomputing() -> bool:
    """True inside ``backward()``: a forward pass there is activation checkpointing's second."""
    return torch._C._current_graph_task_id() != -1


MOST_TOKENS, MOST_PAIRS = 256, 8


class Likeness:
    """Linear CKA of the outputs of experts 0 and 1, 2 and 3, ... of each layer, for the tokens of a pass
    that is the same on every data-parallel rank.

    There is no value if each rank has an odd number of experts, because no rank has both experts of some
    pairs.
    """

    def __init__(self, config: RunConfig, device: torch.device, *, first_expert: int) -> None:
        """``first_expert``: number of this rank's first one."""
        layers = config.model.num_layers + (config.model.mtp_num_layers or 0)
        self._sums_L2 = torch.zeros(layers, 2, dtype=torch.float64, device=device)  # CKA, pairs
        self._first = first_expert
        self._local = config.model.num_experts // config.parallel.expert_model_parallel_size

    @contextmanager
    def watching(self, routers: Iterable[Router]) -> Iterator[None]:
        """Within this context, every pass of these routers is measured."""
        with ExitStack() as stack:
            for router in routers:
                stack.enter_context(self._watched(router))
            yield

    def by_layer(self) -> dict[int, float]:
        """Layer number -> the mean over its pairs (collective)."""
        dist.all_reduce(self._sums_L2)
        rows = enumerate(self._sums_L2.tolist(), 1)
        return {layer: total / pairs for layer, (total, pairs) in rows if pairs}

    @contextmanager
    def _watched(self, router: Router) -> Iterator[None]:
        own = router.refine

        def refine(first: Routing, x_TD: Tensor, now: Pass) -> Routing:
            self._look(router, x_TD, now)
            return own(first, x_TD, now)

        router.refine = refine  # type: ignore[method-assign]
        try:
            yield
        finally:
            del router.refine

    @torch.no_grad()
    def _look(self, router: Router, x_TD: Tensor, now: Pass) -> None:
        if now.experts is None or self._local % 2:
            return
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            outputs.append(output.reshape(-1, output.size(-1)))
            return output.select(-1, 0)

        now.experts.scores_TE(_sample_ND(router, x_TD, now), keep)
        # Each expert computes the sample once for each rank that shares the experts; the results are equal.
        each = outputs[:: len(outputs) // self._local]
        for number in range(0, 2 * MOST_PAIRS, 2):
            here = number - self._first
            if 0 <= here < self._local:
                alike = linear_cka(each[here], each[here + 1])
                self._sums_L2[router.layer_number - 1] += torch.stack((alike, torch.ones_like(alike)))


def _sample_ND(router: Router, x_TD: Tensor, now: Pass) -> Tensor:
    """Evenly spaced tokens of the micro-batch, in the order of their positions."""
    assert now.tokens is not None, "the engine must give the positions of the tokens"
    places_T = now.tokens.places_T
    if router.gather_shards is not None:
        x_TD, places_T = router.gather_shards(x_TD), router.gather_shards(places_T)
    rows_T = places_T.argsort()
    return x_TD[rows_T[:: -(-len(rows_T) // MOST_TOKENS)]]
