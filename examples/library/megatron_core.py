"""Use HyperRouter in your own megatron-core GPT.

This example runs on any number of ranks. The ranks divide the experts among themselves.

python examples/library/megatron_core.py                          # one rank
torchrun --nproc-per-node 2 examples/library/megatron_core.py     # two ranks
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_hyperrouter import megatron_router_builder
from megatron_hyperrouter.compat.megatron import install
from megatron_hyperrouter.compat.specs import submodules_of
from megatron_hyperrouter.engines.world import backend, device, single_rank_without_launcher

# Lets megatron-core train on a CPU, and without Transformer Engine. This call applies only the patches that
# this machine needs. Call it before you import and build the model.
install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

STEPS, VOCABULARY, SEQUENCE, EXPERTS = 40, 48, 16, 4


def build_model() -> DistributedDataParallel:
    """A GPT with two MoE layers."""
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=2,
        moe_aux_loss_coeff=0.01,
        moe_ffn_hidden_size=64, add_bias_linear=False,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        moe_token_dispatcher_type="alltoall", hidden_dropout=0.0, attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False, normalization="LayerNorm")
    # This assignment is the only change to a megatron-core GPT: it replaces the router of each MoE layer.
    submodules_of(spec.submodules.mlp).router = megatron_router_builder("hyper", seed=1234)
    model = GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, position_embedding_type="rope"
    ).to(device())
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def forward_step(data: Any, model: DistributedDataParallel) -> tuple[torch.Tensor, Any]:
    """Return what megatron-core's schedule needs: the output of the model, and the function that computes
    the loss from this output.
    """
    tokens = next(data)
    labels, positions = (
        (7 * tokens + 3) % VOCABULARY,
        torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens),
    )
    return model(tokens, positions, None, labels=labels), lambda loss: (
        loss.mean(),
        {"loss": loss.mean().item()},
    )


def main() -> None:
    """Train, and print the loss. It starts at about ln 48 = 3.9, the loss of random guesses, and falls."""
    single_rank_without_launcher()  # with plain `python`, this process is the only rank
    torch.distributed.init_process_group(backend())
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=min(torch.distributed.get_world_size(), EXPERTS)
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    model = build_model()
    model.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=1.0), [model])
    torch.manual_seed(torch.distributed.get_rank())
    for step in range(1, STEPS + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([torch.randint(VOCABULARY, (8, SEQUENCE),
            device=device())]), model=model,
            num_microbatches=1, seq_length=SEQUENCE, micro_batch_size=8, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if torch.distributed.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[0]['loss']:.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
