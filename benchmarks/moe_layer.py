"""Compare the time of our MoE layer (forward and backward pass) with that of a plain DeepSpeed MoE layer.

The goal is a ratio of at most 1.05.  Our layer is the one that the DeepSpeed engine trains, with its
statistics and its load-balancing loss.  The plain layer is ``deepspeed.moe.layer.MoE`` with DeepSpeed's
own gate and load-balancing loss.  The benchmark checks that experts, weights, tokens, k and routing are
the same on both sides, without dropped tokens and without sampling.  Router hyper runs the forward and
backward pass of its hypernetwork once in each run, as in a training step with one micro-batch.

``--imbalance`` measures the grouped experts of both engines instead.  It compares a load in which one
expert has 3.7 times the mean load with an even load.  The goal is again a ratio of at most 1.05.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from _pairs import PairedTimes, Seconds, flags, in_turn, print_table, stopwatch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.statistics import RouterStatistics

GOAL = 1.05
BALANCE = 0.01  # coefficient of the balance loss
SKEW = 3.7  # largest load / mean load


@dataclass(frozen=True)
class Sizes:
    """Of the layer and of its input."""

    tokens: int
    hidden_size: int
    experts: int
    expert_size: int

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.hidden_size} E={self.experts}"

    def config(self, router: str, k: int) -> RunConfig:
        """Settings of a run with such a layer."""
        from megatron_hyperrouter.config.cli import parse
        from megatron_hyperrouter.routers import ROUTERS

        line = (
            f"--no-moe-grouped-gemm --data-path unused --num-layers 1 --hidden-size {self.hidden_size} "
            f"--num-attention-heads 4 "
            f"--num-experts {self.experts} "
            f"--moe-ffn-hidden-size {self.expert_size} --moe-router-topk {k} --moe-aux-loss-coeff {BALANCE} "
            f"--router.name {router}"
        )
        return parse(line.split(), routers=ROUTERS, world_size=1)


class DifferentWork(RuntimeError):
    """The two layers did not route alike, so their times do not compare."""


def main() -> None:
    """Read the flags, measure each case, print the table."""
    parser = flags(__doc__ or "", pairs=60)
    parser.add_argument(
        "--imbalance",
        action="store_true",
        help="compare the time of grouped experts at an uneven load with that at an even load",
    )
    args = parser.parse_args()
    sizes = Sizes(64, 32, 8, 16) if args.quick else Sizes(1024, 256, 16, 512)
    pairs, warm_up = (2, 1) if args.quick else (args.pairs, args.warm_up)
    if args.imbalance:
        wide = sizes if args.quick else Sizes(2048, 256, 16, 512)
        small = Sizes(64, 32, 32, 16) if args.quick else Sizes(1024, 256, 64, 128)
        with world(sizes, args.threads):
            print_table(
                (
                    measure_imbalance(each, k, pairs=pairs, warm_up=warm_up)
                    for each, k in ((wide, 2), (small, 8))
                ),
                base="even",
                ours="uneven",
            )
        return
    with world(sizes, args.threads):
        cases = [(router, k) for router in ("topk", "hyper") for k in (1, 2, 4)]
        print_table(
            (measure(sizes, router, k, pairs=pairs, warm_up=warm_up) for router, k in cases),
            base="bare",
            ours="ours",
        )


@contextlib.contextmanager
def world(sizes: Sizes, threads: int) -> Iterator[None]:
    """Process groups of one rank, as the engine makes them."""
    import torch

    from megatron_hyperrouter.compat.host_logs import silence_hosts

    silence_hosts()
    from megatron_hyperrouter.engines.deepspeed.groups import join, leave

    torch.set_num_threads(threads)
    join(sizes.config("topk", 1))
    try:
        yield
    finally:
        leave(keep_world=False)


def measure(sizes: Sizes, router: str, k: int, *, pairs: int, warm_up: int) -> PairedTimes:
    """Run both layers in turn on the same tokens."""
    import torch

    torch.manual_seed(0)
    slot, bare, statistics = layers(sizes.config(router, k))
    hidden_SBD = torch.randn(sizes.tokens // 4, 4, sizes.hidden_size, device=device())
    probe_SBD = torch.randn_like(hidden_SBD)

    def run_ours(x_SBD: Tensor) -> None:
        slot.moe.deepspeed_moe.gate.router.begin_step()
        output_SBD, _ = slot(x_SBD)
        output_SBD.backward(probe_SBD)

    def run_bare(x_SBD: Tensor) -> None:
        output_SBD, loss, _ = bare(x_SBD)
        torch.autograd.backward([output_SBD, BALANCE * loss], [probe_SBD, None])

    def once(layer: nn.Module, run: Any) -> Seconds:
        layer.zero_grad(set_to_none=True)
        x_SBD = hidden_SBD.clone().requires_grad_()
        return stopwatch(lambda: run(x_SBD))

    for _ in range(warm_up):
        once(bare, run_bare), once(slot, run_ours)
    base, ours = in_turn(lambda: once(bare, run_bare), lambda: once(slot, run_ours), pairs=pairs)
    check_same_work(slot, bare, statistics, runs=pairs + warm_up)
    return PairedTimes(f"{router} k={k}, {sizes}", GOAL, base, ours)


def measure_imbalance(sizes: Sizes, k: int, *, pairs: int, warm_up: int) -> PairedTimes:
    """Run the same experts in turn at both loads."""
    import torch

    from megatron_hyperrouter.engines.grouped import GroupedExperts, Sharing

    torch.manual_seed(0)
    experts = GroupedExperts(sizes.config("topk", k), Sharing()).to(device())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=sizes.hidden_size**-0.5)
    hidden_TD = torch.randn(sizes.tokens, sizes.hidden_size, device=device())
    weights_TK, probe_TD = torch.rand(sizes.tokens, k, device=device()), torch.randn_like(hidden_TD)

    def once(experts_TK: Tensor) -> Seconds:
        experts.zero_grad(set_to_none=True)
        x_TD = hidden_TD.clone().requires_grad_()
        return stopwatch(lambda: experts.weighted(x_TD, weights_TK, experts_TK, None).backward(probe_TD))

    even_TK, uneven_TK = (routes(sizes, k, skew).to(device()) for skew in (1.0, SKEW))
    for _ in range(warm_up):
        once(even_TK), once(uneven_TK)
    base, ours = in_turn(lambda: once(even_TK), lambda: once(uneven_TK), pairs=pairs)
    return PairedTimes(f"k={k}, {sizes}", GOAL, base, ours)


def routes(sizes: Sizes, k: int, skew: float) -> Tensor:
    """``_TK``: expert 0 has ``skew`` times the mean load, and the others take turns at the rest."""
    import torch

    experts_TK = torch.zeros(sizes.tokens, k, dtype=torch.int64)
    free_TK = torch.ones(sizes.tokens, k, dtype=torch.bool)
    free_TK[: round(skew * sizes.tokens * k / sizes.experts), 0] = False
    experts_TK[free_TK] = torch.arange(int(free_TK.sum())) % (sizes.experts - 1) + 1
    return experts_TK


def layers(config: RunConfig) -> tuple[Any, Any, RouterStatistics]:
    """(our slot, the bare layer, our statistics), with equal weights."""
    import torch
    from deepspeed.moe.layer import MoE
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_hyperrouter.engines.clock import Clock
    from megatron_hyperrouter.engines.deepspeed.mlp_slot.slot import MoESlot
    from megatron_hyperrouter.engines.routing import make_router
    from megatron_hyperrouter.engines.statistics import RouterStatistics
    from megatron_hyperrouter.model.spec import shared_expert_spec, transformer_config

    model = config.model
    core = transformer_config(config)
    statistics = RouterStatistics(1, model.num_experts)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints where it could log
        make = partial(make_router, config, vocab_size=256)
        slot: Any = MoESlot(
            core,
            run=config,
            make=make,
            clock=Clock(),
            statistics=statistics,
            shared_expert=shared_expert_spec(),
        )
        slot.set_layer_number(1)
        options = {
            "k": model.moe_router_topk,
            "drop_tokens": False,
            "use_rts": False,
            "top2_2nd_expert_sampling": False,
        }
        expert = slot.moe.deepspeed_moe.experts.deepspeed_experts[0]  # MoE makes copies of it
        bare: Any = MoE(model.hidden_size, expert, num_experts=model.num_experts, ep_size=1, **options)
        for moe in (slot.moe, bare):
            moe.set_deepspeed_parallelism()
    slot.to(device()), bare.to(device())
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=device()))
    router = slot.moe.deepspeed_moe.gate.router
    router.hold(True)
    with torch.no_grad():
        for parameter in slot.moe.deepspeed_moe.experts.parameters():
            torch.nn.init.normal_(parameter, std=model.hidden_size**-0.5)
        if hasattr(router, "weight_ED"):
            # logits of unit variance, as hyper has them
            torch.nn.init.normal_(router.weight_ED, std=model.hidden_size**-0.5)
        bare.deepspeed_moe.gate.wg.weight.copy_(router.linear()[0])
    bare.deepspeed_moe.experts.load_state_dict(slot.moe.deepspeed_moe.experts.state_dict())
    return slot, bare, statistics


def check_same_work(slot: Any, bare: Any, statistics: RouterStatistics, *, runs: int) -> None:
    """Each expert had as many tokens in both, and the statistics counted every run."""
    ours_E, theirs_E = slot.moe.deepspeed_moe.exp_counts, bare.deepspeed_moe.exp_counts
    counted_E = statistics.take()[0, : len(ours_E)]
    if ours_E.tolist() != theirs_E.tolist() or counted_E.tolist() != (runs * ours_E).tolist():
        raise DifferentWork(
            f"tokens of each expert: ours {ours_E.tolist()}, bare {theirs_E.tolist()}, counted "
            f"{counted_E.tolist()}"
        )


def device() -> Any:
    """Where the layers compute."""
    from megatron_hyperrouter.engines.world import device as chosen

    return chosen()


if __name__ == "__main__":
    main()
