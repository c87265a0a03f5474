"""The tensors of a Hugging Face folder: which part of which global weight each one is, and how to extract
it and put it back.

Legend: ``G`` key/value heads, ``N`` query heads, ``C`` channels of a head, ``D`` hidden size, ``E``
experts, ``F`` width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hyperrouter.config.derived import head_width, moe_layers, query_groups
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS

FINAL_NORM, OUTPUT = "decoder.final_layernorm.weight", "output_layer.weight"


class TensorPart(Enum):
    """Which part of our tensor a Hugging Face tensor is."""

    WHOLE = "whole"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    GATE = "gate"
    UP = "up"
    TWICE = "twice"  # times 2: exact
    STACK = "stack"  # all experts in one tensor
    MADE = "made"  # such as a folded router: no tensor of ours has it


class TensorSource(NamedTuple):
    """The tensors of ours that a Hugging Face tensor comes from."""

    ours: tuple[str, ...]
    part: TensorPart = TensorPart.WHOLE


class Heads(NamedTuple):
    """Sizes of the attention."""

    queries: int
    groups: int
    channels: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes and settings that determine which tensors a model has."""

    num_experts: int
    heads: Heads
    qk_norm: bool
    tied: bool
    routed: tuple[bool, ...]  # for each layer whether it has experts; others have one dense MLP
    qkv_bias: bool = False
    shared: bool = False  # an expert that sees every token
    shared_gate: bool = False
    latent: bool = False  # attention
    low_rank_queries: bool = False

    @classmethod
    def of(cls, run: RunConfig) -> ModelShape:
        """Of a run's settings."""
        model, attention = run.model, run.attention
        return cls(
            num_experts=model.num_experts,
            heads=Heads(model.num_attention_heads, query_groups(run), head_width(run)),
            qk_norm=model.qk_layernorm,
            tied=not model.untie_embeddings_and_output_weights,
            routed=moe_layers(run),
            qkv_bias=attention.add_qkv_bias,
            shared=model.moe_shared_expert_intermediate_size is not None,
            shared_gate=model.moe_shared_expert_gate,
            latent=attention.multi_latent_attention,
            low_rank_queries=attention.q_lora_rank is not None,
        )


@dataclass(frozen=True)
class Naming:
    """How a class of transformers names its MoE layer; the rest of the layer has one name in all of them."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    packed: bool = False  # experts stacked in two tensors instead of one by one
    gated_shared_expert: bool = False


QWEN = Naming()
QWEN2 = Naming(gated_shared_expert=True)
MIXTRAL = Naming(moe="block_sparse_moe", gate="w1", up="w3", down="w2")
PACKED = Naming(packed=True, gated_shared_expert=True)

_ALIKE = {  # Hugging Face's name inside a layer -> ours
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
}
_QK_NORMS = {
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}
_LATENT = {
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
}
_LOW_RANK_QUERIES = {
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
}
_FULL_RANK_QUERIES = {"self_attn.q_proj.weight": "self_attention.linear_q_proj.weight"}
_QKV = {"q": TensorPart.QUERY, "k": TensorPart.KEY, "v": TensorPart.VALUE}
SHARED_GATE = "mlp.shared_experts.gate_weight"


def tensor_sources(
    sizes: ModelShape, naming: Naming, router_leaves: Sequence[str] = ("weight",)
) -> dict[str, TensorSource]:
    """Hugging Face's name -> place, in the order of the layers; ``router_leaves``: the router's tensors
    there.
    """
    found = {"model.embed_tokens.weight": TensorSource((WORD_EMBEDDINGS,))}
    for layer, routed in enumerate(sizes.routed):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        found |= _attention(ours, theirs, sizes)
        if not routed:
            found |= _mlp(f"{ours}mlp.", f"{theirs}mlp.")
            continue
        router = f"{ours}mlp.router."
        found |= {
            f"{theirs}{naming.moe}.gate.{leaf}": TensorSource((router + leaf,), TensorPart.MADE)
            for leaf in router_leaves
        }
        found |= _experts(ours, theirs, sizes.num_experts, naming)
        if sizes.shared:
            found |= _shared_expert(ours, theirs, sizes, naming)
    found["model.norm.weight"] = TensorSource((FINAL_NORM,))
    if not sizes.tied:
        found["lm_head.weight"] = TensorSource((OUTPUT,))
    return found


def _attention(ours: str, theirs: str, sizes: ModelShape) -> dict[str, TensorSource]:
    alike = dict(_ALIKE)
    found: dict[str, TensorSource] = {}
    if not sizes.latent:
        for kind in ("weight", "bias") if sizes.qkv_bias else ("weight",):
            qkv = (f"{ours}self_attention.linear_qkv.{kind}",)
            found |= {
                f"{theirs}self_attn.{leaf}_proj.{kind}": TensorSource(qkv, part)
                for leaf, part in _QKV.items()
            }
        alike |= _QK_NORMS if sizes.qk_norm else {}
    else:
        alike |= _LATENT | (_LOW_RANK_QUERIES if sizes.low_rank_queries else _FULL_RANK_QUERIES)
        if not sizes.qk_norm:
            alike = {hf: own for hf, own in alike.items() if "_a_layernorm" not in hf}
    return found | {theirs + hf: TensorSource((ours + own,)) for hf, own in alike.items()}


def _mlp(ours: str, theirs: str, down: TensorPart = TensorPart.WHOLE) -> dict[str, TensorSource]:
    first, second = f"{ours}linear_fc1.weight", f"{ours}linear_fc2.weight"
    return {
        f"{theirs}gate_proj.weight": TensorSource((first,), TensorPart.GATE),
        f"{theirs}up_proj.weight": TensorSource((first,), TensorPart.UP),
        f"{theirs}down_proj.weight": TensorSource((second,), down),
    }


def _shared_expert(ours: str, theirs: str, sizes: ModelShape, naming: Naming) -> dict[str, TensorSource]:
    """If the class always has a gate, write a gate of zeros, whose sigmoid is 1/2, and double the output."""
    expert = f"{ours}mlp.shared_experts."
    if not naming.gated_shared_expert:
        return _mlp(expert, f"{theirs}mlp.shared_experts.")
    found = _mlp(
        expert, f"{theirs}mlp.shared_expert.", TensorPart.WHOLE if sizes.shared_gate else TensorPart.TWICE
    )
    gate = TensorSource((ours + SHARED_GATE,), TensorPart.WHOLE if sizes.shared_gate else TensorPart.MADE)
    return found | {f"{theirs}mlp.shared_expert_gate.weight": gate}


def _experts(ours: str, theirs: str, num_experts: int, naming: Naming) -> dict[str, TensorSource]:
    first, second = (
        tuple(f"{ours}mlp.experts.local_experts.{expert}.linear_{fc}.weight" for expert in range(num_experts))
        for fc in ("fc1", "fc2")
    )
    experts = f"{theirs}{naming.moe}.experts."
    if naming.packed:
        return {
            f"{experts}gate_up_proj": TensorSource(first, TensorPart.STACK),
            f"{experts}down_proj": TensorSource(second, TensorPart.STACK),
        }
    found: dict[str, TensorSource] = {}
    for expert in range(num_experts):
        found |= {
            f"{experts}{expert}.{naming.gate}.weight": TensorSource((first[expert],), TensorPart.GATE),
            f"{experts}{expert}.{naming.up}.weight": TensorSource((first[expert],), TensorPart.UP),
            f"{experts}{expert}.{naming.down}.weight": TensorSource((second[expert],)),
        }
    return found


def cut(ours: Sequence[Tensor], part: TensorPart, heads: Heads) -> Tensor:
    """The Hugging Face tensor out of ours; works on the meta device as well."""
    if part is TensorPart.STACK:
        return torch.stack(list(ours))
    (whole,) = ours
    if part in (TensorPart.GATE, TensorPart.UP):  # [gate; up]
        return whole.chunk(2)[part is TensorPart.UP].contiguous()
    if part in (TensorPart.QUERY, TensorPart.KEY, TensorPart.VALUE):
        # megatron-core: for each group its query heads, then its key, then its value
        per_group = heads.queries // heads.groups
        rows = whole.view(heads.groups, per_group + 2, heads.channels, *whole.shape[1:])
        chosen = {
            TensorPart.QUERY: slice(per_group),
            TensorPart.KEY: slice(per_group, per_group + 1),
            TensorPart.VALUE: slice(per_group + 1, None),
        }
        return rows[:, chosen[part]].reshape(-1, *whole.shape[1:]).contiguous()
    return whole * 2 if part is TensorPart.TWICE else whole


def join(parts: Mapping[TensorPart, Tensor], heads: Heads) -> Tensor:
    """Our tensor from its parts: the inverse of :func:`cut`; stacks are separated by index."""
    if TensorPart.GATE in parts:
        return torch.cat((parts[TensorPart.GATE], parts[TensorPart.UP]))
    if TensorPart.QUERY not in parts:
        return parts[TensorPart.WHOLE]
    groups, channels, width = heads.groups, heads.channels, parts[TensorPart.QUERY].shape[1:]
    query = parts[TensorPart.QUERY].view(groups, heads.queries // groups, channels, *width)
    key, value = (
        parts[part].view(groups, 1, channels, *width) for part in (TensorPart.KEY, TensorPart.VALUE)
    )
    return torch.cat((query, key, value), 1).reshape(-1, *width).contiguous()
