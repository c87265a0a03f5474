"""Rules for the megatron engine only: what megatron-core computes wrongly, refuses, or cannot load."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from megatron_hyperrouter.config.derived import expert_tensor_size, has_idle_output, resets_documents
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.rules.base import Rule, broken, needs
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem


def param_gather_has_parts_to_gather(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Only the distributed optimizer leaves weights to gather; megatron-core ties the overlap to that of
    gradients (arguments.py), which is on unless it was switched off.
    """
    asked = config.optimizer
    if config.engine.engine != "megatron" or not asked.overlap_param_gather:
        return
    missing = ("use_distributed_optimizer",) * (not asked.use_distributed_optimizer)
    missing += ("overlap_grad_reduce",) * (asked.overlap_grad_reduce is False)
    if missing:
        yield needs(config, "overlap_param_gather", " and ".join(map(flag, missing)))


def overlap_needs_a_gradient_of_each_parameter(
    config: RunConfig, world_size: int | None
) -> Iterator[Problem]:
    """megatron-core waits for each gradient, and stops in the second step if one never comes
    (param_and_grad_buffer.py:206).
    """
    if config.engine.engine != "megatron" or not has_idle_output(config):
        return
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(config.optimizer, name):
            rule = (
                "does not work with --mtp-num-layers on several pipeline stages, because the tied output "
                "matrix of the last stage has no gradient"
            )
            yield broken(config, name, rule, "leave out FLAG, or add --untie-embeddings-and-output-weights")


def tensor_parallel_experts_need_sequence_parallel(
    config: RunConfig, world_size: int | None
) -> Iterator[Problem]:
    """megatron-core trains MoE layers under TP only with sequence parallelism (moe_layer.py:380 raises)."""
    parallel = config.parallel
    if (
        config.engine.engine == "megatron"
        and parallel.tensor_model_parallel_size > 1
        and not parallel.sequence_parallel
    ):
        yield broken(
            config,
            "sequence_parallel",
            "must be on if the megatron engine uses tensor parallelism",
            "add --sequence-parallel",
        )


def capacity_of_whole_samples(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A capacity per rank drops different tokens than a capacity for all tokens: the loss is off by 1.2e-2
    with TP 2.
    """
    parallel = config.parallel
    cut = max(parallel.tensor_model_parallel_size, parallel.context_parallel_size) > 1
    if config.engine.engine == "megatron" and cut and config.model.moe_expert_capacity_factor is not None:
        rule = (
            "would drop different tokens with tensor or context parallelism, so the result would depend on "
            "the layout"
        )
        yield broken(
            config,
            "moe_expert_capacity_factor",
            rule,
            "leave out FLAG, or use only expert and pipeline parallelism",
        )


def flex_has_its_kernels(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The flex dispatcher is DeepEP's (token_dispatcher.py:1149 raises ImportError)."""
    if (
        config.engine.engine == "megatron"
        and config.engine.moe_token_dispatcher_type == "flex"
        and not installed("deep_ep")
    ):
        remedy = "install DeepEP (github.com/deepseek-ai/DeepEP), or use FLAG alltoall"
        yield broken(
            config, "moe_token_dispatcher_type", "needs the deep_ep library, which is not installed", remedy
        )


def flex_has_ranks_to_dispatch_to(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The flex dispatcher asserts that there are other ranks to send tokens to (token_dispatcher.py:1346)."""
    if world_size is None:  # a plan has no layout yet
        return
    ranks = expert_tensor_size(config) * config.parallel.expert_model_parallel_size
    if (
        config.engine.engine == "megatron"
        and config.engine.moe_token_dispatcher_type == "flex"
        and ranks == 1
    ):
        yield broken(
            config,
            "moe_token_dispatcher_type",
            "needs experts on several ranks",
            "use FLAG alltoall, or set --expert-model-parallel-size",
        )


def documents_need_attention_of_ours(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Transformer Engine's attention does not receive document boundaries."""
    if (
        config.engine.engine == "megatron"
        and config.engine.transformer_impl == "transformer_engine"
        and resets_documents(config)
    ):
        rule = "cannot be combined with --reset-attention-mask or --reset-position-ids"
        yield broken(
            config, "transformer_impl", rule, "use --transformer-impl local, or leave out those two flags"
        )


def installed(library: str) -> bool:
    """Whether an import would find it, without importing it."""
    return find_spec(library) is not None


RULES: tuple[Rule, ...] = (
    param_gather_has_parts_to_gather,
    overlap_needs_a_gradient_of_each_parameter,
    tensor_parallel_experts_need_sequence_parallel,
    capacity_of_whole_samples,
    flex_has_its_kernels,
    flex_has_ranks_to_dispatch_to,
    documents_need_attention_of_ours,
)
