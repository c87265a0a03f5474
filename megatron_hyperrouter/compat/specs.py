"""Layer specs of megatron-core, which differ between its versions."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any


def submodules_of(spec: Any) -> Any:
    """The submodules that ``spec`` was made with, to read or to replace.

    megatron-core 0.16.1 has a ``ModuleSpec`` for each part of a layer; 0.19.2 has a ``functools.partial`` for
    some (moe_module_specs.py:87).
    """
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def dense_mlp(parts: Any) -> Any:
    """Spec of an MLP for every token, with the host's ``MLPSubmodules``; 0.19.2 warns about a ``ModuleSpec``
    here (transformer_layer.py:420).
    """
    # Not at the top: the patches come before the host.
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=parts)
    return ModuleSpec(module=MLP, submodules=parts)


def prediction_parts(layer: Any, **others: Any) -> Any:
    """``MultiTokenPredictionLayerSubmodules`` around a transformer layer, a field with a new name in 0.19."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules

    old, new = "transformer_layer", "mtp_model_layer"
    names = {field.name for field in fields(MultiTokenPredictionLayerSubmodules)}
    return MultiTokenPredictionLayerSubmodules(**{new if new in names else old: layer}, **others)
