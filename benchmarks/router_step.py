"""Compare the training step of the DeepSpeed engine with router hyper and with router topk.

The goals are a ratio of at most 1.03 at hidden size D = 256, and of at most 1.01 at D >= 1024.  Two
processes, each with one engine, take turns.  Both start from the same weights: router topk gets the
weights that the hypernetwork of router hyper generates.  The learning rate is 0, so the optimizer does
all its work but changes nothing.  The benchmark checks that both engines send the same tokens to the same
experts in every step.  The difference in time is therefore the cost of the router.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from _pairs import PairedTimes, Seconds, flags, in_turn, print_table, stopwatch

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch, StepResult

VOCABULARY = 1000
COMMON = (
    f"--data-path unused --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --moe-router-topk 2 "
    "--moe-aux-loss-coeff 0.01 "
    "--zero-stage 1 --train-iters 1000000"
)


@dataclass(frozen=True)
class Case:
    """Sizes of a model and of a step."""

    hidden_size: int
    layers: int
    experts: int
    expert_size: int
    sequence: int
    micro_batch: int
    micro_batches: int
    goal: float

    def __str__(self) -> str:
        tokens = self.sequence * self.micro_batch
        return (
            f"D={self.hidden_size} L={self.layers} E={self.experts}, {self.micro_batches} x {tokens} tokens"
        )

    def config(self, router: str) -> RunConfig:
        """Settings of one of the two runs."""
        from megatron_hyperrouter.config.cli import parse
        from megatron_hyperrouter.routers import ROUTERS

        sizes = (
            f"--num-layers {self.layers} --hidden-size {self.hidden_size} --num-attention-heads "
            f"{max(4, self.hidden_size // 64)} "
            f"--num-experts {self.experts} --moe-ffn-hidden-size {self.expert_size} --seq-length "
            f"{self.sequence} "
            f"--micro-batch-size {self.micro_batch} --global-batch-size "
            f"{self.micro_batch * self.micro_batches}"
        )
        return parse(
            [*COMMON.split(), *sizes.split(), "--router.name", router], routers=ROUTERS, world_size=1
        )


CASES = (
    Case(256, layers=4, experts=16, expert_size=256, sequence=256, micro_batch=2, micro_batches=2, goal=1.03),
    Case(1024, layers=2, experts=8, expert_size=512, sequence=128, micro_batch=2, micro_batches=2, goal=1.01),
)
QUICK = (
    Case(32, layers=2, experts=4, expert_size=32, sequence=16, micro_batch=2, micro_batches=2, goal=1.03),
)


class Step(NamedTuple):
    """What a worker tells of a step."""

    seconds: Seconds
    lm_loss: float
    load_max_over_mean_L: tuple[float, ...]


class DifferentWork(RuntimeError):
    """The two runs did not route alike, so their times do not compare."""


def main() -> None:
    """Read the flags, measure each case, print the table."""
    parser = flags(__doc__ or "", pairs=15)
    parser.add_argument(
        "--hidden-size", type=int, choices=[case.hidden_size for case in CASES], help="measure only this case"
    )
    args = parser.parse_args()
    cases = QUICK if args.quick else [case for case in CASES if args.hidden_size in (None, case.hidden_size)]
    pairs, warm_up = (2, 1) if args.quick else (args.pairs, args.warm_up)
    rows = (measure(case, pairs=pairs, warm_up=warm_up, threads=args.threads) for case in cases)
    print_table(rows, base="topk", ours="hyper")


def measure(case: Case, *, pairs: int, warm_up: int, threads: int) -> PairedTimes:
    """Let both routers' engines step in turn."""
    with ExitStack() as stack:
        topk, hyper = (stack.enter_context(worker(case, router, threads)) for router in ("topk", "hyper"))
        told: list[list[Step]] = [[], []]

        def step(which: int) -> Seconds:
            told[which].append(ask((topk, hyper)[which], len(told[which])))
            return told[which][-1].seconds

        for _ in range(warm_up):
            step(0), step(1)
        base, ours = in_turn(lambda: step(0), lambda: step(1), pairs=pairs)
    for one, other in zip(*told, strict=True):
        if abs(one.lm_loss - other.lm_loss) > 1e-4 or one.load_max_over_mean_L != other.load_max_over_mean_L:
            raise DifferentWork(f"{case}: topk {one}, hyper {other}")
    return PairedTimes(str(case), case.goal, base, ours)


@contextmanager
def worker(case: Case, router: str, threads: int) -> Iterator[Connection]:
    """A process with an engine; it steps when it receives the number of a step, and ends at None."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(case, router, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(600) or ours.recv() != "ready":
            raise TimeoutError(f"{case}: the engine with router {router} did not start")
        yield ours
        ours.send(None)
        process.join(60)
    finally:
        process.kill()


def ask(connection: Connection, number: int) -> Step:
    """Have the worker do one step."""
    connection.send(number)
    step: Step = connection.recv()
    return step


def work(case: Case, router: str, threads: int, connection: Connection) -> None:
    """The worker's whole life."""
    import torch

    from megatron_hyperrouter.engines import open_engine

    torch.set_num_threads(threads)
    engine: Any = open_engine(case.config(router), vocab_size=VOCABULARY)
    if router == "topk":
        take_folded_weights(engine, case.config("hyper"))
    connection.send("ready")
    while (number := connection.recv()) is not None:
        results: list[StepResult] = []
        batches = list(micro_batches(case, number))

        def one_step(
            batches: list[Batch] = batches, results: list[StepResult] = results, n: int = number
        ) -> None:
            results.append(engine.train_step(iter(batches), step=n, learning_rate=0.0))

        seconds = stopwatch(one_step)
        connection.send(Step(seconds, results[0].lm_loss, results[0].layers["load_max_over_mean"]))
    engine.close()


def take_folded_weights(engine: Any, hyper: RunConfig) -> None:
    """Give topk the router that ``hyper`` starts with."""
    import torch

    from megatron_hyperrouter.engines.deepspeed import host_state
    from megatron_hyperrouter.engines.routing import make_router

    with torch.no_grad():
        for plain in engine.routers.values():
            plain.weight_ED.copy_(make_router(hyper, plain.layer_number, vocab_size=VOCABULARY).linear()[0])
    host_state.take_weights_over(engine.host.optimizer)  # ZeRO writes its own copy back after a step


def micro_batches(case: Case, step: int) -> Iterator[Batch]:
    """Made-up tokens, the same for both routers."""
    import torch

    generator = torch.Generator().manual_seed(step)
    for _ in range(case.micro_batches):
        rows = torch.randint(0, VOCABULARY, (case.micro_batch, case.sequence + 1), generator=generator)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


if __name__ == "__main__":
    main()
