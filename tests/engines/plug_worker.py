"""One rank of the tests of ``megatron_router_builder``: a caller's own MoELayer against a plain loop over
tokens and experts.

Called with a file for the answer and cases in JSON: ``{"layout": {...}, "config": {...}, "router": name}``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter import RouterSteps, megatron_router_builder
from megatron_hyperrouter.compat.megatron import install

S, B, D, E = 8, 2, 8, 4
LAYER, AUX, Z = 3, 0.3, 0.02


def numbers(seed: int, *shape: int) -> Tensor:
    """N(0, 1), the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(case: dict[str, Any]) -> Any:
    """megatron-core's MoELayer with our router, and experts drawn by their global number."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {
        "moe_ffn_hidden_size": 12,
        "ffn_hidden_size": 12,
        "num_layers": 4,
        "hidden_size": D,
        "num_attention_heads": 2,
    }
    fields = {
        "num_moe_experts": E,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": AUX,
        "moe_z_loss_coeff": Z,
        "add_bias_linear": False,
    }
    plain = {
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
    }
    config = TransformerConfig(**(sizes | fields | plain | case["layout"] | case.get("config", {})))
    experts = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    moe = MoELayer(
        config, MoESubmodules(experts=experts, router=megatron_router_builder(case["router"], seed=7))
    )
    moe.set_layer_number(LAYER)
    first = parallel_state.get_expert_model_parallel_rank() * len(moe.experts.local_experts)
    for local, expert in enumerate(moe.experts.local_experts):
        for place, linear in enumerate((expert.linear_fc1, expert.linear_fc2)):
            linear.weight.data.copy_(0.3 * numbers(100 * (first + local) + place, *linear.weight.shape))
    return moe


def routing_matrix(router: Any) -> tuple[Tensor, list[Tensor]]:
    """The matrix written out anew, and the leaves that its gradient goes to."""
    leaves = [parameter.detach().clone().requires_grad_() for parameter in router.parameters()]
    if router.name == "topk":
        return leaves[0], leaves
    w1, b1, w2, b2 = router.frozen_tensors(torch.device("cpu"))
    return (torch.relu(w1 @ leaves[0] + b1) @ w2 + b2).view(E, D), leaves


def loop(x_SBD: Tensor, W_ED: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Output of one micro-batch and its weighted losses."""
    x_TD = x_SBD.reshape(-1, D)
    logits_TE = x_TD @ W_ED.t()
    k, factor = config.moe_router_topk, config.moe_expert_capacity_factor
    capacity = len(x_TD) if factor is None else math.ceil(len(x_TD) * k / E * factor)
    routes: list[list[tuple[Tensor, int]]] = [[] for _ in range(E)]
    for t, row in enumerate(logits_TE):
        ids = sorted(range(E), key=lambda e: -row[e].item())[:k]
        for e, weight in zip(ids, row[ids].softmax(0), strict=True):
            routes[e].append((weight, t))
    share_E = torch.tensor([len(found) for found in routes]) / (len(x_TD) * k)
    out = [torch.zeros(D) for _ in x_TD]
    for e, found in enumerate(routes):
        if config.moe_token_drop_policy == "probs":
            found.sort(key=lambda route: (-route[0].item(), route[1]))
        fc1, fc2 = 0.3 * numbers(100 * e, 12, D), 0.3 * numbers(100 * e + 1, D, 12)
        for weight, t in found[:capacity]:
            out[t] = out[t] + weight * (fc2 @ torch.nn.functional.gelu(fc1 @ x_TD[t]))
    switch = E * (share_E * logits_TE.softmax(-1).mean(0)).sum()
    losses = AUX * switch + Z * logits_TE.exp().sum(-1).log().square().mean()
    return torch.stack(out).view_as(x_SBD), losses


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """The largest differences from the loop."""
    from megatron.core import parallel_state, tensor_parallel

    layout = {name: size for name, size in case["layout"].items() if name.endswith("size")}
    parallel_state.initialize_model_parallel(**layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    moe = build(case)
    rank, world = dist.get_rank(), dist.get_world_size()
    # the ranks share one micro-batch
    shared = "context_parallel_size" in layout or "tensor_model_parallel_size" in layout
    batches = [numbers(1, S, B, D)] if shared else [numbers(1 + each, S, B, D) for each in range(world)]
    probes = [numbers(50 + each, S, B, D) for each in range(len(batches))]

    def mine(whole: list[Tensor]) -> Tensor:
        return whole[0].chunk(world)[rank].contiguous() if shared else whole[rank]

    x = mine(batches).clone().requires_grad_()
    steps, counted = RouterSteps(moe, batch_first=False), []
    moe.router.router.end_step = counted.append
    steps.begin(6)
    output, _ = moe(x)
    (output * mine(probes)).sum().backward()
    router = moe.router.router
    chosen = steps.end()
    steps.begin_evaluation()
    moe(x.detach())  # not counted
    found = [parameter.grad.clone() for parameter in router.parameters()]
    for grad in found:
        dist.all_reduce(grad)

    inputs = [batch.clone().requires_grad_() for batch in batches]
    W_ED, leaves = routing_matrix(router)
    results = [loop(batch, W_ED, moe.config) for batch in inputs]
    total = sum((out * probe).sum() + losses for (out, losses), probe in zip(results, probes, strict=True))
    grads = torch.autograd.grad(total, [*inputs, *leaves])
    x_grads, wanted = grads[: len(inputs)], grads[len(inputs) :]
    load_E = sum(
        torch.bincount(
            (batch.reshape(-1, D) @ W_ED.t()).topk(moe.config.moe_router_topk).indices.flatten(), minlength=E
        )
        for batch in batches
    )
    (counts,) = counted
    told = [*counts.load_E.tolist(), counts.tokens, counts.step, chosen["load_max_over_mean"][LAYER - 1]]
    expected = [*load_E.tolist(), S * B * len(batches), 7, (load_E.max() / load_E.float().mean()).item()]
    worst = {
        "counts": max(abs(one - other) for one, other in zip(told, expected, strict=True)),
        "output": difference(output, mine([out for out, _ in results])),
        "x": difference(x.grad, mine(list(x_grads))),
        "router": max(difference(one, other) for one, other in zip(found, wanted, strict=True)),
    }
    marked = [getattr(parameter, "sequence_parallel", None) for parameter in router.parameters()]
    parallel_state.destroy_model_parallel()
    return worst | {
        "marked": float(all(marked)),
        "router grad": max(grad.abs().max().item() for grad in wanted),
    }


def difference(found: Any, wanted: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def main() -> None:
    """Run the cases; every rank's worst numbers come back."""
    install()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    answer, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", init_method=f"file://{answer}.store", rank=rank, world_size=world)
    told: list[Any] = [None] * world
    dist.all_gather_object(told, [run_case(case) for case in cases])
    if rank == 0:
        answer.write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
