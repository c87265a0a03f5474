"""The layer spec for machines with Transformer Engine: megatron-core's own, with our router in it.

The tests run it on a CPU, with a replacement that has Transformer Engine's classes and attributes, not on
a GPU. megatron-core 0.16.1 and 0.19.2, models/gpt/gpt_layer_specs.py
(``get_gpt_layer_with_transformer_engine_spec``).
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hyperrouter.compat.specs import submodules_of
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.attention.rotary import concentration


def fused_layer_spec(config: RunConfig, moe: ModuleSpec | None) -> ModuleSpec:
    """Spec of one transformer layer with ``moe`` in its MLP slot, or with one dense MLP for None.

    The input norm and, in a dense layer, the norm before the MLP are part of the matrix that follows them.
    """
    model = config.model
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=None if moe is None else model.num_experts,
        moe_grouped_gemm=moe is not None,
        qk_layernorm=model.qk_layernorm,
    )
    if moe is not None:
        spec.submodules.mlp = moe
    return spec


def fused_expert_spec(config: RunConfig, *, grouped: bool) -> ModuleSpec:
    """Spec of the experts of a rank; ``grouped``: all experts are computed in one grouped product for each
    of their two matrices.
    """
    moe = get_moe_module_spec(use_te=True, num_experts=config.model.num_experts, moe_grouped_gemm=grouped)
    experts: ModuleSpec = submodules_of(moe).experts
    return experts


def fusions(config: RunConfig) -> dict[str, bool]:
    """Fields of megatron-core's configuration: what Megatron-LM fuses by default with Transformer Engine.

    ``cross_entropy_loss_fusion`` is off, because our loss is computed in chunks.
    """
    plain_turns = not config.attention.multi_latent_attention and concentration(config) == 1.0
    return {
        "bias_dropout_fusion": True,
        "moe_permute_fusion": True,
        "apply_rope_fusion": plain_turns,  # there is no kernel for others (rope_utils.py:275)
        # apex's, which megatron-core's own layers need as well (tensor_parallel/layers.py:924)
        "gradient_accumulation_fusion": layers._grad_accum_fusion_available,
    }


def fused_norm() -> type:
    """Class of the norm after the last layer."""
    # Imported here, because these classes exist only if Transformer Engine is installed.
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
