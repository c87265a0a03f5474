"""Global parameter names: those of megatron-core's ``GPTModel``, with layer and expert numbers of the
whole model.

    embedding.word_embeddings.weight
    decoder.layers.{layer}.input_layernorm.weight
    decoder.layers.{layer}.self_attention.linear_qkv.weight
    decoder.layers.{layer}.self_attention.linear_kv_down_proj.weight --multi-latent-attention, and its like
    decoder.layers.{layer}.mlp.router.{parameter of the router}
    decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight
    decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight      the expert that sees every token
    decoder.layers.{layer}.mlp.shared_experts.gate_weight            its gate
    decoder.layers.{layer}.mlp.linear_fc1.weight                     a dense layer
    decoder.layers.{layer}.mlp.residual.linear_fc1.weight            --mlp-type residual
    decoder.layers.{layer}.mlp.coefficient.weight                    --mlp-type residual
    mtp.layers.{number}.transformer_layer.{as in a layer}            --mtp-num-layers; enorm, hnorm, eh_proj
    decoder.final_layernorm.weight
    output_layer.weight
    classifier.dense.weight                                          fine-tuning: in the place of the output

Initial weights, weight decay and checkpoints depend on these names alone, so that they mean the same on
every layout and engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from torch import Tensor

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
CLASSIFIER = "classifier."  # how the names of a classification head begin
# Transformer Engine's: the input norm is a part of the first matrix, and a matrix of all experts is one
# module.
_FUSED_NORM = re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$")
_FUSED_MLP_NORM = re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$")
_GROUPED = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_AHEAD = re.compile(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.")  # megatron-core 0.19
# Ours: a parameter holds the matrices of all experts of a rank, engines/grouped.py.
_STACKED = re.compile(r"\.mlp\.experts\.(linear_fc[12])_L\w+$")
_SEVERAL = re.compile(r"\.local_experts\.(\d+):(\d+)\.")
_ROUTER = re.compile(r"^(?:decoder\.layers\.(\d+)|mtp\.layers\.(\d+)\.transformer_layer)\.mlp\.router\.(.+)$")


def is_expert(name: str) -> bool:
    """True for the parameters of one expert, which live on one expert-parallel rank only."""
    return ".mlp.experts." in name


@lru_cache(maxsize=1 << 14)
def router_parameter(name: str) -> tuple[int, str] | None:
    """(layer from 0, parameter's name inside the router), or None for a parameter of something else.

    Layers of multi-token prediction count from 0 by themselves.
    """
    match = _ROUTER.match(name)
    return (int(match[1] or match[2]), match[3]) if match else None


def router_prefix(layer_number: int, num_layers: int) -> str:
    """Prefix of the names in a layer's router. Layers count from 1; layers of multi-token prediction follow
    the others.
    """
    if layer_number <= num_layers:
        return f"decoder.layers.{layer_number - 1}.mlp.router."
    return f"mtp.layers.{layer_number - num_layers - 1}.transformer_layer.mlp.router."


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay, by Megatron-LM's rule: matrices have it; vectors (norms,
    biases, a HyperRouter's embedding) do not.
    """
    return parameter.ndim > 1


def plain_name(name: str) -> str:
    """The name of a parameter in torch's layers of megatron-core 0.16, for its name in Transformer Engine's
    layers or in 0.19.
    """
    name = _AHEAD.sub(r"\1.transformer_layer.", name)
    name = _FUSED_NORM.sub(".input_layernorm.weight", name)
    name = _FUSED_MLP_NORM.sub(".pre_mlp_layernorm.weight", name)
    return _GROUPED.sub(r".mlp.experts.local_experts.\2.\1.weight", name)


def stacked_name(name: str, *, first: int, count: int) -> str:
    """The name of a parameter that contains the matrices of experts ``first`` to ``first + count - 1``:
    ``...local_experts.4:8.linear_fc1.weight``; any other name as it is.
    """
    return _STACKED.sub(rf".mlp.experts.local_experts.{first}:{first + count}.\1.weight", name)


def matrices(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(global name, tensor) of each matrix in the parameters; a stacked parameter has one for each expert.

    The matrices are views of the parameter, so copying into them changes it.
    """
    for name, parameter in named:
        names = matrix_names(name)
        yield from zip(names, parameter.detach(), strict=True) if names else [(name, parameter)]


@lru_cache(maxsize=1 << 14)
def matrix_names(name: str) -> tuple[str, ...]:
    """For a stacked parameter, the global names of its matrices in order; otherwise empty."""
    match = _SEVERAL.search(name)
    if match is None:
        return ()
    before, after = name[: match.start()], name[match.end() :]
    return tuple(f"{before}.local_experts.{number}.{after}" for number in range(int(match[1]), int(match[2])))
