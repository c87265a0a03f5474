"""Settings of attention beyond its sizes: positions, latent attention, windows.  Names and meanings are
Megatron-LM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from megatron_hyperrouter.config.kinds import Count, NonNegative, Written
from megatron_hyperrouter.config.roles import Role


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Position embeddings and attention variants."""

    add_qkv_bias: Annotated[bool, Role.SHAPE, "Add a bias to queries, keys and values"] = False
    rotary_percent: Annotated[
        float, Gt(0.0), Le(1.0), Role.FUNCTION, "Fraction of each head's channels that get rotary embeddings"
    ] = 1.0
    rotary_seq_len_interpolation_factor: Annotated[
        float | None, Ge(1.0), Role.FUNCTION, "Linear scaling: divide positions by this; default: none"
    ] = None
    use_rope_scaling: Annotated[bool, Role.FUNCTION, "Scale rotary positions as Llama 3 does"] = False
    rope_scaling_factor: Annotated[
        float, Ge(1.0), Role.FUNCTION, "With --use-rope-scaling: scaling factor of the lowest frequencies"
    ] = 8.0
    rope_type: Annotated[
        Literal["rope", "yarn"] | None,
        Role.FUNCTION,
        "Rotary positions, or their YaRN scaling; default: yarn with --multi-latent-attention, else rope",
    ] = None
    rotary_scaling_factor: Annotated[
        float, Ge(1.0), Role.FUNCTION, "YaRN: how much longer the context is than the original one"
    ] = 1.0
    original_max_position_embeddings: Annotated[
        Count, Role.FUNCTION, "YaRN: length of the context before it was extended"
    ] = 4096
    beta_fast: Annotated[
        float, Gt(0.0), Role.FUNCTION, "YaRN: channels with more rotations than this are not scaled"
    ] = 32.0
    beta_slow: Annotated[
        float, Gt(0.0), Role.FUNCTION, "YaRN: channels with fewer rotations than this are fully scaled"
    ] = 1.0
    mscale: Annotated[NonNegative, Role.FUNCTION, "YaRN: strength of the attention temperature"] = 1.0
    mscale_all_dim: Annotated[
        NonNegative, Role.FUNCTION, "YaRN: strength of the temperature in latent attention's scores"
    ] = 0.0
    multi_latent_attention: Annotated[
        bool, Role.SHAPE, "Attention through low-rank queries, keys and values (DeepSeek-V2)"
    ] = False
    q_lora_rank: Annotated[
        Count | None, Role.SHAPE, "Latent attention: rank of the queries; default: full rank"
    ] = None
    kv_lora_rank: Annotated[Count, Role.SHAPE, "Latent attention: rank of keys and values"] = 32
    qk_head_dim: Annotated[
        Count, Role.SHAPE, "Latent attention: channels of a query or key without positions"
    ] = 128
    qk_pos_emb_head_dim: Annotated[
        Count, Role.SHAPE, "Latent attention: channels of a query or key with rotary positions"
    ] = 64
    v_head_dim: Annotated[Count, Role.SHAPE, "Latent attention: channels of a value"] = 128
    window_size: Annotated[
        Written | None,
        Role.FUNCTION,
        "Sliding window, LEFT,0: a token attends to itself and LEFT tokens before it; default: to all",
    ] = None
    window_attn_skip_freq: Annotated[
        Written | None,
        Role.FUNCTION,
        "Which layers have the window. N: every layer except each Nth; or a list or an expression, with "
        "1 for a window and 0 for full attention; default: all",
    ] = None
