"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with megatron-core's names.

With its local layers, megatron-core splits the down-projections over the tensor-parallel ranks, and loses
the gradient of the keys' positions in the backward pass (multi_latent_attention.py:587: the gather's
backward takes a part and sums nothing).  Here they are whole on each rank, as with Transformer Engine's
layers.

Legend: ``S`` sequence, ``B`` batch, ``D`` hidden size, ``L`` rank, ``N`` heads on this rank, ``C``
channels of a query or key without positions, ``P`` with positions, ``V`` channels of a value.
"""

from __future__ import annotations

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_hyperrouter.compat.rotary import turned_by_table
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.attention.core import gathered_positions
from megatron_hyperrouter.model.attention.rotary import RotaryTable, concentration, rates, temperature


class LatentAttention(MegatronModule):
    """megatron-core's self-attention slot; norms are those of ``--qk-layernorm``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *,
        run: RunConfig,
        norm: type[nn.Module],
        core_attention: ModuleSpec,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        sizes, heads, hidden = run.attention, config.num_attention_heads, config.hidden_size
        self.widths = (sizes.qk_head_dim, sizes.qk_pos_emb_head_dim, sizes.v_head_dim)
        plain, turning, value = self.widths
        self.norm = norm if config.qk_layernorm else None
        if sizes.q_lora_rank is None:
            self.linear_q_proj = self._wide(hidden, heads * (plain + turning))
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, sizes.q_lora_rank)
            self.q_layernorm = self._norm(sizes.q_lora_rank)
            self.linear_q_up_proj = self._wide(sizes.q_lora_rank, heads * (plain + turning))
        self.linear_kv_down_proj = WholeLinear(config, hidden, sizes.kv_lora_rank + turning)
        self.kv_layernorm = self._norm(sizes.kv_lora_rank)
        self.linear_kv_up_proj = self._wide(sizes.kv_lora_rank, heads * (plain + value))
        sharpness = temperature(sizes.rotary_scaling_factor, sizes.mscale_all_dim)
        self.core_attention = build_module(
            core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            softmax_scale=sharpness * sharpness / math.sqrt(plain + turning),
            pg_collection=pg_collection,
        )
        self.linear_proj = RowParallelLinear(
            heads * value,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self.rotary, self.length_scale = RotaryTable(rates(run)), concentration(run)
        self.cp_group = getattr(pg_collection, "cp", None)

    def _wide(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        config = self.config
        return ColumnParallelLinear(
            inputs, outputs, config=config, init_method=config.init_method, bias=False, gather_output=False
        )

    def _norm(self, width: int) -> nn.Module:
        return (
            nn.Identity()
            if self.norm is None
            else self.norm(self.config, width, self.config.layernorm_epsilon)
        )

    def forward(self, hidden_SBD: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Returns (output ``[S, B, D]``, no bias); mask and positions are not taken from the caller."""
        plain, turning, value = self.widths
        if hasattr(self, "linear_q_proj"):
            query, _bias = self.linear_q_proj(hidden_SBD)
        else:
            query, _bias = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_SBD)))
        latent = self.linear_kv_down_proj(hidden_SBD)
        latent_SBL, key_SBP = latent.split([latent.size(-1) - turning, turning], dim=-1)
        # Every head uses these keys, so each tensor-parallel rank has a part of their gradient.
        if self.config.sequence_parallel:
            key_SBP = gather_from_sequence_parallel_region(key_SBP.contiguous())
        else:
            key_SBP = copy_to_tensor_model_parallel_region(key_SBP)
        pairs, _bias = self.linear_kv_up_proj(self.kv_layernorm(latent_SBL))
        query_SBNC, query_SBNP = query.unflatten(-1, (-1, plain + turning)).split([plain, turning], dim=-1)
        key_SBNC, value_SBNV = pairs.unflatten(-1, (-1, plain + value)).split([plain, value], dim=-1)
        query_SBNP, key_SB1P = self._turned(query_SBNP), self._turned(key_SBP.unsqueeze(2))
        key_SBNP = key_SB1P.expand(*key_SBNC.shape[:3], turning)
        mixed = self.core_attention(
            torch.cat([query_SBNC, query_SBNP], -1), torch.cat([key_SBNC, key_SBNP], -1), value_SBNV
        )
        output_SBD, _bias = self.linear_proj(mixed)
        return output_SBD, None

    def _turned(self, x_SBNP: Tensor) -> Tensor:
        """Positions; channels come as pairs of neighbours, as in DeepSeek's checkpoints and megatron-core."""
        length, group = x_SBNP.size(0), self.cp_group
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        angles = self.rotary(length * size, x_SBNP.device)
        if size > 1:
            first = rank * length
            angles = angles[gathered_positions(length, size, x_SBNP.device)[first : first + length]]
        halves = torch.cat([x_SBNP[..., 0::2], x_SBNP[..., 1::2]], -1)
        return turned_by_table(halves, angles, self.length_scale)


class WholeLinear(nn.Module):
    """A linear map whose matrix is whole on every tensor-parallel rank; each rank maps its tokens."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device="cpu"))
        # Under sequence parallelism a rank has a part of the tokens: hosts sum the gradients over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T``."""
        return nn.functional.linear(x, self.weight)
