"""The description of a class of transformers, and the rules that several classes share. The rules only look
at the options of the *folded* router, so a new router that can be folded needs no changes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.derived import expert_width, moe_layers
from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.classes.names import Naming
from megatron_hyperrouter.export.classes.rotary import ROTARY_SETTINGS

DENSE_LAYERS = ("moe_layer_freq",)
SHARED_EXPERTS = ("moe_shared_expert_intermediate_size",)
# Settings of the model that every class follows, or that ``lacks`` asks about.
_EVERYWHERE = """
num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size moe_ffn_hidden_size
qk_layernorm untie_embeddings_and_output_weights norm_epsilon rotary_base make_vocab_size_divisible_by
pad_vocab_size_to_tp num_experts moe_router_topk moe_expert_capacity_factor mlp_type
""".split()


@dataclass(frozen=True)
class Family:
    """A class of transformers."""

    title: str  # for people
    architecture: str
    model_type: str
    naming: Naming
    settings: tuple[str, ...]  # that it has beyond those of plain layers
    # which settings of a run and options of its router it does not support
    lacks: Callable[[RunConfig, Any], Iterator[str]]
    fields: Callable[[RunConfig, Any], dict[str, Any]]  # of ``config.json``, beyond those of all classes
    choice_bias: bool = False
    group_best: int | None = None  # experts by which it judges a group; None: it has no groups

    def reasons(self, run: RunConfig, options: Any, topk: int) -> list[str]:
        """Why this class does not compute the run's model; empty if it does."""
        flags = unfollowed(run, self.settings)
        found = [f"does not support {', '.join(flags)}"] if flags else []
        if options.groups is not None and self.group_best is None:
            found.append("does not support groups of experts")
        elif options.groups is not None and topk not in (fit := self.topks(run, options)):
            where = f"; this router scores groups in the same way only at k = {_span(fit)}" if fit else ""
            found.append(f"scores a group of experts by its {self.group_best} best experts{where}")
        return found + list(self.lacks(run, options))

    def topks(self, run: RunConfig, options: Any) -> tuple[int, ...]:
        """Values of k at which it computes the same."""
        groups = options.groups
        if groups is None:
            return tuple(range(1, run.model.num_experts + 1))
        size = int(run.model.num_experts // groups.total)

        def counted(k: int) -> int:  # as in ops/topk.py: k divided by the number of groups
            return min(max(k // int(groups.chosen), 1), size)

        return tuple(k for k in range(1, groups.chosen * size + 1) if counted(k) == self.group_best)


def _span(topks: tuple[int, ...]) -> str:
    return f"{topks[0]}" if len(topks) == 1 else f"{topks[0]} to {topks[-1]}"


def unfollowed(run: RunConfig, followed: tuple[str, ...]) -> list[str]:
    """Flags that change the model and that the class does not support: an export that ignored one would be
    another model.
    """
    known = {*_EVERYWHERE, *ROTARY_SETTINGS, *followed}
    leaves = [leaf for leaf in leaves_with(Role.SHAPE, Role.FUNCTION) if leaf.name not in known]
    return [leaf.flag for leaf in leaves if value_of(run, leaf.name) != leaf.default]


def softmax_scores(options: Any) -> Iterator[str]:
    """For a class that has no others."""
    if options.score_function != "softmax":
        yield "supports only softmax scores"


def sigmoid_scores(options: Any) -> Iterator[str]:
    """For a class that has no others."""
    if options.score_function != "sigmoid":
        yield "supports only sigmoid scores"


def dense_layers_first(run: RunConfig) -> Iterator[str]:
    """For a class that has no dense layer behind a MoE layer."""
    if sorted(layers := moe_layers(run)) != list(layers):
        yield "supports dense layers only before the MoE layers"


def whole_shared_experts(run: RunConfig) -> Iterator[str]:
    """For a class with several shared experts of an expert's width and without a gate."""
    shared, width = run.model.moe_shared_expert_intermediate_size or 0, expert_width(run)
    if shared % width:
        yield f"needs shared experts whose width is a multiple of the expert width {width}, not {shared}"
    if run.model.moe_shared_expert_gate:
        yield "does not support a shared-expert gate"


def deepseek_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    """The fields of DeepSeek's classes and of those derived from them."""
    groups, width = options.groups, expert_width(run)
    return {
        "n_routed_experts": run.model.num_experts,
        "moe_intermediate_size": width,
        "n_shared_experts": (run.model.moe_shared_expert_intermediate_size or 0) // width,
        "first_k_dense_replace": moe_layers(run).index(True),
        "n_group": 1 if groups is None else groups.total,
        "topk_group": 1 if groups is None else groups.chosen,
        "norm_topk_prob": options.sums_to_one,
        "routed_scaling_factor": options.scaling_factor,
        "num_nextn_predict_layers": 0,
    }
