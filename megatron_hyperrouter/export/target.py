"""Which class of transformers computes what a run computes, and its ``config.json``.

The question goes to the options of the *folded* router, so that a new router that folds has its class for
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.names import MIXTRAL, QWEN, Naming, Sizes

CHOICE_BIAS = "e_score_correction_bias"

# Settings that the mapping follows.  Any other one that bears on the model must be off: an export that leaves
# out what it does not know would be another model.
_MODEL = """
num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size moe_ffn_hidden_size
qk_layernorm untie_embeddings_and_output_weights norm_epsilon rotary_base make_vocab_size_divisible_by
num_experts
moe_router_topk moe_expert_capacity_factor mlp_type
""".split()
_ROUTER = """
init_std bias score_function pre_softmax renormalise jitter_eps aux_loss expert_bias bias_update_rate freeze
""".split()


@dataclass(frozen=True)
class Target:
    """A class of transformers, with the fields that only its ``config.json`` has."""

    architecture: str
    model_type: str
    naming: Naming
    fields: Mapping[str, object]
    router_leaves: tuple[str, ...] = ("weight",)
    rope_fields: Mapping[str, object] = field(default_factory=dict)
    custom_code: bool = False

    @property
    def sums_to_one(self) -> bool:
        """A token's weights sum to 1."""
        return bool(self.fields.get("norm_topk_prob", True))


def choose(run: RunConfig, options: Any) -> Target:
    """The class for a run whose folded router has these options; CheckpointError with the reason where there
    is none.
    """
    if run.model.mlp_type != "standard":
        raise no_class("--mlp-type residual adds a dense MLP beside the experts")
    refuse_unknown(run, options)
    if options.bias:
        raise no_class("the router adds a bias to its logits")
    if options.expert_bias and options.score_function == "softmax":
        raise no_class("--router.expert-bias moves a choice among softmax scores")
    if options.score_function == "sigmoid":
        return glm4_moe(run, renormalise=options.renormalise)
    if run.model.qk_layernorm:
        return qwen3_moe(run, renormalise=options.sums_to_one)
    if not options.sums_to_one:
        raise no_class("the weights of a token's experts do not sum to 1, and there are no q/k norms")
    return mixtral(run)


def refuse_unknown(run: RunConfig, options: Any) -> None:
    """CheckpointError for settings of the model, or options of the folded router, that are not followed."""
    leaves = [leaf for leaf in leaves_with(Role.SHAPE, Role.FUNCTION) if leaf.name not in _MODEL]
    found = [leaf.flag for leaf in leaves if value_of(run, leaf.name) != leaf.default]
    if options is not None:
        found += [f"--router.{name.replace('_', '-')}" for name in _changed(options, _ROUTER)]
    if found:
        raise CheckpointError(
            f"this run has settings that have no counterpart here: {', '.join(found)}",
            remedy="leaving them out would make another model; this version has no way around it",
        )


def _changed(settings: Any, known: list[str]) -> list[str]:
    """Fields that are not ``known`` and have another value than their default."""
    found = []
    for each in fields(settings):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name not in known and getattr(settings, each.name) != default:
            found.append(each.name)
    return found


def no_class(reason: str) -> CheckpointError:
    """The refusal."""
    return CheckpointError(
        f"no class of transformers computes this model: {reason}",
        remedy="--custom-code writes a modeling file that does (transformers 5, trust_remote_code)",
    )


def expert_width(run: RunConfig) -> int:
    """Hidden units of one expert."""
    model = run.model
    return model.moe_ffn_hidden_size or model.ffn_hidden_size or 4 * model.hidden_size


def qwen3_moe(run: RunConfig, *, renormalise: bool) -> Target:
    """Softmax gate, q/k norms."""
    return Target(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        QWEN,
        {
            "num_experts": run.model.num_experts,
            "moe_intermediate_size": expert_width(run),
            "norm_topk_prob": renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": None,
        },
    )


def mixtral(run: RunConfig) -> Target:
    """Softmax gate that always sums to 1, no q/k norms."""
    fields = {"num_local_experts": run.model.num_experts, "sliding_window": None}
    return Target("MixtralForCausalLM", "mixtral", MIXTRAL, fields)


def glm4_moe(run: RunConfig, *, renormalise: bool) -> Target:
    """Sigmoid gate, with or without a choice bias and q/k norms; its shared expert has no rows."""
    return Target(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        QWEN,
        {
            "n_routed_experts": run.model.num_experts,
            "moe_intermediate_size": expert_width(run),
            "n_shared_experts": 0,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": renormalise,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": run.model.qk_layernorm,
            "partial_rotary_factor": 1.0,
        },
        router_leaves=("weight", CHOICE_BIAS),
        rope_fields={"partial_rotary_factor": 1.0},
    )


def config_json(
    run: RunConfig, target: Target, *, rows: int, eod: int | None, dtype: str, topk: int
) -> dict[str, object]:
    """``config.json`` in the spellings of transformers 4 and 5; ``rows`` of the embedding, ``eod``: the id
    that ends a text.
    """
    model, sizes = run.model, Sizes.of(run.model)
    theta = float(model.rotary_base)
    common = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": sizes.heads.queries,
        "num_key_value_heads": sizes.heads.groups,
        "head_dim": sizes.heads.channels,
        "intermediate_size": expert_width(run),
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **target.rope_fields},
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "tie_word_embeddings": sizes.tied,
        "num_experts_per_tok": topk,
        "output_router_logits": False,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    return common | dict(target.fields)
