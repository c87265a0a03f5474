"""The model of a run in plain torch with a key/value cache: no engine, no process group, any router.

Legend: ``B`` prompts, ``Q`` new positions, ``P`` positions so far, ``N`` query heads, ``G`` key/value
heads, ``C`` channels of a head, ``D`` hidden size, ``T = B * Q`` tokens, ``E`` experts, ``K`` active experts,
``V`` ids of the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hyperrouter.config.tree import ModelConfig
from megatron_hyperrouter.export.names import FINAL_NORM, OUTPUT, Heads, Sizes
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.routers.base import Router, Tokens

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer


class Expert(NamedTuple):
    """SwiGLU: ``down (silu(gate x) * (up x))``."""

    gate_up: Tensor
    down: Tensor

    def compute(self, x_TD: Tensor) -> Tensor:
        """The expert's output ``_TD``."""
        gate_TF, up_TF = F.linear(x_TD, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate_TF) * up_TF, self.down)


@dataclass
class Cache:
    """Keys and values of the positions so far, ``[B, G, P, C]`` for each layer; ``hidden_BP``: padding in
    front of short prompts.
    """

    hidden_BP: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.keys[0].size(2) if self.keys else 0

    def extend(self, layer: int, key_BGQC: Tensor, value_BGQC: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new positions; returns all."""
        if layer in self.keys:
            key_BGQC = torch.cat((self.keys[layer], key_BGQC), 2)
            value_BGQC = torch.cat((self.values[layer], value_BGQC), 2)
        self.keys[layer], self.values[layer] = key_BGQC, value_BGQC
        return key_BGQC, value_BGQC


class Decoder:
    """Computes logits of the next token; ``read`` gives a weight by its global name."""

    def __init__(
        self, model: ModelConfig, read: Callable[[str], Tensor], routers: list[Router], *, step: int = 0
    ) -> None:
        self.model, self.sizes = model, Sizes.of(model)
        self.routers = [router.eval() for router in routers]
        self.step = step
        self.embedding_VD = read(WORD_EMBEDDINGS)
        self.output_VD = self.embedding_VD if self.sizes.tied else read(OUTPUT)
        self.final_norm_D = read(FINAL_NORM)
        self.layers = [self._layer(read, number) for number in range(model.num_layers)]
        rates = model.rotary_base ** (
            -torch.arange(0, self.sizes.heads.channels, 2, dtype=torch.float32) / self.sizes.heads.channels
        )
        self.rates_C = torch.cat((rates, rates))

    def _layer(self, read: Callable[[str], Tensor], number: int) -> dict[str, Tensor | list[Expert]]:
        prefix = f"decoder.layers.{number}."
        leaves = [
            "input_layernorm",
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "pre_mlp_layernorm",
        ]
        if self.sizes.qk_norm:
            leaves += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
        found: dict[str, Tensor | list[Expert]] = {leaf: read(f"{prefix}{leaf}.weight") for leaf in leaves}
        expert = f"{prefix}mlp.experts.local_experts."
        found["experts"] = [
            Expert(read(f"{expert}{each}.linear_fc1.weight"), read(f"{expert}{each}.linear_fc2.weight"))
            for each in range(self.sizes.num_experts)
        ]
        return found

    @torch.inference_mode()
    def logits(self, ids_BQ: Tensor, cache: Cache, *, topk: int) -> Tensor:
        """Logits ``_BQV`` of the tokens that follow each of the new positions; the cache grows by them."""
        start, (batch, new) = cache.length, ids_BQ.shape
        places_BQ = torch.arange(start, start + new) - cache.hidden_BP.sum(1, keepdim=True)
        tokens = Tokens(ids_BQ.flatten(), places_BQ.flatten(), self.model.seq_length)
        angles_BQC = places_BQ.clamp(min=0).float().unsqueeze(-1) * self.rates_C
        mask = self._visible(start, new, cache)
        x_BQD = F.embedding(ids_BQ, self.embedding_VD)
        for number, layer in enumerate(self.layers):
            normed = self._norm(x_BQD, layer["input_layernorm"])
            x_BQD = x_BQD + self._attend(number, layer, normed, angles_BQC, mask, cache)
            flat_TD = self._norm(x_BQD, layer["pre_mlp_layernorm"]).flatten(0, 1)
            routed_TD = self._experts(self.routers[number], layer["experts"], flat_TD, tokens, topk)
            x_BQD = x_BQD + routed_TD.view(batch, new, -1)
        return F.linear(self._norm(x_BQD, self.final_norm_D), self.output_VD)

    def _visible(self, start: int, new: int, cache: Cache) -> Tensor:
        """Which positions each new one sees, ``[B, 1, Q, P + Q]``: those before it and itself, but for
        padding.
        """
        total = start + new
        seen_QP = torch.ones(new, total, dtype=torch.bool).tril(start)
        batch, padded = cache.hidden_BP.shape
        hidden_BP = torch.zeros(batch, total, dtype=torch.bool)
        hidden_BP[:, :padded] = cache.hidden_BP
        itself_QP = torch.eye(total, dtype=torch.bool)[
            start:
        ]  # padding sees itself, so that its row is not empty
        return ((seen_QP & ~hidden_BP[:, None]) | itself_QP)[:, None]

    def _attend(
        self,
        number: int,
        layer: dict[str, Tensor | list[Expert]],
        x_BQD: Tensor,
        angles_BQC: Tensor,
        mask: Tensor,
        cache: Cache,
    ) -> Tensor:
        heads: Heads = self.sizes.heads
        batch, new, _ = x_BQD.shape
        per_group = heads.queries // heads.groups
        qkv = F.linear(x_BQD, layer["self_attention.linear_qkv"])  # type: ignore[arg-type]
        grouped = qkv.view(batch, new, heads.groups, per_group + 2, heads.channels)
        query = grouped[..., :-2, :].flatten(2, 3)
        key, value = grouped[..., -2, :], grouped[..., -1, :]
        if self.sizes.qk_norm:
            query = self._norm(query, layer["self_attention.q_layernorm"])
            key = self._norm(key, layer["self_attention.k_layernorm"])
        query, key = (rotated(x, angles_BQC).transpose(1, 2) for x in (query, key))
        key, value = cache.extend(number, key, value.transpose(1, 2))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=heads.groups != heads.queries
        )
        return F.linear(out.transpose(1, 2).flatten(2), layer["self_attention.linear_proj"])  # type: ignore[arg-type]

    def _experts(
        self, router: Router, experts: Tensor | list[Expert], x_TD: Tensor, tokens: Tokens, topk: int
    ) -> Tensor:
        routing = router(x_TD, step=self.step, topk=topk, tokens=tokens)
        total_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(experts):
            token_R, slot_R = (routing.experts_TK == number).nonzero(as_tuple=True)
            if len(token_R):
                made_RD = expert.compute(x_TD[token_R]) * routing.weights_TK[token_R, slot_R, None].to(
                    x_TD.dtype
                )
                total_TD.index_add_(0, token_R, made_RD)
        return total_TD

    def _norm(self, x: Tensor, weight: Tensor | list[Expert]) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.rms_norm(x.float(), (x.size(-1),), weight.float(), self.model.norm_epsilon).to(x.dtype)


@dataclass(frozen=True)
class Loaded:
    """A model that writes text."""

    decoder: Decoder
    tokenizer: Tokenizer
    run: RunConfig


def rotated(x_BQHC: Tensor, angles_BQC: Tensor) -> Tensor:
    """Rotary positions: both halves of a head's channels turn together."""
    first, second = x_BQHC.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    angles = angles_BQC.unsqueeze(2)
    return (x_BQHC * angles.cos() + turned * angles.sin()).to(x_BQHC.dtype)
