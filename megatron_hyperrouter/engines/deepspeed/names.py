"""DeepSpeed's parameter names and the global ones (``model/names.py``)."""

from __future__ import annotations

import re

from megatron_hyperrouter.model.names import stacked_name

_EMBEDDING = re.compile(r"^(?:tied_modules\.embed|0)\.embedding\.")
_LAYER = re.compile(r"^(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")
_EXPERTS = ".mlp.moe.deepspeed_moe.experts."
_ROUTER = ".mlp.moe.deepspeed_moe.gate.router."
_RESIDUAL, _COEFFICIENT = ".mlp.moe.mlp.", ".mlp.moe.coefficient."


def global_name(name: str, *, num_layers: int, first_expert: int, experts: int = 1) -> str:
    """``name`` is that of the layer list (position.rest); this rank has ``experts`` experts from
    ``first_expert`` on.
    """
    if _EMBEDDING.match(name):
        return _EMBEDDING.sub("embedding.", name)
    match = _LAYER.match(name)
    if match is None:
        raise ValueError(f"parameter {name} does not belong to any layer of the model")
    position, rest = int(match[1]), name[match.end() :]
    if position == num_layers + 1:
        return f"decoder.final_layernorm.{rest}"
    if position == num_layers + 2:
        return rest.removeprefix("output_layer.") if ".classifier." in rest else rest
    rest = f"decoder.layers.{position - 1}.{rest}"
    rest = (
        rest.replace(_ROUTER, ".mlp.router.")
        .replace(_RESIDUAL, ".mlp.residual.")
        .replace(_COEFFICIENT, ".mlp.coefficient.")
    )
    rest = _EXPERT.sub(lambda found: f".mlp.experts.local_experts.{first_expert + int(found[1])}.", rest)
    return stacked_name(rest.replace(_EXPERTS, ".mlp.experts."), first=first_expert, count=experts)
