"""The model as a list of layers: stages of DeepSpeed's ``PipelineModule``, or one after the other without
it.

Legend: ``B`` batch, ``S`` sequence, ``D`` hidden size, ``V`` vocabulary (padded).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.model.attention.rotary import RotaryTable, rates
from megatron_hyperrouter.model.classifier import Classifier, Headed
from megatron_hyperrouter.model.loss import LanguageModelLoss
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.model.output import ClassOutput, OutputLayer, Projection
from megatron_hyperrouter.model.spec import RMSNorm, layer_specs


def model_layers(
    run: RunConfig,
    config: TransformerConfig,
    moe: ModuleSpec,
    vocab_size: int,
    *,
    clock: Clock,
    classifier: Classifier | None = None,
) -> list[LayerSpec]:
    """Embedding, transformer layers, final norm, output; ``vocab_size`` is the padded one."""
    tied = not run.model.untie_embeddings_and_output_weights and classifier is None
    embedding_args = (run, config, vocab_size, tied)
    if tied:
        first = TiedLayerSpec("embed", Embedding, *embedding_args, tied_weight_attr=[WORD_EMBEDDINGS])
        last = TiedLayerSpec(
            "embed",
            Embedding,
            *embedding_args,
            forward_fn=Embedding.output,
            tied_weight_attr=[WORD_EMBEDDINGS],
        )
    else:
        first = LayerSpec(Embedding, *embedding_args)
        last = LayerSpec(Output, config, vocab_size, classifier)
    specs = layer_specs(run, moe, starts=clock.starts_site)
    blocks = [
        LayerSpec(Block, run, config, spec.submodules, number) for number, spec in enumerate(specs, start=1)
    ]
    return [first, *blocks, LayerSpec(RMSNorm, config, config.hidden_size, config.layernorm_epsilon), last]


class Block(TransformerLayer):
    """A transformer layer as a pipeline layer: one tensor in, one out; its rotary table is its own, its
    mask the core attention's.
    """

    def __init__(self, run: RunConfig, config: TransformerConfig, submodules: Any, layer_number: int) -> None:
        super().__init__(config, submodules, layer_number=layer_number)
        # megatron-core treats every layer other than its own MoE layer as dense.
        if not isinstance(self.mlp, MLP):
            self.recompute_mlp = False
        self.recompute = run.train.recompute_granularity == "full"
        # Latent attention turns its own queries and keys.
        self.rotary = None if config.multi_latent_attention else RotaryTable(rates(run))

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """``[S, B, D]`` to ``[S, B, D]``."""
        if self.recompute and self.training and torch.is_grad_enabled():
            output: Tensor = checkpoint(self._layer, hidden_SBD, use_reentrant=False)
            return output
        return self._layer(hidden_SBD)

    def _layer(self, hidden_SBD: Tensor) -> Tensor:
        angles = None
        if self.rotary is not None:
            parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            angles = self.rotary(hidden_SBD.size(0) * parts, hidden_SBD.device)
        output, _ = super().forward(hidden_SBD, attention_mask=None, rotary_pos_emb=angles)
        return output


class Embedding(nn.Module):
    """Token ids to vectors; also the output layer, if the output matrix is tied to the embedding."""

    def __init__(self, run: RunConfig, config: TransformerConfig, vocab_size: int, tied: bool) -> None:
        super().__init__()
        self.embedding = LanguageModelEmbedding(
            config, vocab_size, run.model.seq_length, position_embedding_type="rope"
        )
        if tied:
            self.output_layer = _output_layer(config, vocab_size, own_weight=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Returns ``[S, B, D]``."""
        hidden_SBD: Tensor = self.embedding(tokens_BS, None)
        return hidden_SBD

    @staticmethod
    def output(self: Embedding, hidden_SBD: Tensor) -> Projection | Headed | Tensor:
        """What :class:`OutputLayer` gives; the form that TiedLayerSpec asks for."""
        made, _ = self.output_layer(hidden_SBD, weight=self.embedding.word_embeddings.weight)
        return seen_by_hooks(made)


class Output(nn.Module):
    """The output with an untied matrix, or a classification head that replaces it."""

    def __init__(
        self, config: TransformerConfig, vocab_size: int, classifier: Classifier | None = None
    ) -> None:
        super().__init__()
        self.output_layer: nn.Module = (
            _output_layer(config, vocab_size, own_weight=True)
            if classifier is None
            else ClassOutput(config, classifier)
        )

    def forward(self, hidden_SBD: Tensor) -> Projection | Headed | Tensor:
        """The result of :class:`OutputLayer` or :class:`ClassOutput`."""
        made, _ = self.output_layer(hidden_SBD)
        return seen_by_hooks(made)


class Sequence(nn.Module):
    """The layers one after the other: where PipelineModule is refused (ZeRO-2) or not needed (one stage)."""

    def __init__(self, layers: list[LayerSpec], loss: LanguageModelLoss) -> None:
        super().__init__()
        # PipelineModule's name, so that both kinds of model share one map of names
        self.tied_modules = nn.ModuleDict()
        self.loss = loss
        self.calls: list[Callable[[Any], Any]] = []
        for position, layer in enumerate(layers):
            self.calls.append(self._add(position, layer))

    def _add(self, position: int, layer: LayerSpec) -> Callable[[Any], Any]:
        if not isinstance(layer, TiedLayerSpec):
            module: nn.Module = layer.build()
            self.add_module(str(position), module)
            return module
        if layer.key not in self.tied_modules:
            self.tied_modules[layer.key] = layer.build()
        tied = self.tied_modules[layer.key]
        return tied if layer.forward_fn is None else partial(layer.forward_fn, tied)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the mean loss of the micro-batch, in nats per token."""
        value: Any = tokens_BS
        for call in self.calls:
            value = call(value)
        return self.loss(value, labels_BS)


def _output_layer(config: TransformerConfig, vocab_size: int, *, own_weight: bool) -> OutputLayer:
    return OutputLayer(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
    )


def seen_by_hooks(made: Projection | Headed | Tensor) -> Projection | Headed | Tensor:
    """The same numbers; a returned weight becomes a tensor that is not a leaf, so that DeepSpeed hooks it.

    In bfloat16, DeepSpeed (0.19.8) clears the old gradients when its first hook fires
    (runtime/bf16_optimizer.py:500). It hooks every tensor that the model returns, except leaves
    (runtime/utils.py:1345). A returned leaf would get its new gradient before the first hook fires, and
    lose it.
    """
    if isinstance(made, Projection):
        return made._replace(weight_VD=made.weight_VD.view_as(made.weight_VD))
    return made
