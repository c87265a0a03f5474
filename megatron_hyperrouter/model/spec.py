"""One megatron-core layer spec for both engines; what fills the MoE slot is an argument.

RMSNorm, rotary positions, grouped-query attention through torch's ``scaled_dot_product_attention``,
SwiGLU experts, no biases, optional norms on queries and keys.  The Megatron engine can have the same
layers from Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_hyperrouter.compat.specs import dense_mlp, prediction_parts
from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_width,
    moe_layers,
    recomputed_parts,
    resets_documents,
    rope_type,
    windows,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.attention.core import NextStarts, ScaledDotProductAttention
from megatron_hyperrouter.model.attention.latent import LatentAttention
from megatron_hyperrouter.model.attention.rotary import rates
from megatron_hyperrouter.model.te_layers import fused_expert_spec, fused_layer_spec, fused_norm, fusions


def transformer_config(config: RunConfig, **engine_fields: Any) -> TransformerConfig:
    """megatron-core's own configuration for the model of ``config``; an engine adds its parallel sizes by
    name.
    """
    model, dtype = config.model, parameter_dtype(config)
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": dense_width(config),
        "moe_ffn_hidden_size": expert_width(config),
        "moe_layer_freq": [int(routed) for routed in moe_layers(config)],
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "num_moe_experts": model.num_experts,
        # megatron-core refuses k = 1 with softmax after top-k (transformer_config.py); k is the router's
        # business here anyway.
        "moe_router_topk": max(2, model.moe_router_topk),
        "moe_router_load_balancing_type": "none",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "add_qkv_bias": config.attention.add_qkv_bias,
        "multi_latent_attention": config.attention.multi_latent_attention,
        "mtp_num_layers": model.mtp_num_layers,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        # Weights come from ``model.init``, by name; megatron-core only sets the marks that describe their
        # sharding.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.train.bf16,
        "bias_activation_fusion": True,  # SwiGLU that keeps only its input, in torch
        "masked_softmax_fusion": False,  # of an attention that is not ours
        "gradient_accumulation_fusion": False,  # of apex
    }
    own = () if uses_transformer_engine(config) else ("core_attn",)  # our own attention does it itself
    if parts := [part for part in recomputed_parts(config) if part not in own]:
        fields |= {"recompute_granularity": "selective", "recompute_modules": parts}
    if uses_transformer_engine(config):
        fields |= {"moe_grouped_gemm": True, **fusions(config), **fp8_fields(config)}
        if (width := next(filter(None, windows(config)), None)) is not None:  # it has windows of its own
            limited = [int(window is not None) for window in windows(config)]
            fields |= {"window_size": (width, 0), "window_attn_skip_freq": limited}
    core = TransformerConfig(**(fields | engine_fields))
    if rope_type(config) == "yarn":  # megatron-core's attention reads these names (attention.py:1102)
        core.yarn_rotary_scaling_factor = config.attention.rotary_scaling_factor
        core.yarn_mscale, core.yarn_mscale_all_dim = config.attention.mscale, config.attention.mscale_all_dim
    return core


def fp8_fields(config: RunConfig) -> dict[str, Any]:
    """megatron-core's fields for fp8; they have the names of our settings, except for the format."""
    if config.precision.fp8_format is None:
        return {}
    given = asdict(config.precision)
    return {"fp8": given.pop("fp8_format"), "fp8_wgrad": not given.pop("no_fp8_wgrad"), **given}


def uses_transformer_engine(config: RunConfig) -> bool:
    """True if Transformer Engine makes the layers; an engine is opened with ``auto`` decided already."""
    return config.engine.transformer_impl == "transformer_engine"


def parameter_dtype(config: RunConfig) -> torch.dtype:
    """dtype of weights and activations; the optimizer works in float32 either way."""
    return torch.bfloat16 if config.train.bf16 else torch.float32


def padded_vocab_size(vocab_size: int, config: RunConfig) -> int:
    """Rows of the embedding.

    They depend on the layout only with --pad-vocab-size-to-tp; otherwise the loss is the same on every
    layout.
    """
    multiple = config.model.make_vocab_size_divisible_by
    if config.model.pad_vocab_size_to_tp:
        multiple *= config.parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def layer_specs(
    config: RunConfig,
    moe: ModuleSpec,
    *,
    starts: Callable[[], NextStarts] | None = None,
) -> list[ModuleSpec]:
    """Spec of each layer of the model: its MLP slot contains ``moe`` in MoE layers, one dense MLP in
    others.
    """
    mlp = dense_mlp(_mlp_parts())
    return [
        layer_spec(config, moe if routed else mlp, routed=routed, window=window, starts=starts)
        for routed, window in zip(moe_layers(config), windows(config), strict=True)
    ]


def layer_spec(
    config: RunConfig,
    mlp: ModuleSpec,
    *,
    routed: bool = True,
    window: int | None = None,
    starts: Callable[[], NextStarts] | None = None,
) -> ModuleSpec:
    """Spec of one transformer layer with ``mlp`` in its MLP slot, a mixture of experts where it is
    ``routed``; ``window`` and ``starts`` as in :class:`ScaledDotProductAttention`.
    """
    core = ModuleSpec(module=ScaledDotProductAttention, params=_core_params(config, window, starts))
    params = {"attn_mask_type": AttnMaskType.causal, "run": config, "norm": RMSNorm, "core_attention": core}
    latent = ModuleSpec(module=LatentAttention, params=params)
    if uses_transformer_engine(config):
        spec = fused_layer_spec(config, mlp if routed else None)
        if config.attention.multi_latent_attention:
            spec.submodules.input_layernorm, spec.submodules.self_attention = fused_norm(), latent
        return spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.model.qk_layernorm)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if config.attention.multi_latent_attention:
        parts.self_attention = latent
    else:
        attention = parts.self_attention.submodules
        attention.core_attention = core
        if config.model.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    parts.mlp = mlp
    return spec


def _core_params(
    config: RunConfig, window: int | None, starts: Callable[[], NextStarts] | None
) -> dict[str, Any]:
    params = {"recompute": "core_attn" in recomputed_parts(config), "window": window}
    if not resets_documents(config):
        return params
    if starts is None:
        raise ValueError("--reset-attention-mask and --reset-position-ids need the argument starts=...")
    crosses = not config.data.reset_attention_mask
    return params | {"starts": starts, "rates_R": rates(config) if crosses else None}


def mtp_spec(layer: ModuleSpec) -> ModuleSpec:
    """Spec of a layer of multi-token prediction around a transformer layer (DeepSeek-V3, 2412.19437, section
    2.2).
    """
    parts = prediction_parts(
        layer, enorm=RMSNorm, hnorm=RMSNorm, eh_proj=ColumnParallelLinear, layer_norm=RMSNorm
    )
    return ModuleSpec(module=MultiTokenPredictionLayer, submodules=parts)


def expert_spec(config: RunConfig, *, apart: bool = False) -> ModuleSpec:
    """Spec of the experts of a rank, for megatron-core's MoE layer; ``apart``: each is a separate module
    that can be called.
    """
    if uses_transformer_engine(config):
        return fused_expert_spec(config, grouped=not apart)
    return ModuleSpec(module=SequentialMLP, submodules=_mlp_parts())


def shared_expert_spec() -> ModuleSpec:
    """Spec of the expert that processes every token in addition to the chosen ones; all tensor-parallel
    ranks share it.
    """
    return ModuleSpec(module=SharedExpertMLP, submodules=_mlp_parts())


def _mlp_parts() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def turn_by_rates(positions: RotaryEmbedding, config: RunConfig) -> None:
    """Give megatron-core's rotary positions the rates of the settings, which it knows only in part."""
    positions.inv_freq = rates(config)


def last_norm(config: RunConfig) -> type:
    """Class of the norm after the last layer."""
    return fused_norm() if uses_transformer_engine(config) else RMSNorm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor and with its ``sequence_parallel`` mark on the
    weight.

    megatron-core's own wrapper of torch's norms refuses sequence parallelism, because it does not set this
    mark (torch_norm.py:32).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - a host's mark


def _leave(weight: Tensor) -> Tensor:
    return weight
