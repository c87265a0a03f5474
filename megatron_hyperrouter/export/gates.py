"""Routers in the form that a Hugging Face folder contains: a folded matrix for a class of transformers, or
the gate of our own modeling file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.classes.latent import LATENT_ATTENTION, attention_fields
from megatron_hyperrouter.export.classes.names import PACKED, SHARED_GATE
from megatron_hyperrouter.export.classes.target import (
    CHOICE_BIAS,
    FAMILIES,
    Target,
    check_served,
    choose,
    no_class,
    refuse_unknown,
    target_of,
)
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.base import Router
from megatron_hyperrouter.routers.stablemoe import StableMoERouter
from megatron_hyperrouter.routers.xmoe import XMoERouter

_SHARED = ("moe_shared_expert_intermediate_size", "moe_shared_expert_gate")
MODELING_FILE = "modeling_hyperrouter.py"


class Gates(NamedTuple):
    """The routers of a run in exported form."""

    target: Target
    # our global name of the router's tensor (``decoder.layers.0.mlp.router.weight``) -> tensor
    tensors: dict[str, Tensor]
    options: dict[str, Any]  # of the folded router, or of our own gate

    def check_served(self, topks: Iterable[int], flag: str) -> None:
        """ConfigError for values of k at which the class would choose other experts."""
        check_served(self.target.architecture, self.target.topks, topks, flag)


def standard_gates(run: RunConfig, routers: Mapping[int, Router], topk: int) -> Gates:
    """The gates of a class of transformers, for a model that is served at ``topk``; CheckpointError with the
    reasons where there is none.
    """
    folded = {layer: _folded(router) for layer, router in routers.items()}
    options = next(iter(folded.values())).config
    target = choose(run, options, topk)
    tensors: dict[str, Tensor] = {}
    for layer, router in folded.items():
        prefix = f"decoder.layers.{layer}.mlp.router."
        W_ED, _ = router.linear()
        tensors[f"{prefix}weight"] = W_ED.detach().float()
        if CHOICE_BIAS in target.router_leaves:
            bias = getattr(router, "choice_bias_E", None)
            zeros_E = torch.zeros(run.model.num_experts)
            tensors[prefix + CHOICE_BIAS] = zeros_E if bias is None else bias.detach().float()
    if target.naming.gated_shared_expert:
        tensors |= _open_gates(run, routers)
    kept = (
        "score_function",
        "pre_softmax",
        "renormalise",
        "expert_bias",
        "bias",
        "num_groups",
        "group_topk",
        "scaling_factor",
    )
    return Gates(target, tensors, {name: getattr(options, name) for name in kept})


def _open_gates(run: RunConfig, layers: Iterable[int]) -> dict[str, Tensor]:
    """Gates of zeros, for a class that always has a gate, if the run's shared expert has none."""
    if run.model.moe_shared_expert_intermediate_size is None or run.model.moe_shared_expert_gate:
        return {}
    zeros_1D = torch.zeros(1, run.model.hidden_size)
    return {f"decoder.layers.{layer}.{SHARED_GATE}": zeros_1D for layer in layers}


def _folded(router: Router) -> Any:
    try:
        return router.fold()
    except NotImplementedError as error:
        raise no_class([str(error)]) from error


def custom_gates(run: RunConfig, routers: Mapping[int, Router], *, rows: int) -> Gates:
    """The gates of ``huggingface/modeling_hyperrouter.py``; ``rows`` of the embedding."""
    if run.model.mlp_type != "standard":
        raise no_class(["the modeling file does not support --mlp-type residual"], custom_code=False)
    base = FAMILIES["Qwen3MoeForCausalLM"]
    latent = LATENT_ATTENTION if run.attention.multi_latent_attention else ()
    refuse_unknown(run, (*base.settings, *_SHARED, *latent), "the modeling file")
    kind: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for layer, router in routers.items():
        with torch.no_grad():
            kind, own = _gate(router, rows)
        tensors |= {
            f"decoder.layers.{layer}.mlp.router.{leaf}": tensor.detach().float()
            for leaf, tensor in own.items()
        }
    first = f"decoder.layers.{min(routers)}.mlp.router."
    tensors |= _open_gates(run, routers)
    leaves = tuple(name.removeprefix(first) for name in tensors if name.startswith(first))
    plain = target_of(base, run, ROUTERS["topk"].Config())
    module = MODELING_FILE.removesuffix(".py")
    fields = {
        **plain.fields,
        **(attention_fields(run) if latent else {}),
        "hyperrouter": {
            **kind,
            "latent_attention": bool(latent),
            "qk_norm": run.model.qk_layernorm,
            "shared_width": run.model.moe_shared_expert_intermediate_size or 0,
        },
        "auto_map": {
            "AutoConfig": f"{module}.HyperRouterConfig",
            "AutoModelForCausalLM": f"{module}.HyperRouterForCausalLM",
        },
    }
    most = run.router.options.largest_topk(run.model.num_experts)
    target = replace(
        plain,
        topks=tuple(range(1, most + 1)),
        architecture="HyperRouterForCausalLM",
        model_type="hyperrouter_moe",
        # transformers joins single experts only for the model types that it knows
        naming=PACKED,
        fields=fields,
        router_leaves=leaves,
        custom_code=True,
    )
    return Gates(target, tensors, kind)


def _gate(router: Router, rows: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the gate of the modeling file does, and its tensors."""
    kind, own = _scores_and_choice(router, rows)
    groups = router.config.groups
    return kind | {
        "groups": None if groups is None else list(groups),
        "scaling_factor": router.config.scaling_factor,
    }, own


def _scores_and_choice(router: Router, rows: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind: dict[str, Any]
    own: dict[str, Tensor]
    if isinstance(router, StableMoERouter):
        kind = {"scores": "linear", "weights": "sigmoid", "renormalise": False, "bias": False}
        own = {"weight": router.centroid_ED}
        if int(router.frozen_at) < 0:
            return kind | {"choice": "logits"}, own
        words, size = router.frozen_word_VW.shape
        word = torch.zeros(rows, size)
        word[:words] = router.frozen_word_VW
        own |= {"word": word, "word_centroid": router.frozen_centroid_EW}
        return kind | {"choice": "words", "word_size": size}, own
    if isinstance(router, XMoERouter) and router.config.normalize_input:
        own = {"projection": router.projection_PD, "embedding": router.embedding_EP}
        options = router.config
        kind = {
            "scores": "cosine",
            "weights": _weights(options),
            "renormalise": options.renormalise,
            "bias": False,
            "choice": _choice(options),
            "projection_size": router.projection_PD.size(0),
        }
        return kind, own | {"temperature": router.temperature()}
    folded = _folded(router)
    W_ED, bias_E = folded.linear()
    options = folded.config
    kind = {
        "scores": "linear",
        "weights": _weights(options),
        "renormalise": options.renormalise,
        "bias": bias_E is not None,
        "choice": "biased" if options.expert_bias else _choice(options),
    }
    own = {"weight": W_ED}
    if bias_E is not None:
        own["bias"] = bias_E
    if options.expert_bias:
        own[CHOICE_BIAS] = folded.choice_bias_E
    return kind, own


def _weights(options: Any) -> str:
    """What the weights are before ``renormalise`` and the factor."""
    return "kept" if getattr(options, "renormalised_anyway", False) else str(options.score_function)


def _choice(options: Any) -> str:
    """What the choice compares, as in ``ops.topk.scored_topk``: scores rise with the logits, but a sum of a
    group's scores does not rise with the sum of its logits.
    """
    summed = options.renormalise or getattr(options, "renormalised_anyway", False)
    plain = options.groups is None or (summed and options.score_function == "softmax")
    return "logits" if plain else "scores"
