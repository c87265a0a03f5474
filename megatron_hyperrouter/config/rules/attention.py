"""Rules about the forms of attention: positions, latent attention, windows."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperrouter.config.derived import (
    resets_documents,
    rope_type,
    rotary_channels,
    window_width,
    windows,
)
from megatron_hyperrouter.config.rules.base import Rule, broken, needs
from megatron_hyperrouter.config.sections.attention import AttentionConfig
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_YARN = ("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


def _given(config: RunConfig, names: tuple[str, ...]) -> Iterator[str]:
    """Which of these settings have another value than their default."""
    return (name for name in names if getattr(config.attention, name) != getattr(AttentionConfig(), name))


def latent_settings_need_latent_attention(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The ranks and head widths of latent attention say nothing about grouped-query attention."""
    if not config.attention.multi_latent_attention:
        for name in _given(config, _LATENT):
            yield needs(config, name, "--multi-latent-attention")


def latent_attention_has_no_groups(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """With latent attention, each head has separate keys and values, without biases."""
    if not config.attention.multi_latent_attention:
        return
    groups = config.model.num_query_groups
    if groups not in (None, config.model.num_attention_heads):
        rule = "cannot be combined with --multi-latent-attention, where each head has its own keys"
        yield broken(config, "num_query_groups", rule, "leave out FLAG")
    for name, none in (("add_qkv_bias", False), ("rotary_percent", 1.0)):
        if getattr(config.attention, name) != none:
            rule = "cannot be combined with --multi-latent-attention"
            yield broken(config, name, rule, "leave out FLAG")


def latent_attention_within_documents(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Positions that count from the beginning of each document, with attention across documents."""
    crosses = resets_documents(config) and not config.data.reset_attention_mask
    if config.attention.multi_latent_attention and crosses:
        rule = "needs --reset-attention-mask when --multi-latent-attention is on"
        yield broken(config, "reset_position_ids", rule, "add --reset-attention-mask, or leave out FLAG")


def one_scaling_of_positions(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Linear scaling, Llama 3's and YaRN exclude one another, and their settings need them."""
    attention, yarn = config.attention, rope_type(config) == "yarn"
    linear = attention.rotary_seq_len_interpolation_factor not in (None, 1.0)
    if attention.use_rope_scaling and (linear or yarn):
        other = "--rope-type yarn" if yarn else "--rotary-seq-len-interpolation-factor"
        yield broken(
            config, "use_rope_scaling", f"cannot be combined with {other}", "keep one of the two flags"
        )
    if linear and yarn:
        name, rule = "rotary_seq_len_interpolation_factor", "cannot be combined with --rope-type yarn"
        yield broken(config, name, rule, "keep one of the two flags")
    if not attention.use_rope_scaling:
        for name in _given(config, ("rope_scaling_factor",)):
            yield needs(config, name, "--use-rope-scaling")
    if not yarn:
        for name in _given(config, _YARN):
            yield needs(config, name, "--rope-type yarn")


def rotary_channels_are_pairs(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Rotary positions rotate pairs of dimensions, so their number must be even.  megatron-core's YaRN
    rotates all dimensions.
    """
    name = "qk_pos_emb_head_dim" if config.attention.multi_latent_attention else "rotary_percent"
    if config.attention.rotary_percent < 1.0 and rope_type(config) == "yarn":
        yield broken(config, "rotary_percent", "must be 1 with --rope-type yarn", "leave out FLAG")
    elif name == "qk_pos_emb_head_dim" or config.attention.rotary_percent < 1.0:
        channels = rotary_channels(config)
        if channels % 2 or channels == 0:
            rule = f"gives {channels} rotary dimensions; their number must be even and greater than 0"
            yield broken(config, name, rule, "choose a value that gives an even number of rotary dimensions")


def windows_fit_the_layers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The window and the pattern of layers that have one must be readable."""
    attention, pattern = config.attention, "window_attn_skip_freq"
    if attention.window_size is None and attention.window_attn_skip_freq is not None:
        yield needs(config, pattern, "--window-size")
    try:
        window_width(config)
    except ValueError as error:
        yield broken(config, "window_size", str(error), "write, for example, --window-size 128,0")
        return
    try:
        windows(config)
    except ValueError as error:
        yield broken(config, pattern, str(error), "write a 1 or a 0 for each layer, or leave out FLAG")


def mtp_within_its_engine(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Multi-token prediction reads shifted tokens; document boundaries and parts of samples would shift
    too.
    """
    if config.model.mtp_num_layers is None:
        return
    if resets_documents(config):
        rule = "cannot be combined with --reset-attention-mask or --reset-position-ids"
        yield broken(config, "mtp_num_layers", rule, "leave out FLAG, or those two flags")
    if config.parallel.context_parallel_size > 1:
        rule = "cannot be combined with --context-parallel-size greater than 1"
        yield broken(config, "mtp_num_layers", rule, "leave out FLAG, or use --context-parallel-size 1")


RULES: tuple[Rule, ...] = (
    latent_settings_need_latent_attention,
    latent_attention_has_no_groups,
    latent_attention_within_documents,
    one_scaling_of_positions,
    rotary_channels_are_pairs,
    windows_fit_the_layers,
    mtp_within_its_engine,
)
