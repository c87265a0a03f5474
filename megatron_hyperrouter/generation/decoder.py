"""The model of a run in plain torch with a key/value cache: no engine, no process group, any router.

Legend: ``B`` prompts, ``Q`` new positions, ``P`` positions so far, ``D`` hidden size, ``F`` width of an MLP,
``T = B * Q`` tokens, ``E`` experts, ``K`` active experts, ``R`` routes to one expert, ``V`` ids of the padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hyperrouter.config.derived import windows
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.classes.family import DENSE_LAYERS, SHARED_EXPERTS
from megatron_hyperrouter.export.classes.names import FINAL_NORM, OUTPUT, SHARED_GATE, ModelShape
from megatron_hyperrouter.generation.attention import GroupedAttention, KeyValueCache, LatentAttention
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.routers.base import Router, Tokens

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer

ReadWeight = Callable[[str], Tensor]  # a weight by its name
FOLLOWED = (  # settings beyond those of plain layers
    *DENSE_LAYERS,
    *SHARED_EXPERTS,
    "moe_shared_expert_gate",
    "add_qkv_bias",
    "rotary_percent",
    "window_size",
    "window_attn_skip_freq",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
)


class MLP(NamedTuple):
    """SwiGLU: ``down (silu(gate x) * (up x))``."""

    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, read: ReadWeight, prefix: str) -> MLP:
        """The MLP whose matrices have this prefix."""
        return cls(read(f"{prefix}linear_fc1.weight"), read(f"{prefix}linear_fc2.weight"))

    def compute(self, x_TD: Tensor) -> Tensor:
        """The output ``_TD``."""
        gate_TF, up_TF = F.linear(x_TD, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate_TF) * up_TF, self.down)


class Mixture(NamedTuple):
    """Routed experts, and a shared expert if there is one."""

    router: Router
    experts: list[MLP]
    shared: MLP | None
    shared_gate_1D: Tensor | None

    @classmethod
    def of(cls, read: ReadWeight, layer: str, router: Router, sizes: ModelShape) -> Mixture:
        """The mixture of the layer with this prefix."""
        numbers = range(sizes.num_experts)
        return cls(
            router,
            [MLP.of(read, f"{layer}mlp.experts.local_experts.{number}.") for number in numbers],
            MLP.of(read, f"{layer}mlp.shared_experts.") if sizes.shared else None,
            read(layer + SHARED_GATE) if sizes.shared_gate else None,
        )

    def compute(self, x_TD: Tensor, tokens: Tokens, step: int, topk: int) -> Tensor:
        """The output ``_TD``."""
        routing = self.router(x_TD, step=step, topk=topk, tokens=tokens)
        total_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token_R, slot_R = (routing.experts_TK == number).nonzero(as_tuple=True)
            if len(token_R):
                weight_R1 = routing.weights_TK[token_R, slot_R, None].to(x_TD.dtype)
                total_TD.index_add_(0, token_R, expert.compute(x_TD[token_R]) * weight_R1)
        if self.shared is None:
            return total_TD
        shared_TD = self.shared.compute(x_TD)
        if self.shared_gate_1D is not None:
            shared_TD = shared_TD * F.linear(x_TD, self.shared_gate_1D).sigmoid()
        return total_TD + shared_TD


class LayerWeights(NamedTuple):
    """One transformer layer."""

    input_norm_D: Tensor
    attention: GroupedAttention | LatentAttention
    mlp_norm_D: Tensor
    mlp: MLP | Mixture


class Decoder:
    """Computes logits of the next token; ``read`` gives a weight by its global name, ``routers`` those of the
    MoE layers by their numbers from 0.
    """

    def __init__(
        self, run: RunConfig, read: ReadWeight, routers: Mapping[int, Router], *, step: int = 0
    ) -> None:
        self.run, self.sizes = run, ModelShape.of(run)
        self.step = step
        self.embedding_VD = read(WORD_EMBEDDINGS)
        self.output_VD = self.embedding_VD if self.sizes.tied else read(OUTPUT)
        self.final_norm_D = read(FINAL_NORM)
        self.layers = [
            self._layer(read, number, routers.get(number)) for number in range(run.model.num_layers)
        ]

    @property
    def routers(self) -> list[Router]:
        """The router of each MoE layer, in order."""
        return [layer.mlp.router for layer in self.layers if isinstance(layer.mlp, Mixture)]

    def _layer(self, read: ReadWeight, number: int, router: Router | None) -> LayerWeights:
        prefix = f"decoder.layers.{number}."
        kind = LatentAttention if self.sizes.latent else GroupedAttention
        attention = kind(self.run, self.sizes, read, prefix, number, windows(self.run)[number])
        mlp: MLP | Mixture = (
            MLP.of(read, f"{prefix}mlp.")
            if router is None
            else Mixture.of(read, prefix, router.eval(), self.sizes)
        )
        norms = (read(f"{prefix}{leaf}.weight") for leaf in ("input_layernorm", "pre_mlp_layernorm"))
        return LayerWeights(next(norms), attention, next(norms), mlp)

    @torch.inference_mode()
    def logits(self, ids_BQ: Tensor, cache: KeyValueCache, *, topk: int) -> Tensor:
        """Logits ``_BQV`` of the tokens that follow each of the new positions; the cache grows by them."""
        start, (batch, new) = cache.length, ids_BQ.shape
        places_BQ = torch.arange(start, start + new) - cache.hidden_BP.sum(1, keepdim=True)
        tokens = Tokens(ids_BQ.flatten(), places_BQ.flatten(), self.run.model.seq_length)
        x_BQD = F.embedding(ids_BQ, self.embedding_VD)
        for layer in self.layers:
            normed_BQD = self._norm(x_BQD, layer.input_norm_D)
            x_BQD = x_BQD + layer.attention.compute(normed_BQD, places_BQ, cache)
            flat_TD = self._norm(x_BQD, layer.mlp_norm_D).flatten(0, 1)
            made_TD = (
                layer.mlp.compute(flat_TD)
                if isinstance(layer.mlp, MLP)
                else layer.mlp.compute(flat_TD, tokens, self.step, topk)
            )
            x_BQD = x_BQD + made_TD.view(batch, new, -1)
        return F.linear(self._norm(x_BQD, self.final_norm_D), self.output_VD)

    def _norm(self, x_BQD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_BQD, weight_D.shape, weight_D, self.run.model.norm_epsilon)


@dataclass(frozen=True)
class Loaded:
    """A model that writes text; ``check``: raises ConfigError for values of k at which the class of
    transformers that it comes from would choose other experts.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    run: RunConfig
    check: Callable[[Sequence[int]], None] = lambda topks: None
