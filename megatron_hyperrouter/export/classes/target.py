"""Which class of transformers computes what a run computes, and its ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_hyperrouter.config.derived import dense_width, expert_width, has_dense_layers
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.export.classes.family import Family, unfollowed
from megatron_hyperrouter.export.classes.grouped import GLM4_MOE, MIXTRAL_MOE, QWEN2_MOE, QWEN3_MOE
from megatron_hyperrouter.export.classes.latent import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_hyperrouter.export.classes.names import ModelShape, Naming
from megatron_hyperrouter.export.classes.rotary import rope_parameters

CHOICE_BIAS = "e_score_correction_bias"
_GROUPED, _LATENT = (QWEN3_MOE, MIXTRAL_MOE, QWEN2_MOE, GLM4_MOE), (DEEPSEEK_V2, DEEPSEEK_V3)
FAMILIES = {family.architecture: family for family in (*_GROUPED, *_LATENT)}
_ROUTER = """
init_std bias score_function pre_softmax renormalise jitter_eps aux_loss expert_bias bias_update_rate freeze
num_groups group_topk scaling_factor
""".split()


@dataclass(frozen=True)
class Target:
    """A class of transformers, with the fields that occur only in its ``config.json``."""

    architecture: str
    model_type: str
    naming: Naming
    fields: Mapping[str, Any]
    topks: tuple[int, ...]  # values of k at which it computes the same
    router_leaves: tuple[str, ...] = ("weight",)
    custom_code: bool = False

    @property
    def sums_to_one(self) -> bool:
        """A token's weights sum to 1."""
        return bool(self.fields.get("norm_topk_prob", True))


def choose(run: RunConfig, options: Any, topk: int) -> Target:
    """The class for a run whose folded router has these options and that is used at ``topk``;
    CheckpointError with all reasons if there is none.
    """
    if run.model.mlp_type != "standard":
        raise no_class(["no class supports --mlp-type residual"], custom_code=False)
    if unknown := _changed(options, _ROUTER):
        flags = [f"--router.{name.replace('_', '-')}" for name in unknown]
        raise no_class([f"no class supports {', '.join(flags)}"])
    if options.bias:
        raise no_class(["no class supports a bias on the router logits"])
    if options.expert_bias and options.score_function == "softmax":
        raise no_class(["no class supports --router.expert-bias with softmax scores"])
    reasons = []
    for family in _LATENT if run.attention.multi_latent_attention else _GROUPED:
        found = family.reasons(run, options, topk)
        if not found:
            return target_of(family, run, options)
        reasons.append(f"{family.title} " + "; it ".join(found))
    raise no_class(reasons)


def check_served(architecture: str, served: Sequence[int], topks: Iterable[int], flag: str) -> None:
    """ConfigError for values of k, given by ``flag``, that are not ``served``: the class would choose other
    experts.
    """
    allowed = f"from {served[0]} to {served[-1]}" if served[1:] else f"{served[0]}"
    rule = f"must be {allowed}: for any other k, {architecture} chooses different experts"
    found = [Problem(flag, k, rule, "use one of these values") for k in topks if k not in served]
    if found:
        raise ConfigError(found)


def target_of(family: Family, run: RunConfig, options: Any) -> Target:
    """The class with its fields."""
    leaves = ("weight", CHOICE_BIAS) if family.choice_bias else ("weight",)
    return Target(
        family.architecture,
        family.model_type,
        family.naming,
        family.fields(run, options),
        family.topks(run, options),
        leaves,
    )


def refuse_unknown(run: RunConfig, followed: tuple[str, ...], what: str) -> None:
    """CheckpointError for settings of the model that are not ``followed``."""
    if found := unfollowed(run, followed):
        raise CheckpointError(
            f"{what} does not support these settings of the run: {', '.join(found)}",
            remedy="use mhr evaluate, which supports every model",
        )


def _changed(settings: Any, known: list[str]) -> list[str]:
    """Fields that are not ``known`` and have another value than their default."""
    found = []
    for each in fields(settings):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name not in known and getattr(settings, each.name) != default:
            found.append(each.name)
    return found


def no_class(reasons: Iterable[str], *, custom_code: bool = True) -> CheckpointError:
    """The refusal; ``custom_code``: whether --custom-code may be the way out."""
    lines = list(reasons)
    told = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  - {line}" for line in lines)
    return CheckpointError(
        f"no transformers class implements this model:{told}",
        remedy="add --custom-code to export with modeling code (needs transformers 5 and trust_remote_code)"
        if custom_code
        else "use mhr evaluate instead; docs/interop.md lists the models that can be exported",
    )


def config_json(
    run: RunConfig, target: Target, *, rows: int, eod: int | None, dtype: str, topk: int
) -> dict[str, object]:
    """``config.json`` in the spellings of transformers 4 and 5; ``rows`` of the embedding, ``eod``: the id
    that ends a text.
    """
    model, sizes, theta = run.model, ModelShape.of(run), float(run.model.rotary_base)
    own = dict(target.fields)
    rope = rope_parameters(run) | {"rope_theta": theta} | own.pop("rope_parameters", {})
    common = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": sizes.heads.queries,
        "num_key_value_heads": sizes.heads.groups,
        "head_dim": sizes.heads.channels,
        "intermediate_size": dense_width(run) if has_dense_layers(run) else expert_width(run),
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": theta,
        "rope_parameters": rope,
        **_older_spelling(rope),
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
    return common | own


def _older_spelling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling``, which transformers 4 reads, where positions are scaled."""
    if rope["rope_type"] == "default":
        return {}
    return {"rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"}}
