"""One scale for the output of each MoE layer, for an evaluation with fewer experts than in training.

The output of a mixture of fewer experts is larger.  With ``--calibrate-k``, the output of each layer is
multiplied by one number, so that its root mean square on a batch of training data is the same as at the
final k of training.

Legend: ``T`` tokens of a micro-batch, ``D`` hidden size, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_hyperrouter.analysis.jacobian import Experts
from megatron_hyperrouter.routers.base import Pass, Router, Routing

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.evaluate.trained import TrainedRun

Scales = Mapping[int, float]  # layer number (from 1) -> what its output is multiplied by
Factor = Callable[[Router, Routing, Tensor], float]  # of a router, its decision and its input


def scales_of_run(run: TrainedRun, tokenizer: Tokenizer, topks: Sequence[int]) -> dict[int, Scales]:
    """The scales at each k, computed by the run's engine, which this opens and closes."""
    engine = run.open_engine(tokenizer)
    try:
        run.load_into(engine)
        return {topk: scales_of(run, engine, tokenizer, topk) for topk in topks}
    finally:
        engine.close()


def scales_of(run: TrainedRun, engine: Engine, tokenizer: Tokenizer, topk: int) -> Scales:
    """The scales at ``topk``, from the first micro-batch of the run's training data; the engine holds the
    run's weights.
    """
    from megatron_hyperrouter.analysis.trained_experts import read_experts
    from megatron_hyperrouter.train.metrics import score

    size = run.settings.train.micro_batch_size
    training = run.dataset(tokenizer, split="train", samples=size)
    return calibrate(
        engine.routers.values(),
        lambda layer: read_experts(run.checkpoint, run.settings, layer),
        lambda k: score(engine, training, topk=k, micro_batch_size=size, num_samples=size),
        trained=run.settings.model.moe_router_topk,
        topk=topk,
    )


def calibrate(
    routers: Iterable[Router],
    experts_of: Callable[[int], Experts],
    evaluate: Callable[[int], object],
    *,
    trained: int,
    topk: int,
) -> dict[int, float]:
    """Layer number -> its factor at ``topk``; ``evaluate(k)`` brings the same micro-batch each time.

    One layer after the other: each sees what the layers below give with their factors.
    """
    routers = list(routers)
    held = {router.layer_number: experts_of(router.layer_number) for router in routers}
    wanted: dict[int, float] = {}
    found: dict[int, float] = {}

    def keep(router: Router, routing: Routing, x_TD: Tensor) -> float:
        wanted[router.layer_number] = root_mean_square(held[router.layer_number], routing, x_TD)
        return 1.0

    def match(router: Router, routing: Routing, x_TD: Tensor) -> float:
        layer = router.layer_number
        size = root_mean_square(held[layer], routing, x_TD)
        found[layer] = wanted[layer] / size if size else 1.0
        return found[layer]

    with weights_times(routers, keep):
        evaluate(trained)
    with weights_times(routers, match):
        evaluate(topk)
    return found


def apply(routers: Iterable[Router], factors: Scales) -> ExitStack:
    """A context in which each layer's output is multiplied by its factor."""
    stack = ExitStack()
    stack.enter_context(weights_times(routers, lambda router, routing, x_TD: factors[router.layer_number]))
    return stack


@contextmanager
def weights_times(routers: Iterable[Router], factor: Factor) -> Iterator[None]:
    """Within this context, the weights of the chosen experts are multiplied, which multiplies the layer's
    output.
    """
    with ExitStack() as stack:
        for router in routers:
            stack.enter_context(_multiplied(router, factor))
        yield


def root_mean_square(experts: Experts, routing: Routing, x_TD: Tensor) -> float:
    """Of the layer's output, computed expert by expert."""
    x_TD = x_TD.float()
    total_TD = x_TD.new_zeros(x_TD.shape)
    for expert in range(experts.w1_EGD.size(0)):
        token_R, place_R = (routing.experts_TK == expert).nonzero(as_tuple=True)
        if len(token_R):
            weights_R1 = routing.weights_TK[token_R, place_R].unsqueeze(1)
            total_TD.index_add_(0, token_R, weights_R1 * experts.one(expert, x_TD[token_R]))
    return float(total_TD.square().mean().sqrt())


@contextmanager
def _multiplied(router: Router, factor: Factor) -> Iterator[None]:
    own = router.refine

    def refine(first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        routing = own(first, x_TD, now)
        return routing._replace(weights_TK=routing.weights_TK * factor(router, routing, x_TD))

    router.refine = refine  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.refine
