"""A run of our own with one expert, a dense model, as the Hugging Face folder that upcycling takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.streams import TensorReader
from megatron_hyperrouter.config.derived import expert_width
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.classes.names import QWEN
from megatron_hyperrouter.export.classes.target import Target, refuse_unknown
from megatron_hyperrouter.export.folder import Export, write_model
from megatron_hyperrouter.export.gates import Gates

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.base import Tokenizer

_SHARD = 5 * 10**9


def write_dense(run: RunConfig, reader: TensorReader, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the run's model as a Llama, or as a Qwen3 if it has q/k norms; CheckpointError if it is not a
    dense model.
    """
    _check(run, tokenizer.vocab_size)
    layers = str([0] * run.model.num_layers)
    model = replace(run.model, moe_layer_freq=layers, ffn_hidden_size=expert_width(run))
    name, kind = ("Qwen3ForCausalLM", "qwen3") if model.qk_layernorm else ("LlamaForCausalLM", "llama")
    gates = Gates(Target(name, kind, QWEN, {}, (1,)), {}, {})
    job = Export(replace(run, model=model), folder, gates, tokenizer, "float32", 1, _SHARD)
    write_model(job, folder, _OneExpert(reader))


class _OneExpert:
    """The checkpoint's tensors, its only expert under the name of a dense MLP."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def __contains__(self, name: str) -> bool:
        return _theirs(name) in self._reader

    def meta(self, name: str) -> Tensor:
        """As :meth:`TensorReader.meta`."""
        return self._reader.meta(_theirs(name))

    def read(self, name: str) -> Tensor:
        """As :meth:`TensorReader.read`."""
        return self._reader.read(_theirs(name))


def _theirs(name: str) -> str:
    return name.replace(".mlp.linear_", ".mlp.experts.local_experts.0.linear_")


def _check(run: RunConfig, vocab_size: int) -> None:
    model = run.model
    if model.num_experts != 1 or model.mlp_type != "standard":
        raise CheckpointError(
            (
                f"the run has --num-experts {model.num_experts} --mlp-type {model.mlp_type}, but --upcycle "
                "needs --num-experts 1 --mlp-type standard"
            ),
            remedy="give the run of a dense model; to train this run further, use mhr train",
        )
    refuse_unknown(run, (), "upcycling")
    router = make_router(run, 1, vocab_size=vocab_size)
    weights_TK, _ = router.choose(torch.linspace(-2, 2, 8)[:, None], 1)
    if not torch.equal(router.scaled(weights_TK), torch.ones(8, 1)):
        raise CheckpointError(
            f"with one expert, router {run.router.name} of the run gives a routing weight other than 1",
            remedy="use a run whose routing weights sum to 1",
        )
