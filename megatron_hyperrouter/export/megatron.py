"""A checkpoint's weights for use in plain megatron-core: its ``dist_checkpointing`` format and its own
router.

The names of the sharded tensors are those that megatron-core 0.16.1 gives a ``GPTModel`` of Transformer
Engine's layers, which are Megatron-LM's default (models/gpt/gpt_layer_specs.py).  Its local layers give the
norm before the experts another name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.distributed.checkpoint import CheckpointException

from megatron_hyperrouter.checkpoint.weights import read_tensors, read_weights, weight_names
from megatron_hyperrouter.config.by_role import beyond_plain_layers
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.router_matrices import routing_matrices
from megatron_hyperrouter.files import publish, unfinished_folder
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.model.spec import RMSNorm, expert_spec, layer_spec, transformer_config

# in what torch raises if a file cannot be written, as on a full disk
_DISK = ("PytorchStreamWriter", "inline_container", "No space left", "File too large")


def export_weights(run: RunConfig, folder: Path, output: Path, *, step: int) -> Path:
    """Write the weights in ``folder`` to ``output/iter_NNNNNNN``, which is returned; call it within
    ``one_process``.

    A router that is a linear map becomes megatron-core's ``TopKRouter``, which also takes the softmax over
    the chosen logits (``moe_router_pre_softmax`` False).  CheckpointError if that would be another model.
    """
    if run.model.moe_router_topk < 2:
        raise CheckpointError(
            f"{folder} was trained with k = 1",
            remedy="use mhr export-hf; megatron-core does not support this router at k = 1",
        )
    if run.model.mlp_type != "standard":
        raise CheckpointError(
            f"{folder} has --mlp-type {run.model.mlp_type}",
            remedy="use mhr evaluate; this model cannot be exported",
        )
    if found := beyond_plain_layers(run):
        raise CheckpointError(
            f"{folder} has settings that export-megatron does not support: {', '.join(found)}",
            remedy="try mhr export-hf, which supports more models",
        )
    rows = _rows(folder)
    model = plain_model(run, rows=rows)
    named = dict(model.named_parameters())
    routers = routing_matrices(run, folder, vocab_size=rows)
    read_weights(folder, {name: parameter for name, parameter in named.items() if name not in routers})
    with torch.no_grad():
        for name, matrix_ED in routers.items():
            named[name].copy_(matrix_ED)
    target = output / f"iter_{step:07d}"
    if target.exists():
        raise CheckpointError(
            f"{target} already exists", remedy="choose another --output, or move that folder away"
        )
    state = {"model": model.sharded_state_dict(), "iteration": step, "checkpoint_version": 3.0}
    with unfinished_folder(target) as draft:
        try:
            dist_checkpointing.save(state, str(draft))
        except (RuntimeError, CheckpointException) as error:
            if not any(word in str(error) for word in _DISK):
                raise
            raise OSError(str(error).splitlines()[-1]) from error
        publish(draft, target)
    (output / "latest_checkpointed_iteration.txt").write_text(f"{step}\n", encoding="utf-8")
    return target


def plain_model(run: RunConfig, *, rows: int) -> GPTModel:
    """The model with megatron-core's own router; ``rows``: of the embedding."""
    spec = layer_spec(run, ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=expert_spec(run))))
    # Of the local spec's names only this one differs from Transformer Engine's where all layers are MoE
    # layers.
    spec.submodules.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
    }
    return GPTModel(
        config=transformer_config(run),
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[spec] * run.model.num_layers, layer_norm=RMSNorm
        ),
        vocab_size=rows,
        max_sequence_length=run.model.seq_length,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
    )


def model_flags(run: RunConfig) -> list[str]:
    """Megatron-LM's command line for the exported model, except for data and training; most of our names
    are its names.
    """
    model, core = run.model, transformer_config(run)
    sizes = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "num-query-groups": core.num_query_groups,
        "kv-channels": core.kv_channels,
        "ffn-hidden-size": core.ffn_hidden_size,
        "moe-ffn-hidden-size": core.moe_ffn_hidden_size,
        "num-experts": model.num_experts,
        "moe-router-topk": model.moe_router_topk,
        "moe-router-dtype": "fp32",
        "normalization": "RMSNorm",
        "norm-epsilon": model.norm_epsilon,
        "position-embedding-type": "rope",
        "rotary-base": int(base) if (base := model.rotary_base).is_integer() else base,  # an integer there
        "seq-length": model.seq_length,
        "max-position-embeddings": model.seq_length,
        "make-vocab-size-divisible-by": model.make_vocab_size_divisible_by,
    }
    switches = {
        "group-query-attention": True,
        "swiglu": True,
        "disable-bias-linear": True,
        "qk-layernorm": model.qk_layernorm,
        "untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "bf16": run.train.bf16,
    }
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return words + [f"--{name}" for name, on in switches.items() if on]


def _rows(folder: Path) -> int:
    if WORD_EMBEDDINGS not in weight_names(folder):
        raise CheckpointError(
            f"{folder} has no {WORD_EMBEDDINGS}", remedy="use a checkpoint that this program wrote"
        )
    return read_tensors(folder, [WORD_EMBEDDINGS])[WORD_EMBEDDINGS].size(0)
