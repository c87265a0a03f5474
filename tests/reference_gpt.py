"""The whole model once more, in plain torch and float64: no host, no dispatch, a loop over experts.  The
oracle of the engines.

Legend: ``B`` batch, ``S`` sequence, ``D`` hidden size, ``C`` channels of a head, ``T = B * S`` tokens,
``E`` experts, ``K`` active ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig

RouterMatrix = Callable[[dict[str, Tensor], int], Tensor]  # weights by global name, layer -> W_ED


class ReferenceGPT:
    """Weights are float64 leaves by global name; ``router_matrix`` gives a layer's routing matrix from
    them.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: dict[str, Tensor],
        router_matrix: RouterMatrix,
        *,
        eod: int | None = None,
    ) -> None:
        """``eod``: the id that ends a document, for settings that mind documents."""
        self.config, self.router_matrix, self.eod = config, router_matrix, eod
        self.weights = {
            name: tensor.detach().double().clone().requires_grad_() for name, tensor in weights.items()
        }

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the cross-entropy, sums over layers of the balance loss and of the z-loss, before their
        coefficients).
        """
        self.documents_BS, self.positions_BS = self._borders(tokens_BS)
        w, model = self.weights, self.config.model
        x_BSD = w["embedding.word_embeddings.weight"][tokens_BS]
        aux, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for layer in range(model.num_layers):
            prefix = f"decoder.layers.{layer}."
            x_BSD = x_BSD + self._attention(
                self._norm(x_BSD, prefix + "input_layernorm.weight"), prefix + "self_attention."
            )
            routed_BSD, layer_aux, layer_z = self._moe(
                self._norm(x_BSD, prefix + "pre_mlp_layernorm.weight"), layer, topk
            )
            x_BSD, aux, z = x_BSD + routed_BSD, aux + layer_aux, z + layer_z
        x_BSD = self._norm(x_BSD, "decoder.final_layernorm.weight")
        logits = x_BSD @ w.get("output_layer.weight", w["embedding.word_embeddings.weight"]).t()
        each_BS = F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="none").view(
            labels_BS.shape
        )
        return each_BS[self.counted(tokens_BS)].sum(), aux, z

    def counted(self, tokens_BS: Tensor) -> Tensor:
        """True where a loss is asked for."""
        return (
            tokens_BS != self.eod
            if self.config.data.eod_mask_loss
            else torch.ones_like(tokens_BS, dtype=torch.bool)
        )

    def _borders(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each token's document as far as attention goes, and its rotary position: counted
        token by token.
        """
        documents, positions = [], []
        for tokens in tokens_BS.tolist():
            document = position = 0
            for token in tokens:
                documents.append(document)
                positions.append(position)
                ends = token == self.eod
                document += ends and self.config.data.reset_attention_mask
                position = 0 if ends and self.config.data.reset_position_ids else position + 1
        return torch.tensor(documents).view(tokens_BS.shape), torch.tensor(positions).view(tokens_BS.shape)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + self.config.model.norm_epsilon).sqrt() * self.weights[name]
        )

    def _attention(self, x_BSD: Tensor, prefix: str) -> Tensor:
        model, w = self.config.model, self.weights
        heads = model.num_attention_heads
        groups = model.num_query_groups or heads
        channels = model.kv_channels or model.hidden_size // heads
        batch, seq, _ = x_BSD.shape
        # megatron-core's layout: for each group its query heads, then its key, then its value.
        mixed = (x_BSD @ w[prefix + "linear_qkv.weight"].t()).view(
            batch, seq, groups, heads // groups + 2, channels
        )
        query, key, value = mixed[..., :-2, :], mixed[..., -2:-1, :], mixed[..., -1:, :]
        if model.qk_layernorm:
            query, key = (
                self._norm(query, prefix + "q_layernorm.weight"),
                self._norm(key, prefix + "k_layernorm.weight"),
            )
        query, key = self._rotate(query), self._rotate(key)
        hidden = torch.ones(seq, seq, dtype=torch.bool).triu(1) | (
            self.documents_BS[:, :, None] != self.documents_BS[:, None, :]
        )
        rows = []
        for group in range(groups):
            for head in range(heads // groups):
                scores = query[:, :, group, head] @ key[:, :, group, 0].transpose(1, 2) / math.sqrt(channels)
                rows.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, group, 0])
        out = torch.cat(rows, -1)
        return out @ w[prefix + "linear_proj.weight"].t()

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions: channel i turns with channel i + C/2."""
        channels = x.size(-1)
        rates = self.config.model.rotary_base ** (
            -torch.arange(0, channels, 2, dtype=torch.float64) / channels
        )
        angles = self.positions_BS.double()[:, :, None, None, None] * rates
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def _moe(self, x_BSD: Tensor, layer: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        model, w = self.config.model, self.weights
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = x_TD @ self.router_matrix(w, layer).t()
        # how many experts a token prefers to this one
        rank_TE = (logits_TE[:, None, :] > logits_TE[:, :, None]).sum(-1)
        chosen_TE = rank_TE < topk
        weights_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(model.num_experts):  # every expert sees every token: slow, and plainly right
            out_TD = out_TD + weights_TE[:, expert, None] * self._expert(x_TD, layer, expert)
        counts = chosen_TE.double().sum(0)
        shares = counts / counts.sum()
        aux = model.num_experts * (shares * logits_TE.softmax(-1).mean(0)).sum()
        z = logits_TE.exp().sum(-1).log().pow(2).mean()
        return out_TD.view(x_BSD.shape), aux, z

    def _expert(self, x_TD: Tensor, layer: int, expert: int) -> Tensor:
        prefix = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}."
        gate, up = (x_TD @ self.weights[prefix + "linear_fc1.weight"].t()).chunk(2, -1)
        return (F.silu(gate) * up) @ self.weights[prefix + "linear_fc2.weight"].t()


def train_reference(
    model: ReferenceGPT, steps: Iterable[tuple[list[tuple[Tensor, Tensor]], int]], learning_rate: float
) -> list[tuple[float, float]]:
    """(lm_loss, grad_norm before clipping) of each step, given its micro-batches and its k; AdamW as the
    engines have it.
    """
    settings, sizes = model.config.optimizer, model.config.model
    parameters = list(model.weights.values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps
    )
    told = []
    for micro_batches, topk in steps:
        optimizer.zero_grad()
        total, targets = 0.0, sum(int(model.counted(tokens_BS).sum()) for tokens_BS, _ in micro_batches)
        for tokens_BS, labels_BS in micro_batches:
            lm_loss, aux, z = model.loss(tokens_BS, labels_BS, topk)
            extra = sizes.moe_aux_loss_coeff * aux + sizes.moe_z_loss_coeff * z
            (lm_loss / targets + extra / len(micro_batches)).backward()
            total += lm_loss.item() / targets
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad or torch.inf)
        optimizer.step()
        told.append((total, norm.item()))
    return told
