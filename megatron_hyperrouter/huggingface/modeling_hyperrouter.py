"""A mixture of experts with a router that no class of transformers has; ``config.hyperrouter`` describes it.

Written by megatron_hyperrouter; needs transformers 5 and ``trust_remote_code=True``.  The gate scores
(``linear``, ``cosine``), weighs (``kept``, ``softmax``, ``sigmoid``) and chooses experts (by ``logits``,
``scores``, ``biased``, ``words``), where a token may be limited to its best groups of experts.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts, ``P`` projection, ``V``
vocabulary, ``W`` word features, ``G`` groups of ``M`` experts, of which a token may use ``C``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock


class HyperRouterConfig(Qwen3MoeConfig):
    """Qwen3-MoE's settings and the gate's."""

    model_type = "hyperrouter_moe"

    def __init__(self, hyperrouter: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.hyperrouter = hyperrouter
        super().__init__(**kwargs)


class RoutedGate(nn.Module):
    """The gate, in float32 whatever the model's dtype; returns what Qwen3-MoE's gate returns."""

    def __init__(self, config: HyperRouterConfig) -> None:
        super().__init__()
        self.kind = dict(config.hyperrouter)
        self.top_k = config.num_experts_per_tok
        self.ids_T: Tensor | None = None
        E, D = config.num_experts, config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight": (E, D)}
        if self.kind["scores"] == "cosine":
            P = self.kind["projection_size"]
            shapes = {"projection": (P, D), "embedding": (E, P), "temperature": (1,)}
        if self.kind["bias"]:
            shapes["bias"] = (E,)
        if self.kind["choice"] == "biased":
            shapes["e_score_correction_bias"] = (E,)
        if self.kind["choice"] == "words":
            W = self.kind["word_size"]
            shapes |= {"word": (config.vocab_size, W), "word_centroid": (E, W)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (logits_TE, weights_TK, experts_TK)."""
        x_TD = hidden_states.reshape(-1, hidden_states.size(-1)).float()
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD)
            experts_TK = best(self._within_groups(self._choice(logits_TE)), self.top_k)
            if self.kind["weights"] == "kept":
                weights_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
            else:
                weights_TK = self._scores(logits_TE).gather(-1, experts_TK)
            if self.kind["renormalise"]:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK * self.kind["scaling_factor"]
        return logits_TE, weights_TK.to(hidden_states.dtype), experts_TK

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.kind["scores"] == "cosine":
            point_TP = F.normalize(F.linear(x_TD, self.projection.float()), dim=-1, eps=1e-6)
            embedding_EP = F.normalize(self.embedding.float(), dim=-1, eps=1e-6)
            return F.linear(point_TP, embedding_EP) / self.temperature.float()
        return F.linear(x_TD, self.weight.float(), self.bias.float() if self.kind["bias"] else None)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid() if self.kind["weights"] == "sigmoid" else logits_TE.softmax(-1)

    def _choice(self, logits_TE: Tensor) -> Tensor:
        if self.kind["choice"] == "words":
            words_TW = F.embedding(self.ids_T, self.word).float()
            return F.linear(words_TW, self.word_centroid.float())
        if self.kind["choice"] == "biased":
            return self._scores(logits_TE) + self.e_score_correction_bias.float()
        return self._scores(logits_TE) if self.kind["choice"] == "scores" else logits_TE

    def _within_groups(self, choice_TE: Tensor) -> Tensor:
        """-inf outside the groups whose best experts have the largest sums, as in Megatron-LM."""
        if self.kind["groups"] is None:
            return choice_TE
        groups, chosen = self.kind["groups"]
        choice_TGM = choice_TE.view(len(choice_TE), groups, -1)
        counted = min(max(self.top_k // chosen, 1), choice_TGM.size(-1))
        best_TC = best(choice_TGM.topk(counted, dim=-1).values.sum(-1), chosen)
        inside_TG = torch.zeros_like(choice_TGM[..., 0], dtype=torch.bool).scatter(-1, best_TC, True)
        return choice_TGM.masked_fill(~inside_TG.unsqueeze(-1), -torch.inf).flatten(1)


def best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k largest in each row; of equal ones, the first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


class SharedMixture(Qwen3MoeSparseMoeBlock):
    """A mixture with an expert that sees every token, times the sigmoid of a gate."""

    def __init__(self, config: HyperRouterConfig) -> None:
        super().__init__(config)
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=config.hyperrouter["shared_width"])
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Both kinds of experts."""
        shared = self.shared_expert_gate(hidden_states).sigmoid() * self.shared_expert(hidden_states)
        return super().forward(hidden_states) + shared


def latent_attention(config: HyperRouterConfig, layer: int) -> DeepseekV3Attention:
    """DeepSeek-V3's attention, whose norms of latent vectors have the epsilon of the other norms, or are
    left out.
    """
    attention = DeepseekV3Attention(config, layer)
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(attention, name) is not None:
            getattr(attention, name).variance_epsilon = config.rms_norm_eps
            if not config.hyperrouter["qk_norm"]:
                setattr(attention, name, nn.Identity())
    return attention


class HyperRouterForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE with :class:`RoutedGate`, without q/k norms where the run had none, and with latent attention
    where it had that.
    """

    config_class = HyperRouterConfig

    def __init__(self, config: HyperRouterConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):  # the others are dense
                layer.mlp = SharedMixture(config) if config.hyperrouter["shared_width"] else layer.mlp
                layer.mlp.gate = RoutedGate(config)
            if config.hyperrouter["latent_attention"]:
                layer.self_attn = latent_attention(config, number)
            elif not config.hyperrouter["qk_norm"]:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As Qwen3-MoE's; a gate that chooses by words is given the ids."""
        if self.config.hyperrouter["choice"] == "words":
            for layer in self.model.layers:
                if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                    layer.mlp.gate.ids_T = input_ids.reshape(-1)
        return super().forward(input_ids=input_ids, **kwargs)
