"""Compare the training step of each routing method with that of router topk, and a layer in which the
experts compete (CompeteSMoE) with the same layer without competition.  Say which goals are met.

Goals:
- The experts take at most E/k times as long in a pass with competition as in a pass without it.
- A step of competesmoe, averaged over a run with rate 0.07, takes at most 1.15 times as long as a step of
  topk.
- A step of simsmoe with its published frequency takes at most 1.05 times as long as a step of topk.

One process has two DeepSpeed engines, one with topk and one with the method.  They take turns, and train
on the same tokens.  The learning rate is 0, and topk has weights with which it chooses the same experts
as the method.  The benchmark checks that they do, except in competitions, with jitter, and in stage 2 of
StableMoE, where the method chooses different experts by design.

The step time of a run is the mean of two kinds of steps, weighted by how often they occur.  In
competesmoe, a fraction ``rate`` of the steps has a competition.  In simsmoe, a fraction ``C(k, 2) /
frequency`` of the steps compares one pair of experts: each token counts for ``C(k, 2)`` pairs of a layer,
and a pair is compared when its count reaches ``frequency`` batches of tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from _pairs import PairedTimes, Seconds, flags, in_turns, print_table, stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch

VOCABULARY = 1000
STAGE_1 = 100_000  # steps; kinds of steps are told apart by their numbers
RATE, FREQUENCY, TOPK = 0.07, 16, 2


class Kind(NamedTuple):
    """One sort of training step of a method."""

    name: str
    share: float = 1.0  # of a run's steps
    same_routes: bool = True  # as topk with the equivalent weights
    goal: float | None = None


class Method(NamedTuple):
    """A router with its options."""

    name: str
    options: str
    kinds: tuple[Kind, ...] = (Kind(""),)
    goal: float | None = None  # of the average over the kinds


def competing(version: str) -> Method:
    """Ordinary and competing steps; a fixed rate, so that both occur under the same options."""
    kinds = (Kind("ordinary", 1.0 - RATE), Kind("competing", RATE, same_routes=False))
    return Method(
        f"competesmoe {version}",
        f"competesmoe --router.version {version} --router.schedule fixed --router.rate {RATE}",
        kinds,
        1.15,
    )


COMPARED = math.comb(TOPK, 2) / FREQUENCY  # share of steps in which a layer compares a pair
METHODS = {
    "v2": competing("v2"),
    "v1": competing("v1"),
    "simsmoe": Method(
        "simsmoe",
        f"simsmoe --router.frequency {FREQUENCY}",
        (Kind("ordinary", 1.0 - COMPARED), Kind("comparing a pair", COMPARED)),
        1.05,
    ),
    "switch": Method(
        "topk, Switch's", "topk --router.pre-softmax --router.jitter-eps 0.01", (Kind("", same_routes=False),)
    ),
    "deepseek": Method(
        "topk, DeepSeek-V3's",
        "topk --router.score-function sigmoid --router.renormalise --router.expert-bias "
        "--router.bias-update-rate 0 "
        "--router.aux-loss sequence",
    ),
    "global": Method("topk, global-batch loss", "topk --router.aux-loss global_batch"),
    "fixed": Method("topk, fixed", "topk --router.freeze"),
    "smoe_dropout": Method("smoe_dropout", "smoe_dropout"),
    "hyper": Method("hyper", "hyper"),
    "xmoe": Method("xmoe", "xmoe"),
    "stablemoe": Method(
        "stablemoe",
        f"stablemoe --router.stage1-steps {STAGE_1}",
        (Kind("stage 1", 0.1), Kind("stage 2", 0.9, same_routes=False)),
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Of the model (one layer) and of a step (one micro-batch)."""

    hidden_size: int
    experts: int
    expert_size: int
    sequence: int
    samples: int

    def __str__(self) -> str:
        tokens = self.sequence * self.samples
        return (
            f"one layer, D={self.hidden_size} E={self.experts} k={TOPK} expert width {self.expert_size}, "
            f"{tokens} tokens"
        )

    def config(self, options: str) -> RunConfig:
        """Settings of a run with the router and options of this line."""
        from megatron_hyperrouter.config.cli import parse
        from megatron_hyperrouter.routers import ROUTERS

        line = (
            f"--data-path unused --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --moe-router-topk "
            f"{TOPK} "
            f"--moe-aux-loss-coeff 0.01 --zero-stage 1 --train-iters {2 * STAGE_1} --num-layers 1 "
            f"--hidden-size {self.hidden_size} "
            f"--num-attention-heads 4 --num-experts {self.experts} --moe-ffn-hidden-size {self.expert_size} "
            f"--seq-length {self.sequence} --no-moe-grouped-gemm "
            f"--micro-batch-size {self.samples} --global-batch-size {self.samples} --router.name {options}"
        )
        return parse(line.split(), routers=ROUTERS, world_size=1)


class DifferentWork(RuntimeError):
    """The two runs did not route alike, so their times do not compare."""


def main() -> None:
    """Read the flags, measure each method, print the table."""
    parser = flags(__doc__ or "", pairs=15)
    parser.add_argument(
        "--method",
        choices=METHODS,
        action="append",
        help="measure only this method (you can repeat the flag)",
    )
    args = parser.parse_args()
    sizes = Sizes(32, 8, 32, 16, 2) if args.quick else Sizes(256, 16, 512, 256, 4)
    pairs, warm_up = (2, 1) if args.quick else (args.pairs, args.warm_up)
    chosen = [METHODS[key] for key in args.method or METHODS]
    print(
        f"{sizes}.  Base: a step of topk.  In the rows 'layer' and 'experts', the base is a pass of the same "
        "layer without competition."
    )
    with world(sizes, args.threads) as base:
        rows = (
            row for method in chosen for row in measure(sizes, method, base, pairs=pairs, warm_up=warm_up)
        )
        print_table(rows, base="base", ours="ours")


@contextmanager
def world(sizes: Sizes, threads: int) -> Iterator[Any]:
    """The engine with router topk, which stays."""
    import torch

    torch.set_num_threads(threads)
    base = engine_of(sizes.config("topk"))
    try:
        yield base
    finally:
        base.close()


def engine_of(config: RunConfig, *, for_training: bool = True) -> Any:
    """One more engine in this process: with one rank, all groups are the same, and each engine reuses the
    existing ones.
    """
    import gc

    import torch

    from megatron_hyperrouter.engines import open_engine
    from megatron_hyperrouter.engines.deepspeed.groups import leave

    gc.collect()  # of the method before: hosts hold themselves in cycles
    if torch.distributed.is_initialized():
        leave(keep_world=True)
    return open_engine(config, vocab_size=VOCABULARY, for_training=for_training)


def measure(sizes: Sizes, method: Method, base: Any, *, pairs: int, warm_up: int) -> Iterator[PairedTimes]:
    """The rows of a method."""
    if method.name.startswith("competesmoe"):
        yield from layer_rows(sizes, method, pairs=pairs, warm_up=warm_up)
    engine = engine_of(sizes.config(method.options))
    give_weights(base, only_router(engine))
    runs = [Stepper(base, sizes, Kind("")), *(Stepper(engine, sizes, kind) for kind in method.kinds)]
    in_turns([run.step for run in runs], rounds=warm_up)
    topk, *kinds = in_turns([run.step for run in runs], rounds=pairs)
    check_same_routes(method, runs)
    averaged = [mean([kind.share for kind in method.kinds], every) for every in zip(*kinds, strict=True)]
    if len(kinds) > 1:
        for kind, seconds in zip(method.kinds, kinds, strict=True):
            yield PairedTimes(f"{method.name}, {kind.name}", None, topk, seconds)
    yield PairedTimes(
        method.name if len(kinds) == 1 else f"{method.name}, average", method.goal, topk, averaged
    )


class Stepper:
    """Training steps of one kind, one after the other."""

    def __init__(self, engine: Any, sizes: Sizes, kind: Kind) -> None:
        self.engine, self.sizes, self.kind = engine, sizes, kind
        self.number = STAGE_1 if kind.name == "stage 2" else 0
        self.done = 0
        self.loads: list[tuple[float, ...]] = []  # largest over mean load of each layer, for each step

    def step(self) -> Seconds:
        """The next step of this kind; getting ready for it is not timed."""
        self.number = prepare(only_router(self.engine), self.kind.name, self.number)
        told: list[Any] = []
        batch = made_up(self.sizes, self.done)
        seconds = stopwatch(
            lambda: told.append(self.engine.train_step(iter([batch]), step=self.number, learning_rate=0.0))
        )
        self.loads.append(told[0].layers["load_max_over_mean"])
        self.number, self.done = self.number + 1, self.done + 1
        return seconds


def prepare(router: Any, kind: str, number: int) -> int:
    """Bring about a step of this kind; returns its number, not below ``number``."""
    if router.name == "competesmoe":
        while router.competes(number) != (kind == "competing"):
            number += 1
    if router.name == "simsmoe":
        counts_P = router.pair_counts_P
        # the pair with most tokens: the dearest to compare, and the first to be
        busiest = int(counts_P.argmax())
        counts_P.zero_()
        if kind != "ordinary":
            counts_P[busiest] = 2.0 * FREQUENCY
        router.begin_step()
    return number


def give_weights(base: Any, router: Any) -> None:
    """Give topk a W whose logits are in the same order as those of ``router``."""
    import torch

    from megatron_hyperrouter.engines.deepspeed import host_state

    with torch.no_grad():
        if router.name == "xmoe":  # the length of the token's projection is the same for all experts
            W_ED = torch.nn.functional.normalize(router.embedding_EP, dim=-1) @ router.projection_PD
        else:
            W_ED = router.centroid_ED if router.name == "stablemoe" else router.linear()[0]
        only_router(base).weight_ED.copy_(W_ED)
    host_state.take_weights_over(base.host.optimizer)  # ZeRO writes its own copy back after a step


def check_same_routes(method: Method, runs: list[Stepper]) -> None:
    """Each expert had as many tokens in both, where that is meant."""
    base, *others = runs
    for run in others:
        if run.kind.same_routes and run.loads != base.loads:
            raise DifferentWork(
                f"{method.name} {run.kind.name}: largest over mean load {run.loads}, topk {base.loads}"
            )


def layer_rows(sizes: Sizes, method: Method, *, pairs: int, warm_up: int) -> Iterator[PairedTimes]:
    """Forward and backward pass of the MoE layer alone, competing against ordinary; and the time in its
    experts alone.
    """
    import torch

    from megatron_hyperrouter.engines.deepspeed.mlp_slot.slot import MoESlot

    engine = engine_of(sizes.config(method.options), for_training=False)
    (slot,) = (module for module in engine.model.modules() if isinstance(module, MoESlot))
    slot.train()
    meter = ExpertMeter(slot.moe.deepspeed_moe.experts.deepspeed_experts)
    hidden_SBD = torch.randn(sizes.sequence, sizes.samples, sizes.hidden_size)
    hidden_SBD, probe_SBD = hidden_SBD.to(engine.device), torch.randn_like(hidden_SBD).to(engine.device)

    def run(kind: str) -> tuple[Seconds, Seconds]:
        engine.clock.begin(step=prepare(only_router(engine), kind, 0))
        slot.zero_grad(set_to_none=True)
        x_SBD = hidden_SBD.clone().requires_grad_()
        meter.spent = Seconds(0.0, 0.0)
        whole = stopwatch(lambda: slot(x_SBD)[0].backward(probe_SBD))
        return whole, meter.spent

    told: dict[str, list[tuple[Seconds, Seconds]]] = {"ordinary": [], "competing": []}

    def once(kind: str) -> Seconds:
        told[kind].append(run(kind))
        return told[kind][-1][0]

    in_turns([lambda: once("ordinary"), lambda: once("competing")], rounds=warm_up + pairs)
    for part, which, goal in (("layer", 0, None), ("experts", 1, sizes.experts / TOPK)):
        base, ours = ([pair[which] for pair in told[kind][warm_up:]] for kind in ("ordinary", "competing"))
        yield PairedTimes(f"{method.name}, {part}", goal, base, ours)


class ExpertMeter:
    """Seconds between the beginning and the end of each expert's forward and backward pass."""

    def __init__(self, experts: Any) -> None:
        self.spent = self._since = Seconds(0.0, 0.0)
        for expert in experts:
            expert.register_forward_pre_hook(self._start), expert.register_forward_hook(self._stop)
            (
                expert.register_full_backward_pre_hook(self._start),
                expert.register_full_backward_hook(self._stop),
            )

    def _start(self, *_: object) -> None:
        self._since = now()

    def _stop(self, *_: object) -> None:
        self.spent = Seconds(
            *(spent + end - start for spent, end, start in zip(self.spent, now(), self._since, strict=True))
        )


def now() -> Seconds:
    """Both clocks, once a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def mean(shares: list[float], seconds: tuple[Seconds, ...]) -> Seconds:
    """The mean of a step's times over its kinds."""
    return Seconds(
        *(
            sum(share * value for share, value in zip(shares, values, strict=True))
            for values in zip(*seconds, strict=True)
        )
    )


def only_router(engine: Any) -> Any:
    """Of a model with one layer."""
    (router,) = engine.routers.values()
    return router


def made_up(sizes: Sizes, step: int) -> Batch:
    """Tokens, the same for both routers."""
    import torch

    rows: Tensor = torch.randint(
        0, VOCABULARY, (sizes.samples, sizes.sequence + 1), generator=torch.Generator().manual_seed(step)
    )
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


if __name__ == "__main__":
    main()
