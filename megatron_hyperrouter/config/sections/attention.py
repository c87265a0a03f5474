"""Settings of attention beyond its sizes: positions, latent attention, windows.  Names and meanings are
Megatron-LM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from megatron_hyperrouter.config.kinds import Count, NonNegative, YamlWord
from megatron_hyperrouter.config.roles import Metavar, Role


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Position embeddings and attention variants."""

    add_qkv_bias: Annotated[bool, Role.SHAPE, "Add a bias to queries, keys and values"] = False
    rotary_percent: Annotated[
        float,
        Gt(0.0),
        Le(1.0),
        Role.FUNCTION,
        "Fraction of the dimensions of each head that get rotary position embeddings",
    ] = 1.0
    rotary_seq_len_interpolation_factor: Annotated[
        float | None,
        Ge(1.0),
        Role.FUNCTION,
        "Divide positions by X (linear position interpolation); default: no interpolation",
    ] = None
    use_rope_scaling: Annotated[bool, Role.FUNCTION, "Scale rotary frequencies as Llama 3 does"] = False
    rope_scaling_factor: Annotated[
        float, Ge(1.0), Role.FUNCTION, "With --use-rope-scaling: divide the lowest rotary frequencies by X"
    ] = 8.0
    rope_type: Annotated[
        Literal["rope", "yarn"] | None,
        Role.FUNCTION,
        "Type of rotary position embedding. rope: plain; yarn: scaled by YaRN; default: yarn "
        "with --multi-latent-attention, else rope",
    ] = None
    rotary_scaling_factor: Annotated[
        float,
        Ge(1.0),
        Role.FUNCTION,
        "With --rope-type yarn: extended context length divided by the original context length",
    ] = 1.0
    original_max_position_embeddings: Annotated[
        Count, Role.FUNCTION, "With --rope-type yarn: original context length, before the extension"
    ] = 4096
    beta_fast: Annotated[
        float,
        Gt(0.0),
        Role.FUNCTION,
        "With --rope-type yarn: dimensions that rotate more than X times over the original "
        "context length are not scaled",
    ] = 32.0
    beta_slow: Annotated[
        float,
        Gt(0.0),
        Role.FUNCTION,
        "With --rope-type yarn: dimensions that rotate less than X times over the original "
        "context length are fully scaled",
    ] = 1.0
    mscale: Annotated[
        NonNegative,
        Role.FUNCTION,
        "With --rope-type yarn: multiply rotated queries and keys by f(X) / "
        "f(--mscale-all-dim), where f(m) = 0.1 x m x ln(--rotary-scaling-factor) + 1",
    ] = 1.0
    mscale_all_dim: Annotated[
        NonNegative,
        Role.FUNCTION,
        (
            "With --rope-type yarn and --multi-latent-attention: multiply attention scores by (0.1 "
            "x X x ln(--rotary-scaling-factor) + 1)^2; 0: no scaling"
        ),
    ] = 0.0
    multi_latent_attention: Annotated[
        bool, Role.SHAPE, "Use multi-latent attention (DeepSeek-V2), with low-rank queries, keys and values"
    ] = False
    q_lora_rank: Annotated[
        Count | None, Role.SHAPE, "With --multi-latent-attention: rank of queries; default: full rank"
    ] = None
    kv_lora_rank: Annotated[Count, Role.SHAPE, "With --multi-latent-attention: rank of keys and values"] = 32
    qk_head_dim: Annotated[
        Count,
        Role.SHAPE,
        "With --multi-latent-attention: number of dimensions without rotary positions in a query or key head",
    ] = 128
    qk_pos_emb_head_dim: Annotated[
        Count,
        Role.SHAPE,
        "With --multi-latent-attention: number of dimensions with rotary positions in a query or key head",
    ] = 64
    v_head_dim: Annotated[
        Count, Role.SHAPE, "With --multi-latent-attention: number of dimensions in a value head"
    ] = 128
    window_size: Annotated[
        YamlWord | None,
        Role.FUNCTION,
        Metavar("LEFT,0"),
        "Sliding-window attention: a token attends to itself and the LEFT tokens before it; "
        "default: full attention",
    ] = None
    window_attn_skip_freq: Annotated[
        YamlWord | None,
        Role.FUNCTION,
        Metavar("N|LIST"),
        "Which layers have a sliding window. N: all layers except every Nth; LIST: a 1 (window) "
        "or a 0 (full attention) for each layer, also as an expression such as ([1]*3+[0]*1); "
        "default: all layers",
    ] = None
