"""The settings of a run for a Hugging Face model, and the parts of the model that this program cannot
compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer, tokenizer_of
from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.export.classes.latent import EPSILON
from megatron_hyperrouter.export.classes.rotary import rotary_settings
from megatron_hyperrouter.export.classes.target import FAMILIES, check_served
from megatron_hyperrouter.importing.source import EXPERTS, HfFolder, open_folder, rope_of, shared_width

_CHOICE_BIAS = "e_score_correction_bias"
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
# What config.json must say, because classes have other defaults.
_NEEDED_BY = {
    "DeepseekV3ForCausalLM": ("norm_topk_prob",),
    "Qwen3MoeForCausalLM": ("norm_topk_prob",),
    "Qwen2MoeForCausalLM": ("norm_topk_prob", "shared_expert_intermediate_size"),
    "Glm4MoeForCausalLM": ("norm_topk_prob", "first_k_dense_replace", "n_shared_experts"),
}
_DEEPSEEK = (
    "first_k_dense_replace n_shared_experts n_group topk_group routed_scaling_factor moe_intermediate_size "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
).split()
_POSITIVE = """
hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size rms_norm_eps
max_position_embeddings num_experts num_local_experts n_routed_experts num_experts_per_tok decoder_sparse_step
kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
""".split()
_OPTIONAL = """
vocab_size head_dim num_key_value_heads q_lora_rank rope_theta n_shared_experts first_k_dense_replace n_group
shared_expert_intermediate_size topk_group routed_scaling_factor num_nextn_predict_layers moe_layer_freq
""".split()
_FRACTIONS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor")  # all others are integers
_DEEPSEEK_V3, _DEEPSEEK_V2 = "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"
_GROUP_BEST = {_DEEPSEEK_V2: 1}  # experts by which a group is judged; the others count two


def fitting_folder(path: Path) -> HfFolder:
    """The folder; CheckpointError with every reason why our model cannot be this one."""
    folder = open_folder(path)
    if found := list(problems(folder)):
        raise CheckpointError(
            "\n  - ".join([f"this model is not supported: {path}", *found]),
            remedy="choose a model that is listed in docs/interop.md",
        )
    return folder


def problems(folder: HfFolder) -> Iterator[str]:
    """Settings of the folder that our model does not support."""
    config = folder.config
    needed = (*_NEEDED, *_NEEDED_BY.get(folder.architecture, ()), *(_DEEPSEEK if folder.latent else ()))
    missing = [name for name in needed if name not in config]
    yield from (f"config.json has no {name}" for name in missing)
    yield from (wrong := list(_wrong_values(config)))
    if "model.embed_tokens.weight" not in folder.reader:
        yield "the weights have no tensor model.embed_tokens.weight"
    elif (size := config.get("vocab_size", folder.rows)) != folder.rows:
        yield f"vocab_size is {size}, but model.embed_tokens.weight has {folder.rows} rows"
    if missing or wrong:
        return
    if folder.theta <= 1:
        yield f"rope_theta {folder.theta:g} must be greater than 1"
    try:
        rotary_settings(rope_of(config), latent=folder.latent)
    except ValueError as error:
        yield str(error)
    except KeyError as error:
        yield f"rope_parameters has no {error.args[0]}"
    if folder.architecture != "Glm4MoeForCausalLM":
        if config.get("attention_bias"):
            yield "attention_bias true is not supported, because it also adds a bias to the attention output"
        if not folder.latent and _turning_share(folder) != 1.0:
            share = _turning_share(folder)
            yield f"partial_rotary_factor {share:g} is not supported; for this model class, it must be 1"
    if _windowed(folder) and folder.architecture not in ("MixtralForCausalLM", "MistralForCausalLM"):
        yield "use_sliding_window true is not supported, because it affects only some layers"
    if folder.dense and _windowed(folder):
        yield "sliding-window attention is not supported with --upcycle"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {config['hidden_act']} is not supported; it must be silu (experts are SwiGLU)"
    if config.get("quantization_config"):
        yield "quantization_config is set, but quantized weights are not supported"
    if config.get("mlp_bias"):
        yield "mlp_bias true is not supported"
    if not folder.dense:
        yield from _expert_problems(folder)
    if folder.latent:
        yield from _latent_problems(config)


def _wrong_values(config: dict[str, Any]) -> Iterator[str]:
    for name in (*_POSITIVE, *_OPTIONAL):
        value, optional = config.get(name, 1), name in _OPTIONAL
        if value is None and optional:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and not optional):
            yield f"{name} is {value!r}, but must be a positive number"
        elif value != int(value) and name not in _FRACTIONS:
            yield f"{name} is {value!r}, but must be an integer"
    for name, kind, called in (
        ("rope_parameters", dict, "an object"),
        ("rope_scaling", dict, "an object"),
        ("mlp_only_layers", list, "a list"),
    ):
        if config.get(name) is not None and not isinstance(config[name], kind):
            yield f"{name} is {config[name]!r}, but must be {called}"


def _expert_problems(folder: HfFolder) -> Iterator[str]:
    config = folder.config
    if not any(name in config for name in EXPERTS):
        yield f"config.json must have one of {', '.join(EXPERTS)}, but has none"
        return
    if "num_experts_per_tok" not in config:
        yield "config.json has no num_experts_per_tok"
        return
    if not any(folder.routed):
        yield "according to config.json, no layer has experts"
    if int(config.get("moe_layer_freq") or 1) != 1:
        yield f"moe_layer_freq {config['moe_layer_freq']} is not supported (transformers ignores the value)"
    if folder.architecture == _DEEPSEEK_V2 and config.get("norm_topk_prob"):
        yield "norm_topk_prob true is not supported (transformers ignores the value for this model class)"
    groups, chosen = _groups(folder)
    if chosen >= groups:
        return
    size, best = folder.num_experts // groups, _GROUP_BEST.get(folder.architecture, 2)
    topk = int(config["num_experts_per_tok"])
    if (ours := min(max(topk // chosen, 1), size)) != best:
        yield (
            f"n_group {groups} is not supported: this model scores each group of experts by the "
            f"{_experts(best)}, but this program scores "
            f"it by the {_experts(ours)} (num_experts_per_tok / topk_group)"
        )


def _experts(count: int) -> str:
    return "best expert of the group" if count == 1 else f"{count} best experts of the group"


def _groups(folder: HfFolder) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use."""
    config = folder.config
    if folder.architecture == _DEEPSEEK_V2 and config.get("topk_method", "greedy") == "greedy":
        return 1, 1
    return int(config.get("n_group") or 1), int(config.get("topk_group") or 1)


def _latent_problems(config: dict[str, Any]) -> Iterator[str]:
    if config["rms_norm_eps"] != EPSILON:
        yield (
            f"rms_norm_eps {config['rms_norm_eps']:g} is not supported; it must be {EPSILON:g}, because the "
            "norms in latent attention always use this value"
        )
    if config.get("rope_interleave", True) is not True:
        yield "rope_interleave false is not supported"


def _windowed(folder: HfFolder) -> bool:
    config = folder.config
    if folder.architecture in ("MixtralForCausalLM", "MistralForCausalLM"):
        return config.get("sliding_window") is not None
    return bool(config.get("use_sliding_window"))


def _turning_share(folder: HfFolder) -> float:
    config, rope = folder.config, rope_of(folder.config)
    default = 0.5 if folder.architecture == "Glm4MoeForCausalLM" else 1.0
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or default)


def check_rows(tokenizer: Tokenizer, file: object, rows: int) -> None:
    """ConfigError if the tokenizer in ``file`` has ids that the embedding has no row for."""
    if tokenizer.vocab_size > rows:
        rule = f"has {tokenizer.vocab_size:,} token ids, but the model's vocab_size is only {rows:,}"
        remedy = f"give a tokenizer with at most {rows:,} ids"
        raise ConfigError([Problem("--tokenizer-model", file, rule, remedy)])


def check_tokenizer(run: RunConfig, file: object, rows: int) -> None:
    """:func:`check_rows` of the run's tokenizer."""
    check_rows(tokenizer_of(run.data), file, rows)


def equal_topks(folder: HfFolder, run: RunConfig) -> tuple[int, ...]:
    """Values of k at which the folder's class and the run compute the same."""
    return FAMILIES[folder.architecture].topks(run, run.router.options)


def check_equal(folder: HfFolder, run: RunConfig, topks: Iterable[int], flag: str) -> None:
    """ConfigError for values of k, given by ``flag``, at which they do not."""
    check_served(folder.architecture, equal_topks(folder, run), topks, flag)


def settings_of_folder(folder: HfFolder) -> dict[str, Any]:
    """The settings, by flat name, of a run whose model is this one; its router is ``topk``."""
    config, sizes = folder.config, folder.sizes
    settings: dict[str, Any] = {
        "num_layers": len(sizes.routed),
        "hidden_size": int(config["hidden_size"]),
        "num_attention_heads": sizes.heads.queries,
        "num_query_groups": sizes.heads.groups,
        "moe_ffn_hidden_size": folder.expert_width,
        "seq_length": int(config.get("max_position_embeddings", 4096)),
        "qk_layernorm": sizes.qk_norm,
        "untie_embeddings_and_output_weights": not sizes.tied,
        "norm_epsilon": float(config["rms_norm_eps"]),
        "rotary_base": folder.theta,
        # as many rows as the model has, whatever the tokenizer's size
        "make_vocab_size_divisible_by": folder.rows,
        "num_experts": sizes.num_experts,
        "moe_router_topk": int(config.get("num_experts_per_tok", 1)),
        "router": {"name": "topk", **_router(folder)},
        **rotary_settings(rope_of(config), latent=folder.latent),
    }
    if not all(sizes.routed):
        settings["moe_layer_freq"] = str(list(map(int, sizes.routed)))
        settings["ffn_hidden_size"] = int(config["intermediate_size"])
    if sizes.shared and not folder.dense:
        settings["moe_shared_expert_intermediate_size"] = shared_width(config)
        settings["moe_shared_expert_gate"] = sizes.shared_gate
    return settings | _attention(folder)


def _attention(folder: HfFolder) -> dict[str, Any]:
    config, sizes = folder.config, folder.sizes
    if folder.latent:
        return {
            "multi_latent_attention": True,
            "q_lora_rank": config.get("q_lora_rank"),
            "kv_lora_rank": int(config["kv_lora_rank"]),
            "qk_head_dim": int(config["qk_nope_head_dim"]),
            "qk_pos_emb_head_dim": int(config["qk_rope_head_dim"]),
            "v_head_dim": int(config["v_head_dim"]),
        }
    found: dict[str, Any] = {"kv_channels": sizes.heads.channels, "add_qkv_bias": sizes.qkv_bias}
    if (share := _turning_share(folder)) != 1.0:
        found["rotary_percent"] = share
    if _windowed(folder):  # their window includes the token itself
        found["window_size"] = f"{config['sliding_window'] - 1},0"
    return found


def _router(folder: HfFolder) -> dict[str, Any]:
    config = folder.config
    if folder.dense:
        return {}
    summed = bool(config.get("norm_topk_prob", folder.architecture == "MixtralForCausalLM"))
    if folder.architecture in ("Glm4MoeForCausalLM", _DEEPSEEK_V3):
        biased = any(name.endswith(_CHOICE_BIAS) for name in folder.reader.names())
        found: dict[str, Any] = {"score_function": "sigmoid", "renormalise": summed, "expert_bias": biased}
    else:
        found = {} if summed else {"pre_softmax": True}
    if (factor := float(config.get("routed_scaling_factor") or 1.0)) != 1.0:
        found["scaling_factor"] = factor
    groups, chosen = _groups(folder)
    return found | ({"num_groups": groups, "group_topk": chosen} if chosen < groups else {})
